"""Ends a run that hangs, with what it was doing: stacks of all threads, the step, the state of the data.

A thread compares the time since the last sign of life with what is usual. It ends the process with EXIT_RESUME, so that
a launcher starts it again from its last checkpoint. Where a call keeps the interpreter to itself, faulthandler's own
thread does the same a little later, but can only end it with 1.
"""

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from MaxText.preemption import EXIT_RESUME

_MEDIANS = 20  # so many usual steps without a sign of life are a hang, if they take longer than the minimum
_LONG = 6  # saving and evaluating may take so many times longer


class Watchdog:
    """Watches while entered, from the first sign of life on; with minimum_seconds=0 it does not.

    Args:
        directory: where the stacks are written.
        minimum_seconds: never call less than this a hang.
        describe: what the run is doing, in words.
    """

    def __init__(self, directory: Path, minimum_seconds: float, describe: Callable[[], str]):
        self._directory = directory
        self._minimum = minimum_seconds
        self._describe = describe
        self._steps: deque[float] = deque(maxlen=100)
        self._last: float | None = None
        self._factor = 1
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._minimum > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def alive(self, step_seconds: float | None = None) -> None:
        """A sign of life; of a step that took so long, if that is given."""
        if step_seconds is not None:
            self._steps.append(step_seconds)
        self._last = time.monotonic()

    @contextlib.contextmanager
    def longer(self) -> Iterator[None]:
        """A block that may take longer than a step."""
        self._factor = _LONG
        self.alive()
        try:
            yield
        finally:
            self.alive()
            self._factor = 1

    def limit(self) -> float:
        """Seconds without a sign of life that are a hang."""
        usual = statistics.median(self._steps) if self._steps else 0.0
        return self._factor * max(self._minimum, _MEDIANS * usual)

    def _watch(self) -> None:
        while not self._ended.wait(min(self._minimum / 10, 5.0)):
            if self._last is None:
                continue
            silent, limit = time.monotonic() - self._last, self.limit()
            if silent > limit:
                self._bark(silent)
            faulthandler.dump_traceback_later(2 * limit, exit=True)  # unless this thread comes round again

    def _bark(self, silent: float) -> None:
        path = self._directory / f"hang-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
        words = (
            f"HANG: no sign of life for {silent:.0f} s, {self._describe()}; the stacks of all threads are in {path}. "
            "The same command resumes from the last checkpoint"
        )
        try:
            with path.open("w") as file:
                file.write(f"{words}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(all_threads=True)
        print(words, file=sys.stderr, flush=True)
        os._exit(EXIT_RESUME)
