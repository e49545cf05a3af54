"""Training in this process, small and quick, for tests that must be in the middle of it when something goes wrong."""

import pathlib
import time
from typing import Any
from unittest import mock

from MaxText import preemption, run_lock, train_loop, train_report
from tests import support

KEYS = {
    "steps": 12,
    "learning_rate_schedule_steps": 12,
    "checkpoint_period": 100,
    "eval_interval": -1,
    "eval_steps": 2,
    "per_device_batch_size": 1,
    "eval_per_device_batch_size": 1,
    "enable_tensorboard": "false",
    "jax_cache_dir": "",
    "peak_tflops_per_device": 1.0,
}


class Lines(train_report.Console):
    """Keeps what is printed; calls `on_line` with each line."""

    def __init__(self, on_line: Any = None):
        super().__init__()
        self.lines: list[str] = []
        self._on_line = on_line

    def emit(self, line: str) -> None:
        self.lines.append(line)
        if self._on_line:
            self._on_line(line)

    def __contains__(self, text: str) -> bool:
        return any(text in line for line in self.lines)


def train(directory: pathlib.Path, console: Lines, **keys: Any) -> int:
    """The exit code of a training run under `directory`."""
    config = support.small_config(**KEYS | {"base_output_directory": directory, "run_name": "run"} | keys)
    # A test that fails must not end pytest itself.
    with mock.patch.object(preemption, "_leave"), preemption.StopSignals() as stop, run_lock.hold(directory / "run"):
        return train_loop.train(config, console, stop, time.perf_counter())


def saved_steps(directory: pathlib.Path) -> list[int]:
    """The steps that a run under `directory` has saved."""
    return sorted(int(path.name) for path in (directory / "run/checkpoints").iterdir() if path.name.isdecimal())
