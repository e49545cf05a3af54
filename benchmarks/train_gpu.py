"""On one NVIDIA GPU: the trainer beside PyTorch with the same model and batch, and real runs with their losses.

.venv/bin/python benchmarks/train_gpu.py --torch-python "$PEERS/torch/bin/python" --output gpu/

Each comparison alternates between the two programs. A JSON line a case: tokens/s of both and the ratio, MFU against the
bfloat16 rate measured on the card with products of 8,192 x 8,192, and the most memory that nvidia-smi saw in use. The
runs are validate_10m for 5,000 steps on this machine's Python files and pythonlm_1b for 200; their directories stay in
the output directory, for benchmarks/plot_metrics.py.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DROPPED_STEPS = 5
PYTHONLM = ["configs/pythonlm_1b.yml", "gradient_accumulation_steps=1"]
STANDARD = [*PYTHONLM, "attention_type=standard", "mtp_num_layers=0", "dropout_rate=0.0"]
CASES = {"validate_10m": ["configs/validate_10m.yml"], "pythonlm_1b": STANDARD}  # by the peer's name of the shape
RUNS = {
    "validate_10m": (["configs/validate_10m.yml"], 5000),
    "pythonlm_1b": (["configs/pythonlm_1b.yml", "dataset_type=embedded", "tokenizer_path="], 200),
}
COMPLETED = re.compile(r"completed step: \d+, .*?(?:TFLOP/s/device: ([\d.]+), )?Tokens/s/device: ([\d.]+)")
MATMUL = "from MaxText import hardware; print(hardware.measure_matmul_flops(['bfloat16'], {size}) / 1e12)"


@contextlib.contextmanager
def most_memory(found: dict[str, int]) -> Iterator[None]:
    """Notes the most MiB in use on the first GPU while entered; nothing where there is no nvidia-smi."""
    query = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            used = int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)
            found["mib"] = max(found.get("mib", 0), used)

    thread = threading.Thread(target=watch, daemon=True)
    if shutil.which("nvidia-smi"):
        thread.start()
    try:
        yield
    finally:
        done.set()


def measure(command: list[str]) -> dict[str, Any]:
    """Medians of a program's `completed step` lines, and its memory.

    Raises:
        RuntimeError: it failed, or took no step that counts.
    """
    memory: dict[str, int] = {}
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with most_memory(memory):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    steps = [match for match in COMPLETED.finditer(done.stdout)][DROPPED_STEPS:]
    if done.returncode or not steps:
        raise RuntimeError(f"{command} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    result = {"tokens_per_second": statistics.median(float(step[2]) for step in steps)}
    if steps[0][1]:
        result["tflops"] = statistics.median(float(step[1]) for step in steps)
    return result | ({"most_memory_mib": memory["mib"]} if memory else {})


def train_command(words: list[str], folder: Path, **keys: object) -> list[str]:
    """The trainer's, with what every case has in common."""
    common = {"run_name": "run", "base_output_directory": folder, "enable_tensorboard": "false"} | keys
    return [sys.executable, "MaxText/train.py", *words, *(f"{key}={value}" for key, value in common.items())]


def compare(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """The trainer and PyTorch in turns; the medians of the rounds, and their ratio."""
    keys = {"dataset_type": "synthetic", "enable_checkpointing": "false", "eval_interval": -1, "log_period": 1}
    commands = {"ours": train_command(CASES[shape], args.output / "compared", steps=args.steps, **keys)}
    if args.torch_python:
        script = [args.torch_python, "benchmarks/peers/torch_llama.py", "--compile", "--shape", shape]
        commands["torch_compile"] = [*script, "--steps", str(args.steps)]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            rounds[name].append(measure(command))
    medians = {
        name: {key: statistics.median(each[key] for each in results) for key in results[0]}
        for name, results in rounds.items()
    }
    record = {"case": shape, "steps": args.steps, "rounds": args.rounds, **medians}
    record["mfu_percent"] = 100 * medians["ours"]["tflops"] / args.measured_tflops
    if args.torch_python:
        record["ratio"] = medians["ours"]["tokens_per_second"] / medians["torch_compile"]["tokens_per_second"]
    return record


def train(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """A real run: its speed, and its first and last loss."""
    words, steps = RUNS[name]
    result = measure(train_command(words, args.output / name, steps=steps, eval_interval=min(500, steps)))
    lines = (args.output / name / "run/metrics/metrics.jsonl").read_text().splitlines()
    records = map(json.loads, lines)
    losses = [record["learning/loss"] for record in records if "learning/loss" in record]
    return {"run": name, "steps": steps, **result, "first_loss": losses[0], "last_loss": losses[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="interpreter with PyTorch for CUDA and transformers; none: no peer")
    parser.add_argument("--steps", type=int, default=30, help="of each compared program (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison (default %(default)s)")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="to compare (default all)")
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=list(RUNS), help="real runs (default all)")
    parser.add_argument("--output", type=Path, required=True, help="directory for results.jsonl and the runs' metrics")
    args = parser.parse_args()
    args.output = args.output.absolute()
    args.output.mkdir(parents=True, exist_ok=True)
    listed = ["nvidia-smi", "-L"]
    card = subprocess.run(listed, capture_output=True, text=True).stdout if shutil.which(listed[0]) else ""
    program = MATMUL.format(size=8192 if card else 1024)
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    args.measured_tflops = float(found.stdout)
    about = {"card": card.split(" (")[0], "jax": version("jax"), "measured_tflops": args.measured_tflops}
    about["date"] = datetime.date.today().isoformat()
    work = [*((compare, case) for case in args.cases), *((train, run) for run in args.runs)]
    for function, name in work:
        result = {**function(name, args), **about}
        print(json.dumps(result), flush=True)
        with (args.output / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
