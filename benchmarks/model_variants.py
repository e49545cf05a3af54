"""Trains variants of configs/pythonlm_tiny.yml with several seeds each, and compares what they have learned.

.venv/bin/python benchmarks/model_variants.py --output docs/experiments/attention_and_mtp

Every variant has the same number of parameters to within 0.1%, made so by the width of its feed-forward layers. A run
that is complete is not repeated, so the command may be stopped and given again. Out: a table, JSON lines and a picture.
"""

import argparse
import datetime
import json
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
VARIANTS = {
    "standard": {"attention_type": "standard"},
    "differential (V1)": {"attention_type": "differential"},
    "differential V2": {"attention_type": "differential_v2", "base_mlp_dim": 444},
    "V1 without MTP": {"attention_type": "differential", "mtp_num_layers": 0, "base_mlp_dim": 534},
}
COLORS = dict(zip(VARIANTS, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True))


def records(run: pathlib.Path) -> list[dict]:
    """The lines of the run's metrics.jsonl; none where it has not begun."""
    file = run / "metrics" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def train(name: str, seed: int, steps: int, directory: pathlib.Path) -> pathlib.Path:
    """The directory of the finished run."""
    run_name = f"{name.replace(' ', '_').replace('(', '').replace(')', '')}-{seed}"
    run = directory / run_name
    if any(record["step"] == steps and "eval/avg_loss" in record for record in records(run)):
        return run
    keys = VARIANTS[name] | {
        "run_name": run_name,
        "base_output_directory": directory,
        "steps": steps,
        "init_weights_seed": seed,
        "data_shuffle_seed": seed,
        "eval_interval": steps // 6,
        "enable_tensorboard": "false",
    }
    command = [sys.executable, str(ROOT / "MaxText/train.py"), str(ROOT / "configs/pythonlm_tiny.yml")]
    subprocess.run([*command, *(f"{key}={value}" for key, value in keys.items())], check=True)
    return run


def result(name: str, seed: int, run: pathlib.Path) -> dict:
    """What one run has come to."""
    lines = records(run)
    evaluations = [record for record in lines if "eval/avg_loss" in record]
    last = evaluations[-1]
    info = json.loads((run / "environment.json").read_text())
    return {
        "variant": name,
        "seed": seed,
        "steps": last["step"],
        "heldout_loss": last["eval/avg_loss"],
        "bits_per_byte": last["eval/bits_per_byte"],
        "mtp_acceptance_percent": last.get("eval/avg_mtp_acceptance_rate_percent"),
        "heldout_curve": [[record["step"], record["eval/avg_loss"]] for record in evaluations],
        "commit": info["git_commit"],
        "jax": info["jax_version"],
        "date": datetime.date.today().isoformat(),
    }


def table(results: list[dict]) -> str:
    """The results of the variants, mean and sample standard deviation over the seeds, as Markdown."""
    lines = ["| variant | held-out loss, nats | bits per byte | second tokens accepted |", "|---|---|---|---|"]
    for name in VARIANTS:
        ours = [result for result in results if result["variant"] == name]
        cells = [name]
        for key, digits in (("heldout_loss", 4), ("bits_per_byte", 4), ("mtp_acceptance_percent", 1)):
            values = [result[key] for result in ours if result[key] is not None]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}" if values else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(results: list[dict], file: pathlib.Path) -> None:
    """Held-out loss against steps: a thin line for each seed, the mean in bold; and how far each is from standard."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), dpi=120, layout="constrained")
    for name, color in COLORS.items():
        curves = [result["heldout_curve"] for result in results if result["variant"] == name]
        for curve in curves:
            left.plot(*zip(*curve, strict=True), color=color, lw=0.6, alpha=0.6)
        steps = [point[0] for point in curves[0]]
        means = [statistics.mean(curve[i][1] for curve in curves) for i in range(len(steps))]
        left.plot(steps, means, color=color, lw=2, label=name)
    left.set(xlabel="step", ylabel="held-out loss, nats per token", title="Held-out loss")
    left.legend()
    base = {result["seed"]: result["heldout_loss"] for result in results if result["variant"] == "standard"}
    for place, (name, color) in enumerate(COLORS.items()):
        gaps = [result["heldout_loss"] - base[result["seed"]] for result in results if result["variant"] == name]
        right.plot([place] * len(gaps), gaps, "o", color=color)
        right.plot([place - 0.2, place + 0.2], [statistics.mean(gaps)] * 2, color=color, lw=2)
    right.axhline(0, color="gray", lw=0.8)
    right.set_xticks(range(len(COLORS)), list(COLORS), rotation=15)
    right.set(ylabel="nats from standard, same seed", title="At the last step: one point a seed")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(file)


def main() -> None:
    """Runs what is missing, then writes OUTPUT.jsonl and OUTPUT.png, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "outputs" / "variants", help="where the runs go")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="path without an ending")
    arguments = parser.parse_args()
    results = [
        result(name, seed, train(name, seed, arguments.steps, arguments.runs.absolute()))
        for seed in range(arguments.seeds)
        for name in VARIANTS
    ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    picture(results, arguments.output.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    main()
