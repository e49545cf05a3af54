"""Runs tasks on processes of this machine, or in this one; a task that fails or dies does not end the others.

In: a task's name and the numbers to do. Out: which failed, and why. Workers are spawned, so threads of the parent
cannot harm them; they end by themselves when the parent is gone, however it ended.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from MaxText.preparation import tasks
from MaxText.preparation.tasks import Workplace


def run(
    task: str,
    numbers: Sequence[int],
    workplace: Workplace,
    num_workers: int,
    progress: Callable[[int], None],
    done: Callable[[int], None],
) -> dict[int, str]:
    """Do the task for all numbers; what went wrong, by number.

    Args:
        progress: told the bytes that were read since it was last told.
        done: told each number that is complete.
    """
    if num_workers == 1 or len(numbers) == 1:
        return _run_here(task, numbers, workplace, progress, done)
    context: Any = multiprocessing.get_context("spawn")
    waiting = list(numbers)[::-1]
    workers: dict[Any, tuple[Any, int]] = {}  # a connection to each worker, its process, what it is doing
    failures: dict[int, str] = {}

    def give_work(connection: Any, process: Any) -> None:
        if waiting:
            workers[connection] = process, waiting.pop()
            with contextlib.suppress(ConnectionError):  # it is dead, which reading from it will tell
                connection.send((task, workers[connection][1]))
        else:
            connection.close()

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, workplace), daemon=True)
        process.start()
        theirs.close()
        give_work(ours, process)

    try:
        for _ in range(min(num_workers, len(numbers))):
            start()
        while workers:
            ready: list[Any] = multiprocessing.connection.wait(list(workers))
            for connection in ready:
                process, number = workers[connection]
                try:
                    kind, value = connection.recv()
                except (EOFError, ConnectionError):
                    del workers[connection]
                    process.join()
                    failures[number] = f"its process ended with exit code {process.exitcode}; is memory short?"
                    if waiting:
                        start()
                    continue
                if kind == "progress":
                    progress(value)
                    continue
                del workers[connection]
                if kind == "failed":
                    failures[number] = value
                else:
                    done(number)
                give_work(connection, process)
    finally:
        for connection, (process, _) in workers.items():
            process.kill()
            connection.close()
    return failures


def _run_here(
    task: str,
    numbers: Sequence[int],
    workplace: Workplace,
    progress: Callable[[int], None],
    done: Callable[[int], None],
) -> dict[int, str]:
    failures = {}
    for number in numbers:
        try:
            tasks.TASKS[task](workplace, number, progress)
            done(number)
        except Exception as error:
            failures[number] = _story(error)
    return failures


def _work(connection: Any, workplace: Workplace) -> None:
    """The life of a worker: tasks come, results go, until the connection ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is parallel enough
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            task, number = connection.recv()
        except EOFError:
            return
        try:
            tasks.TASKS[task](workplace, number, lambda size: connection.send(("progress", size)))
            connection.send(("done", number))
        except Exception as error:
            connection.send(("failed", _story(error)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _story(error: Exception) -> str:
    """What happened, and where in this project: data can break a task in ways nobody thought of."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "MaxText" in frame.filename]
    where = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
