"""Stops training at random instants and goes on, again and again: python -m tests.faults.kill [--kills 100] [--write].

Each run gets SIGKILL, or SIGTERM with --signal term (starting, compiling, in a step, while saving or evaluating), until
it is complete, with dropout, multi-token prediction and packed documents, over several epochs. Its parameters and
moments must then have the sha256 of a run that was never touched. --write adds the figures to benchmarks/results/.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from MaxText import preemption
from tests.processes import group

ROOT = pathlib.Path(__file__).resolve().parents[2]
PERIOD = 10
KEYS = {
    "steps": 120,
    "checkpoint_period": PERIOD,
    "eval_interval": 15,
    "eval_steps": 2,
    "base_emb_dim": 32,
    "base_num_decoder_layers": 2,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "base_mlp_dim": 64,
    "head_dim": 8,
    "vocab_size": 256,
    "max_target_length": 32,
    "num_vocab_tiling": 4,
    "per_device_batch_size": 4,
    "dropout_rate": 0.1,
    "mtp_num_layers": 1,
    "skip_step_on_spikes": "true",
    "skip_step_interval": 16,
    "enable_tensorboard": "false",
    "log_period": 1,
    "dataset_type": "grain",
    "peak_tflops_per_device": 1,
}
STEP = re.compile(r"^completed step: (\d+),")


@dataclasses.dataclass
class Kill:
    """One launch that was killed, or stopped."""

    phase: str
    seconds: float  # from the signal to the end of the process
    asynchronous: bool
    resumed: int | None  # the step it went on from; None where it was killed before it said so
    reached: int  # the last step it reported


class Tokenizer:
    """Names itself; the ids are made by hand."""

    eos_id, vocab_size, name, fingerprint = 0, 256, "none", "none"
    special_ids: ClassVar[dict[str, int]] = {}

    def encode(self, texts: list[str]) -> list[list[int]]:
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def save(self, directory: pathlib.Path) -> str:
        raise NotImplementedError

    def token_bytes(self) -> np.ndarray:
        return np.ones(256, np.int32)


def write_data(directory: pathlib.Path) -> None:
    """Documents of 5 to 60 tokens: about 45 steps an epoch."""
    from MaxText.input_pipeline import token_block_writer

    rng = np.random.default_rng(0)
    for name, tokens in (("train", 5760), ("heldout", 600)):
        writer = token_block_writer.TokenBlockWriter(directory / name, Tokenizer(), block_tokens=64, shard_tokens=2000)
        sizes = rng.integers(5, 60, tokens // 32)
        writer.add([(1 + rng.integers(0, 255, size) ** 2 // 255).tolist() for size in sizes], source_bytes=tokens)
        writer.finish("random documents", "none", {})


class Harness:
    """Launches below one folder; `environment` is what they see, `number` the signal that they get."""

    def __init__(
        self,
        folder: pathlib.Path,
        environment: Mapping[str, str],
        cache: pathlib.Path,
        seed: int,
        number: signal.Signals = signal.SIGKILL,
    ):
        self.number = number
        self.folder = folder
        self.environment = {**environment, "JAX_PLATFORMS": "cpu"}
        self.cache = cache
        self.random = random.Random(seed)
        write_data(folder / "data")
        self.expected = self._run_to_the_end("untouched", asynchronous=True)
        begin = time.monotonic()
        assert self._run_to_the_end("again", asynchronous=False) == self.expected
        self.seconds = time.monotonic() - begin  # of a whole run, compiled before

    def command(self, name: str, asynchronous: bool) -> list[str]:
        keys = KEYS | {
            "run_name": name,
            "base_output_directory": self.folder,
            "grain_train_files": self.folder / "data/train",
            "grain_eval_files": self.folder / "data/heldout",
            "jax_cache_dir": self.cache,
            "async_checkpointing": str(asynchronous).lower(),
        }
        words = [f"{key}={value}" for key, value in keys.items()]
        return [sys.executable, str(ROOT / "MaxText/train.py"), str(ROOT / "configs/validate_10m.yml"), *words]

    def run_with_kills(self, name: str, kills: int) -> list[Kill]:
        """Kills the run so many times, or fewer if it is complete before; then lets it end.

        Raises:
            AssertionError: it could not go on, or did not end as the untouched run.
        """
        done = []
        while len(done) < kills:
            killed = self._kill_once(name, asynchronous=self.random.random() < 0.5)
            if killed is None:
                break
            done.append(killed)
        assert self._run_to_the_end(name, asynchronous=True) == self.expected, f"{name} is not the same run"
        return done

    def _kill_once(self, name: str, asynchronous: bool) -> Kill | None:
        """Launches, and kills at a random instant; None where the run was complete first."""
        command = self.command(name, asynchronous)
        process = subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, text=True, cwd="/")
        assert process.stdout is not None
        # Most instants would be before the first step: three in four are after some steps, however long those take.
        wait_for = self.random.randint(1, 3 * PERIOD) if self.random.random() < 0.75 else 0
        after = self.random.uniform(0, (0.1 if wait_for else 0.6) * self.seconds)
        lines: list[str] = []
        struck: list[tuple[str, float]] = []  # the phase, and when

        def strike() -> None:
            struck.append((self._phase(name, lines), time.monotonic()))
            process.send_signal(self.number)

        timer = threading.Timer(after, strike)
        if not wait_for:
            timer.start()
        for line in process.stdout:
            lines.append(line)
            if STEP.match(line):
                wait_for -= 1
                if not wait_for:
                    timer.start()
        code = process.wait()
        ended = time.monotonic()
        timer.cancel()
        process.stdout.close()
        last = f"checkpoints/{KEYS['steps']}\n"  # of a complete run; one that SIGTERM stopped has another
        if code == 0 or any(line.startswith("Checkpoint: ") and line.endswith(last) for line in lines):
            return None
        expected = -signal.SIGKILL if self.number == signal.SIGKILL else preemption.EXIT_RESUME
        assert code == expected, f"{code}\n{''.join(lines)}"
        steps = _steps(lines)
        resumed = next((int(line.split()[3].replace(",", "")) for line in lines if line.startswith("Resuming")), None)
        ((phase, since),) = struck
        return Kill(phase, ended - since, asynchronous, resumed, steps[-1] if steps else resumed or 0)

    def _phase(self, name: str, lines: list[str]) -> str:
        if not lines:
            return "starting"
        steps = _steps(lines)
        if not steps:
            return "compiling"
        if list((self.folder / name / "checkpoints").glob(".*")):
            return "saving"
        evaluated = any(line.startswith(f"Completed eval after train step {steps[-1]},") for line in lines)
        return "step" if steps[-1] % KEYS["eval_interval"] or evaluated else "evaluating"

    def _run_to_the_end(self, name: str, asynchronous: bool) -> str:
        """Lets a run end; the sha256 of its last state, and of what it logged."""
        command = self.command(name, asynchronous)
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=600, cwd="/")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return state_sha256(self.folder / name / f"checkpoints/{KEYS['steps']}") + losses_sha256(self.folder / name)


def _steps(lines: list[str]) -> list[int]:
    """Those that were reported, in order."""
    return [int(match[1]) for match in map(STEP.match, lines) if match]


def state_sha256(step: pathlib.Path) -> str:
    """Of every array of a checkpoint, with its name."""
    import orbax.checkpoint as ocp
    from jax import tree_util

    path = (step / "state").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        as_numpy = tree_util.tree_map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    digest = hashlib.sha256()
    for name, array in tree_util.tree_leaves_with_path(state):
        digest.update(str(name).encode() + np.asarray(array).tobytes())
    return digest.hexdigest()


def losses_sha256(run: pathlib.Path) -> str:
    """Of the losses that were logged."""
    return hashlib.sha256(json.dumps(sorted(group.losses(run).items())).encode()).hexdigest()


def lost_steps(kills: list[Kill]) -> list[tuple[Kill, int]]:
    """The steps that were lost by each kill of a run after which a launch came far enough to say where it goes on."""
    found = []
    for index, kill in enumerate(kills):
        after = next((later.resumed for later in kills[index + 1 :] if later.resumed is not None), None)
        if after is not None:
            found.append((kill, max(kill.reached - after, 0)))
    return found


def main() -> int:
    """Kills as often as asked, and says what became of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signal", choices=("kill", "term"), default="kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    begin = time.monotonic()
    kills: list[Kill] = []
    lost: dict[bool, list[int]] = {True: [], False: []}
    number = {"kill": signal.SIGKILL, "term": signal.SIGTERM}[arguments.signal]
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(pathlib.Path(folder), os.environ, pathlib.Path(folder) / "jax", arguments.seed, number)
        runs = 0
        while len(kills) < arguments.kills:
            runs += 1
            done = harness.run_with_kills(f"run{runs}", arguments.kills - len(kills))
            for kill, steps in lost_steps(done):
                lost[kill.asynchronous].append(steps)
            kills += done
            print(f"run {runs}: {len(kills)} kills so far; the sha256 of the untouched run", flush=True)
    result = {
        "signal": number.name,
        "kills": len(kills),
        "phases": dict(collections.Counter(kill.phase for kill in kills)),
        "runs": runs,
        "unrecoverable": 0,
        "runs_with_the_untouched_sha256": runs,
        "save_interval_steps": PERIOD,
        "most_steps_lost_saving_in_the_foreground": max(lost[False], default=0),
        "most_steps_lost_saving_in_the_background": max(lost[True], default=0),
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - begin),
        "date": time.strftime("%Y-%m-%d"),
    }
    if number == signal.SIGTERM:
        ends = [kill.seconds for kill in kills]
        result["seconds_to_the_exit"] = {f"p{p}": round(float(np.percentile(ends, p)), 2) for p in (50, 99)}
    print(json.dumps(result))
    if arguments.write:
        name = "kill_9" if number == signal.SIGKILL else "sigterm"
        with (ROOT / f"benchmarks/results/{name}.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
