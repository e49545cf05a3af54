"""Compares the trainer with its peers on one shape, interleaved: tokens/s, start to first step, peak memory.

In: systems, dtypes and rounds; the interpreters of peers that have their own environment (benchmarks/peers/README.md).
Out: a JSON line per run, then one per system with its medians and its ratios to the others. Every system is a process
timed from outside, by the arrival of its `completed step` lines: one that dispatches ahead misstates its own seconds.
"""

import argparse
import collections
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"
TOKENS_PER_STEP = 8 * 512
DROPPED_STEPS = 2  # the first steps compile and fill caches
SYSTEMS = ["ours", "ours_warm", "hand_written", "maxtext", "torch", "torch_compile"]  # ours_warm follows ours
MEASURES = [
    "tokens_per_second",
    "best_tokens_per_second",
    "processor_seconds_per_step",  # on a shared machine the steadiest of these: it moves least with the load
    "first_step_seconds",
    "peak_rss_gb",
]
COMPLETED = re.compile(r"completed step: \d+, .*?\bloss: ([\d.]+|nan|inf)")
VERSIONS = "import importlib.metadata as m, json; print(json.dumps({p: m.version(p) for p in %r}))"
MAXTEXT_SETTINGS = {
    "dataset_type": "synthetic", "enable_checkpointing": False, "hardware": "cpu", "attention": "dot_product",
    "skip_jax_distributed_system": True, "base_emb_dim": 256, "base_num_query_heads": 4, "base_num_kv_heads": 1,
    "base_mlp_dim": 1024, "base_num_decoder_layers": 6, "head_dim": 64, "vocab_size": 49152, "max_target_length": 512,
    "logits_via_embedding": True, "normalize_embedding_logits": False, "decoder_block": "llama2",
    "per_device_batch_size": 8, "enable_goodput_recording": False, "monitor_goodput": False,
}  # fmt: skip


def ours_command(args, dtype, run_directory, cache_directory):
    """The trainer's command; its tokens are synthetic, like those of the peers."""
    settings = {
        "steps": args.steps, "dtype": dtype, "dataset_type": "synthetic", "run_name": "benchmark",
        "base_output_directory": run_directory, "jax_cache_dir": cache_directory, "enable_checkpointing": False,
        "enable_tensorboard": False, "eval_interval": -1, "log_period": 1,
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return [args.ours_python, "MaxText/train.py", "configs/validate_10m.yml", *overrides, *args.ours_args]


def maxtext_command(args, dtype, run_directory):
    """The command of MaxText's package: its defaults, at our shape."""
    find = "import importlib.util as u; print(u.find_spec('maxtext').submodule_search_locations[0])"
    package = subprocess.check_output([args.maxtext_python, "-c", find], text=True).strip()
    settings = MAXTEXT_SETTINGS | {
        "steps": args.steps, "dtype": dtype, "run_name": "benchmark", "base_output_directory": run_directory,
        "jax_cache_dir": run_directory / "jax_cache",  # its own default, ~/jax_cache, would be warm after one run
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return [args.maxtext_python, "-m", "maxtext.trainers.pre_train.train", f"{package}/configs/base.yml", *overrides]


def build_command(system, args, dtype, scratch, round_index):
    """The command line of one system, or None where its interpreter was not given."""
    run_directory = scratch / f"{system}_{round_index}"  # its own, so that nothing is resumed
    script = ["--steps", str(args.steps), "--dtype", dtype]
    match system:
        case "ours":  # compiles everything: nobody has used this cache directory
            return ours_command(args, dtype, run_directory, run_directory / "jax_cache")
        case "ours_warm":  # finds the programs that `ours` compiled in this round
            return ours_command(args, dtype, run_directory, scratch / f"ours_{round_index}" / "jax_cache")
        case "hand_written":
            return [args.ours_python, str(PEERS / "hand_written_jax.py"), *script]
        case "maxtext":
            return maxtext_command(args, dtype, run_directory) if args.maxtext_python else None
    compiled = ["--compile"] if system == "torch_compile" else []
    return [args.torch_python, str(PEERS / "torch_llama.py"), *script, *compiled] if args.torch_python else None


def read_processor_seconds(process):
    """What all threads of a process have used so far, user and system (Linux; 0 elsewhere)."""
    if not (stat := Path(f"/proc/{process.pid}/stat")).exists():
        return 0.0
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_steps(process, timeout_seconds):
    """Per step line: seconds since the start, processor seconds, loss; and the last lines of the output."""
    start = time.perf_counter()
    watchdog = threading.Timer(timeout_seconds, process.kill)
    watchdog.start()
    rows, tail = [], collections.deque(maxlen=5)
    try:
        for line in process.stdout:
            tail.append(line.rstrip())
            if match := COMPLETED.search(line):
                rows.append((time.perf_counter() - start, read_processor_seconds(process), float(match[1])))
    finally:
        watchdog.cancel()
    return rows, list(tail)


def run_once(command, timeout_seconds):
    """Runs one process to its end; returns its speed, its time to the first step and what it used."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **output)
    try:
        rows, tail = read_steps(process, timeout_seconds)
    except BaseException:
        process.kill()
        raise
    _, status, usage = os.wait4(process.pid, 0)  # not process.wait(): the peak memory of this child alone
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or len(rows) <= DROPPED_STEPS:
        return {"error": f"exit code {process.returncode} after {len(rows)} steps", "output": tail}
    arrivals, used, losses = zip(*rows[DROPPED_STEPS - 1 :], strict=True)
    seconds = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    return {
        "tokens_per_second": round(TOKENS_PER_STEP / statistics.median(seconds), 1),
        "best_tokens_per_second": round(TOKENS_PER_STEP / min(seconds), 1),
        "processor_seconds_per_step": round((used[-1] - used[0]) / len(seconds), 2),
        "first_step_seconds": round(rows[0][0], 2),
        "peak_rss_gb": round(usage.ru_maxrss * 1024 / 1e9, 3),
        "losses": [rows[0][2], losses[-1]],
    }


def summarize(system, medians):
    """One system's medians over its rounds; for ours, also divided by those of every peer."""
    peers = [peer for peer in medians if not peer.startswith("ours") and system.startswith("ours")]
    ratios = {peer: {key: round(medians[system][key] / medians[peer][key], 3) for key in MEASURES} for peer in peers}
    return medians[system] | ({"ratios": ratios} if ratios else {})


def compare(args, dtype, scratch, report):
    """Runs every system `rounds` times, in turn, and reports each run and the summaries."""
    runs = {}
    for round_index in range(args.rounds):
        for system in args.systems:
            command = build_command(system, args, dtype, scratch, round_index)
            if command is None:
                if round_index == 0:
                    report({"system": system, "dtype": dtype, "skipped": "the interpreter that has it was not given"})
                continue
            load = os.getloadavg()[0]
            result = run_once(command, args.timeout_seconds)
            report({"system": system, "dtype": dtype, "round": round_index, "load_before": round(load, 2), **result})
            if "error" not in result:
                runs.setdefault(system, []).append(result)
    medians = {
        system: {key: round(statistics.median(run[key] for run in results), 3) for key in MEASURES}
        for system, results in runs.items()
    }
    for system, results in runs.items():
        report({"summary": system, "dtype": dtype, "rounds": len(results), **summarize(system, medians)})


def describe_machine(args):
    """Date, machine and the versions each interpreter has."""
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "cpu": platform.processor(),
    }
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        result["cpu"] = re.search(r"model name\s*: (.*)|$", cpuinfo.read_text())[1]
    interpreters = {"ours": (args.ours_python, ["jax", "jaxlib", "flax", "optax"])}
    if args.maxtext_python:
        interpreters["maxtext"] = (args.maxtext_python, ["maxtext", "jax", "jaxlib", "flax"])
    if args.torch_python:
        interpreters["torch"] = (args.torch_python, ["torch", "transformers"])
    for name, (python, packages) in interpreters.items():
        result[name] = json.loads(subprocess.check_output([python, "-c", VERSIONS % packages]))
    return result


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS[:4], help="default: %(default)s")
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3, help="times every system runs, in turn (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=10, help="of each run, the first two uncounted (default: %(default)s)"
    )
    parser.add_argument("--timeout-seconds", type=float, default=600, help="of one run (default: %(default)s)")
    parser.add_argument("--ours-python", default=str(ROOT / ".venv/bin/python"), help="default: the repository's .venv")
    parser.add_argument("--ours-args", nargs="*", default=[], help="more key=value settings for the trainer")
    parser.add_argument("--maxtext-python", help="interpreter that has MaxText; without it MaxText is skipped")
    parser.add_argument(
        "--torch-python", help="interpreter that has PyTorch and transformers; without it torch is skipped"
    )
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file too")
    args = parser.parse_args()
    if args.steps < DROPPED_STEPS + 2:
        parser.error(f"--steps {args.steps} leaves nothing to measure; use at least {DROPPED_STEPS + 2}")
    for python in filter(None, [args.ours_python, args.maxtext_python, args.torch_python]):
        if not shutil.which(python):
            parser.error(f"no interpreter at {python}; benchmarks/peers/README.md says how to install it")
    return args


def main():
    args = parse_arguments()

    def report(record):
        line = json.dumps(record)
        print(line, flush=True)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with args.output.open("a") as file:
                file.write(line + "\n")

    report(describe_machine(args))
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in args.dtype:
            compare(args, dtype, Path(scratch) / dtype, report)


if __name__ == "__main__":
    main()
