"""Where the numbers go: the console's lines, metrics.jsonl and TensorBoard.

In: plain floats under the metric names. JSON lines are always written, appended and flushed line by line, so that a
killed run leaves whole lines; a resumed run appends, and a reader takes the last line of a step.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class MetricLogger:
    """Writes the metrics of one run.

    Args:
        directory: the run directory.
        emit: prints one line.
        records: False writes no files, as on all processes but the first.
    """

    def __init__(self, directory: Path, *, enable_tensorboard: bool, emit: Callable[[str], None], records: bool = True):
        self.jsonl = directory / "metrics" / "metrics.jsonl"
        self.tensorboard = directory / "tensorboard" if enable_tensorboard else None
        self._emit = emit
        self._writer: Any = None
        self._file: Any = None
        if not records:
            return
        self.jsonl.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.jsonl.open("a", encoding="utf-8")
        if _ends_in_half_a_line(self.jsonl):
            self._file.write("\n")

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Reports the step: its line on the console first."""
        self._emit(train_line(step, metrics))
        self._write(step, metrics)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Reports an evaluation after the step."""
        self._emit(eval_line(step, metrics))
        self._write(step, metrics)

    def has_evaluation(self, step: int) -> bool:
        """Whether the step's evaluation is in the file already."""
        with self.jsonl.open(encoding="utf-8") as file:
            return any('"eval/avg_loss"' in line and read_record(line).get("step") == step for line in file)

    def close(self) -> None:
        """Flushes everything."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._file is None:
            return
        # JSON has no NaN: what is not finite is null.
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        record = {"step": step, "time": round(time.time(), 3), **values}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"cannot write {self.jsonl}: {error}; make room, and the same command resumes") from error
        if self.tensorboard is None:
            return
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self.tensorboard), max_queue=0, flush_secs=10)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)


def read_record(line: str) -> dict[str, Any]:
    """The record of a line of metrics.jsonl; empty of half a line, as a full disk leaves it."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _ends_in_half_a_line(path: Path) -> bool:
    """Whether a full disk or a kill cut the last line short."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        return size > 0 and file.read() != b"\n"


def train_line(step: int, metrics: Mapping[str, float]) -> str:
    """MaxText's line, byte for byte up to the loss; what is ours comes after it, MFU where its measure is known."""
    mfu = f", MFU: {metrics['perf/mfu']:.1%}" if "perf/mfu" in metrics else ""
    line = (
        f"completed step: {step}, seconds: {metrics['perf/step_time_seconds']:.3f}, "
        f"TFLOP/s/device: {metrics['perf/per_device_tflops_per_sec']:.3f}, "
        f"Tokens/s/device: {metrics['perf/per_device_tokens_per_sec']:.3f}, "
        f"total_weights: {int(metrics['learning/total_weights'])}, loss: {metrics['learning/loss']:.3f}"
        f"{mfu}, lr: {metrics['learning/current_learning_rate']:.2e}, "
        f"grad_norm: {metrics['learning/raw_grad_norm']:.3f}"
    )
    mtp_loss = metrics.get("learning/mtp_loss")
    return line if mtp_loss is None else f"{line}, mtp_loss: {mtp_loss:.3f}"


def eval_line(step: int, metrics: Mapping[str, float]) -> str:
    """MaxText's evaluation line, bits per byte where the data has bytes, and how good multi-token prediction is."""
    line = (
        f"Completed eval after train step {step}, loss={metrics['eval/avg_loss']:.3f}, "
        f"perplexity={metrics['eval/avg_perplexity']:.3f}, total_weights={int(metrics['eval/total_weights'])}"
    )
    if "eval/bits_per_byte" in metrics:
        line += f", bits_per_byte={metrics['eval/bits_per_byte']:.4f}"
    if "eval/avg_mtp_loss" in metrics:
        accepted = metrics["eval/avg_mtp_acceptance_rate_percent"]
        line += f", mtp_loss={metrics['eval/avg_mtp_loss']:.3f}, mtp_acceptance={accepted:.1f}%"
    return line
