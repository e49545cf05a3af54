"""Draws the loss curve of one or more runs from their metrics.jsonl.

.venv/bin/python benchmarks/plot_metrics.py outputs/validate_10m --output docs/images/validate_10m.png
"""

import argparse
import json
import pathlib


def read(run: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    """Metric name -> (step, value) in order; of a step reported twice, after a resume, the last."""
    series: dict[str, dict[int, float]] = {}
    for line in (run / "metrics" / "metrics.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that a full disk or a kill cut short
        for name, value in record.items():
            series.setdefault(name, {})[record["step"]] = value
    return {name: sorted(points.items()) for name, points in series.items()}


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="run directories")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("loss.png"), help="picture to write")
    arguments = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    for run in arguments.runs:
        series = read(run)
        (line,) = axes.plot(*zip(*series["learning/loss"], strict=True), lw=1, alpha=0.8, label=f"{run.name}: training")
        if "eval/avg_loss" in series:
            points = tuple(zip(*series["eval/avg_loss"], strict=True))
            axes.plot(*points, "o-", ms=4, color=line.get_color(), mec="black", label=f"{run.name}: held-out")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
