"""Several processes on this machine that train as one, as on several hosts: JAX's own runtime over the loopback."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from tests import support

KEYS = support.SMALL | {
    "learning_rate_schedule_steps": 12,
    "steps": 12,
    "checkpoint_period": 100,
    "eval_interval": 6,
    "eval_steps": 2,
    "enable_tensorboard": "false",
    "peak_tflops_per_device": 1.0,
    "base_num_kv_heads": 2,
    "run_name": "run",
}


class Group:
    """`count` processes with `devices` CPU devices each, running `python words...`; their output goes to files."""

    def __init__(self, folder: pathlib.Path, count: int, devices: int, words: Sequence[object]):
        folder.mkdir(parents=True, exist_ok=True)
        self._outputs = [folder / f"process{index}.txt" for index in range(count)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for index, output in enumerate(self._outputs):
            several = {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_PROCESS_ID": str(index),
                "JAX_PROCESS_COUNT": str(count),
            }
            environment = _environment(devices) | (several if count > 1 else {})
            with output.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, words)],
                        env=environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        cwd=support.ROOT,
                    )
                )

    def output(self, index: int) -> str:
        """What a process has printed so far."""
        return self._outputs[index].read_text()

    def wait_for(self, index: int, text: str, seconds: float = 120) -> None:
        """Returns when a process has printed the text.

        Raises:
            AssertionError: it ended, or the time was up, without it.
        """
        end = time.monotonic() + seconds
        while text not in self.output(index):
            assert self.processes[index].poll() is None and time.monotonic() < end, self.output(index)
            time.sleep(0.02)

    def codes(self, seconds: float = 180) -> list[int]:
        """The exit codes, when all have ended.

        Raises:
            subprocess.TimeoutExpired: one has not; all are killed.
        """
        try:
            return [process.wait(seconds) for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends whatever is still there."""
        for process in self.processes:
            process.kill()
            process.wait()


def _environment(devices: int) -> Mapping[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    return kept | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}


def train(folder: pathlib.Path, count: int, devices: int, **keys: object) -> Group:
    """A training run below `folder`; compiled programs are kept between the tests."""
    return Group(folder / f"output{time.monotonic_ns()}", count, devices, words(base_output_directory=folder, **keys))


def words(**keys: object) -> list[str]:
    """The training command from the project's root, without the Python; compiled programs are kept between tests."""
    given = KEYS | {"jax_cache_dir": support.ROOT / ".pytest_cache/jax_processes"} | keys
    return ["MaxText/train.py", "configs/base.yml", *(f"{key}={value}" for key, value in given.items())]


def losses(run: pathlib.Path) -> dict[tuple[str, int], float]:
    """The losses a run has logged, the last of each step and of each evaluation, by name and step."""
    found = {}
    for record in map(json.loads, (run / "metrics/metrics.jsonl").read_text().splitlines()):
        found |= {(name, record["step"]): record[name] for name in ("learning/loss", "eval/avg_loss") if name in record}
    return found
