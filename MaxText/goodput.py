"""Where a launch's wall time goes: a ledger of named, non-overlapping activities of the main thread.

The device works on while the main thread does something else; what is charged here is what the launch waited for.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ACTIVITIES = ("startup", "compile", "restore", "step", "data wait", "eval", "save")
_SECONDS_BETWEEN_RECORDS = 5.0


class TimeLedger:
    """Seconds by activity; what is charged to none of them counts as startup.

    Args:
        started: the `time.perf_counter()` reading to count from.
    """

    def __init__(self, started: float):
        self.started = started
        self.current = "startup"  # the activity
        self._seconds: dict[str, float] = dict.fromkeys(ACTIVITIES[1:], 0.0)

    @contextlib.contextmanager
    def charge(self, activity: str) -> Iterator[None]:
        """Charges the time spent in the block."""
        begin, before = time.perf_counter(), self.current
        self.current = activity
        try:
            yield
        finally:
            self.current = before
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

    def completed(self) -> float:
        """Call when a step's results have arrived; the seconds it took."""
        now = time.perf_counter()
        seconds = now - self._ready
        self._seconds += seconds
        self._steps += 1
        self._ready = now
        return seconds

    def lap(self) -> float:
        """Mean seconds of the steps completed since the last lap."""
        mean = self._seconds / max(self._steps, 1)
        self._seconds, self._steps = 0.0, 0
        return mean


class RunRecord:
    """What every launch of a run leaves about its time, in a file of its own, so that a kill loses seconds only.

    Args:
        directory: of the records of all launches of the run; None keeps no record.
        ledger: this launch's.
    """

    def __init__(self, directory: Path | None, ledger: TimeLedger):
        self._directory, self._ledger = directory, ledger
        self._started = time.time() - ledger.wall()
        self._written = -math.inf

    def update(self, first_step: int, step: int, *, now: bool = False) -> None:
        """Notes how far this launch has come, every few seconds or at once."""
        if self._directory is None or (not now and time.perf_counter() - self._written < _SECONDS_BETWEEN_RECORDS):
            return
        self._directory.mkdir(exist_ok=True)
        seconds = self._ledger.seconds()
        record = {"started": self._started, "first_step": first_step, "last_step": step, "seconds": seconds}
        path = self._directory / f"{self._started:.3f}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record))
        partial.replace(path)
        self._written = time.perf_counter()

    def total(self) -> dict[str, float]:
        """Seconds since the first launch by activity, over all launches; see `run_seconds`."""
        return {} if self._directory is None else run_seconds(self._directory, time.time())


def _record(path: Path) -> dict[str, Any] | None:
    """What one launch left; None where a full disk or a loss of power left nothing that can be read."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def run_seconds(directory: Path, now: float) -> dict[str, float]:
    """Where the time since a run's first launch went; the values sum to it.

    Steps that were taken again later count as `lost work`, what no launch accounts for as `not running`; `step` is what
    is left: the productive time.
    """
    launches = [record for path in directory.glob("*.json") if (record := _record(path)) is not None]
    launches.sort(key=lambda launch: launch["started"])
    total: dict[str, float] = dict.fromkeys((*ACTIVITIES, "lost work", "not running"), 0.0)
    kept = math.inf  # the steps after it were taken again by a later launch
    for launch in reversed(launches):
        for activity, spent in launch["seconds"].items():
            total[activity] += spent
        steps = launch["last_step"] - launch["first_step"]
        lost = min(max(launch["last_step"] - max(kept, launch["first_step"]), 0), steps)
        if lost:
            seconds = launch["seconds"]["step"] * lost / steps
            total["step"] -= seconds
            total["lost work"] += seconds
        kept = min(kept, launch["first_step"])
    total["not running"] = max(now - launches[0]["started"] - sum(total.values()), 0.0) if launches else 0.0
    return total
