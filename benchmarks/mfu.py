"""MFU of this machine's TPUs in one command, beside what the TPU compiler led us to expect.

.venv/bin/python benchmarks/mfu.py                        # on the machine: trains each case for 30 steps
.venv/bin/python benchmarks/mfu.py --estimate v5e-8       # on any machine: the estimates, by the compiler alone

Prints one JSON line a case, measured and expected, and adds it to a file if one is named. Tokens are synthetic, nothing
is saved, and the first ten steps do not count.
"""

import argparse
import datetime
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ESTIMATES = ROOT / "benchmarks" / "results" / "mfu_estimates.jsonl"
STEPS, DROPPED_STEPS = 30, 10
PYTHONLM, PYTHONLM_V5E_8 = "configs/pythonlm_1b.yml", "configs/pythonlm_1b_v5e8.yml"
STANDARD = (
    " attention_type=standard mtp_num_layers=0 dropout_rate=0.0 logits_via_embedding=true gradient_accumulation_steps=1"
)
CASES: dict[str, dict[str, str]] = {
    "v5e-8": {
        "validate_10m": "configs/validate_10m.yml",
        "standard 0.84B": PYTHONLM_V5E_8 + STANDARD,
        "pythonlm_1b": PYTHONLM_V5E_8,
    },
    "v6e-1": {
        "validate_10m": "configs/validate_10m.yml",
        "standard 0.84B": PYTHONLM + STANDARD,
        "pythonlm_1b": PYTHONLM,
    },
}
# What fits on one v6e is faster with its weights on all eight.
CASES["v6e-8"] = CASES["v6e-1"] | {"pythonlm_1b": PYTHONLM + " gradient_accumulation_steps=1"}
# PythonLM with the other kinds of attention, all else alike; V2 also with as many parameters as standard attention.
KINDS = {
    "standard": "attention_type=standard",
    "V2": "attention_type=differential_v2",
    "V2, equal parameters": "attention_type=differential_v2 base_mlp_dim=3584",
}
for of_topology in CASES.values():
    of_topology |= {f"pythonlm_1b {kind}": f"{of_topology['pythonlm_1b']} {keys}" for kind, keys in KINDS.items()}
COMPLETED = re.compile(r"completed step: (\d+), seconds: ([\d.]+), .*Tokens/s/device: ([\d.]+),.*?MFU: ([\d.]+)%")


def estimate(topology: str, case: str) -> dict[str, Any]:
    """What the compiler makes of a case: milliseconds a step, tokens/s per device, MFU, memory; estimates all."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*CASES[topology][case].split(), f"compile_topology={topology}", f"base_output_directory={folder}"]
        subprocess.run([sys.executable, "MaxText/train_compile.py", *words], cwd=ROOT, check=True, capture_output=True)
        found = json.loads(next(Path(folder).glob("*/compile/*.json")).read_text())
    return {
        "topology": topology,
        "case": case,
        "estimated_ms_per_step": round(1e3 * found["estimated_seconds"]["step"], 1),
        "estimated_tokens_per_second_per_device": round(found["estimated_tokens_per_second_per_device"]),
        "estimated_mfu_percent": round(100 * found["estimated_mfu"], 1),
        "estimated_peak_gib": round(found["memory"]["peak"] / 2**30, 2),
        "xla_options": found["flags"]["compiler_options"],
        "date": datetime.date.today().isoformat(),
    }


def measure(topology: str, case: str) -> dict[str, Any]:
    """What this machine does: medians over the steps that count.

    Raises:
        RuntimeError: training failed, or printed no MFU.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "steps": STEPS, "log_period": 1, "eval_interval": -1, "enable_checkpointing": "false",
            "enable_tensorboard": "false", "dataset_type": "synthetic", "run_name": "mfu",
            "base_output_directory": folder,
        }  # fmt: skip
        words = [*CASES[topology][case].split(), *(f"{key}={value}" for key, value in settings.items())]
        done = subprocess.run([sys.executable, "MaxText/train.py", *words], cwd=ROOT, capture_output=True, text=True)
    lines = [match for match in COMPLETED.finditer(done.stdout) if int(match[1]) > DROPPED_STEPS]
    if not lines:
        raise RuntimeError(f"{case} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    seconds, tokens, mfu = (statistics.median(float(line[i]) for line in lines) for i in (2, 3, 4))
    return {"measured_ms_per_step": 1e3 * seconds, "measured_tokens_per_second_per_device": tokens, "measured_mfu": mfu}


def this_machine() -> str:
    """The topology's name, such as v5e-8, asked of JAX in a process that then gives the devices back."""
    program = "import jax; print(len(jax.devices()), jax.devices()[0].device_kind, sep=chr(9))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    count, kind = done.stdout.splitlines()[-1].split("\t")
    family = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v6 lite": "v6e", "TPU v6e": "v6e"}.get(kind)
    if f"{family}-{count}" not in CASES:
        raise SystemExit(f"this machine has {count} x {kind}; the cases are for {', '.join(CASES)}")
    return f"{family}-{count}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimate", metavar="TOPOLOGY", choices=CASES, help="what to expect; needs no TPU")
    parser.add_argument("--case", help="only this one")
    parser.add_argument("--output", type=Path, help="JSON lines file to add the results to")
    arguments = parser.parse_args()
    topology = arguments.estimate or this_machine()
    expected = [json.loads(line) for line in ESTIMATES.read_text().splitlines()] if ESTIMATES.exists() else []
    for case in [arguments.case] if arguments.case else CASES[topology]:
        if arguments.estimate:
            result = estimate(topology, case)
        else:
            known = [row for row in expected if (row["topology"], row["case"]) == (topology, case)]
            result = {"topology": topology, "case": case, **(known[-1] if known else {}), **measure(topology, case)}
        print(json.dumps(result), flush=True)
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
