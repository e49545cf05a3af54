"""Where a launch's wall time goes: a ledger of named, non-overlapping activities of the main thread.

The device works on while the main thread does something else; what is charged here is what the launch waited for.
"""

import contextlib
import time
from collections.abc import Iterator

ACTIVITIES = ("startup", "compile", "restore", "step", "data wait", "eval", "save")


class TimeLedger:
    """Seconds by activity; what is charged to none of them counts as startup.

    Args:
        started: the `time.perf_counter()` reading to count from.
    """

    def __init__(self, started: float):
        self.started = started
        self._seconds: dict[str, float] = dict.fromkeys(ACTIVITIES[1:], 0.0)

    @contextlib.contextmanager
    def charge(self, activity: str) -> Iterator[None]:
        """Charges the time spent in the block."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[activity] += time.perf_counter() - begin

    def seconds(self) -> dict[str, float]:
        """Seconds by activity; they sum to the wall time so far."""
        startup = self.wall() - sum(self._seconds.values())
        return {"startup": startup, **self._seconds}

    def wall(self) -> float:
        """Seconds since the launch."""
        return time.perf_counter() - self.started


class StepTimer:
    """Seconds of each step, from the completion of the one before it, pauses taken out."""

    def __init__(self):
        self._ready = time.perf_counter()
        self._seconds = 0.0
        self._steps = 0

    def resume(self) -> None:
        """Call after anything that is not a step (compile, evaluation, save) with no step under way."""
        self._ready = time.perf_counter()

    def completed(self) -> None:
        """Call when a step's results have arrived."""
        now = time.perf_counter()
        self._seconds += now - self._ready
        self._steps += 1
        self._ready = now

    def lap(self) -> float:
        """Mean seconds of the steps completed since the last lap."""
        mean = self._seconds / max(self._steps, 1)
        self._seconds, self._steps = 0.0, 0
        return mean
