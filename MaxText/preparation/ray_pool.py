"""Runs tasks on a Ray cluster instead of this machine's processes: the same tasks, so the same bytes.

In and out: as pool.run. Ray is no dependency: `pip install ray` where prepare_engine=ray is asked for. RAY_ADDRESS
names the cluster. Every machine of it must see `out` and the project under the same paths.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from MaxText.preparation import tasks
from MaxText.preparation.tasks import Workplace

RETRIES = 3  # of a task whose machine went away


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
        num_workers: cores to use where Ray is started here; a cluster that is there has its own.
    Raises:
        ValueError: Ray is not installed.
    """
    import importlib

    try:
        ray: Any = importlib.import_module("ray")  # by name: the type checker runs where it is not installed
    except ImportError as error:
        raise ValueError("prepare_engine=ray needs Ray: pip install ray; or use prepare_engine=local") from error
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        cores = {} if address else {"num_cpus": num_workers}
        project = {"env_vars": {"PYTHONPATH": str(Path(tasks.__file__).parents[2])}}
        ray.init(address=address, log_to_driver=False, include_dashboard=False, runtime_env=project, **cores)
    remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_do)
    waiting = {remote.remote(task, workplace, number): number for number in numbers}
    failures = {}
    while waiting:
        for reference in ray.wait(list(waiting))[0]:
            number = waiting.pop(reference)
            try:
                progress(ray.get(reference))
                done(number)
            except Exception as error:
                failures[number] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    return failures


def _do(task: str, workplace: Workplace, number: int) -> int:
    """Do one task; returns the bytes read."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sizes: list[int] = []
    tasks.TASKS[task](workplace, number, sizes.append)
    return sum(sizes)
