"""The scores of checkpoints as lines of JSON, in words, as a table and as a picture.

A record is {"run", "task", "step", "checkpoint", "tokens", "num_samples", "scores", "settings"}; of a score that has
one, `scores` holds the standard error under `<name>_standard_error`.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FILE, PICTURE = "scores.jsonl", "scores.png"
_ERROR = "_standard_error"
_LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")
# What a task is judged by, the first that there is.
_MAIN = ("pass@1", "exact_match", "bits_per_byte", "loss")
# Of the settings, those that a summary tells.
_TOLD = ("temperature", "top_p", "max_tokens", "eval_steps", "max_target_length", "rope_factor", "dtype")


def read(directory: Path) -> dict[int, dict[str, Any]]:
    """The records of a directory by step.

    Raises:
        ValueError: the file is damaged.
    """
    path = directory / FILE
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines]
        return {record["step"]: record for record in sorted(records, key=lambda record: record["step"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and it is made again from the samples") from error


def add(directory: Path, record: dict[str, Any]) -> None:
    """Adds a record, or puts it in the place of the step's old one."""
    records = read(directory) | {record["step"]: record}
    partial = directory / f".{FILE}.{os.getpid()}"
    partial.write_text("".join(json.dumps(records[step]) + "\n" for step in sorted(records)))
    partial.replace(directory / FILE)


def line(record: dict[str, Any]) -> str:
    """A record in words."""
    return f"checkpoint {record['step']:,} ({record['tokens'] / 1e6:,.1f}M tokens): {_scores(record)}"


def table(records: Iterable[dict[str, Any]]) -> str:
    """Records as a table for a terminal, and for Markdown."""
    rows = [("run", "task", "step", "tokens", "n", "scores")]
    for r in records:
        rows.append((r["run"], r["task"], f"{r['step']:,}", f"{r['tokens']:,}", str(r["num_samples"]), _scores(r)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def summary(run_directory: Path) -> list[str]:
    """All that was ever scored of a run and its branches, and the best checkpoint by each task and settings.

    Raises:
        ValueError: nothing was.
    """
    scored = (found for place in ("", "branches/*/") for found in run_directory.glob(f"{place}evaluation/*/{FILE}"))
    names = sorted({path.parent.name for path in scored})
    if not names:
        raise ValueError(f"no checkpoint of {run_directory} was scored yet: python MaxText/evaluate.py {run_directory}")
    lines = []
    for name in names:
        directory = run_directory / "evaluation" / name
        records = [*read(directory).values(), *of_branches(directory)]
        settings = records[0]["settings"]
        told = ", ".join(f"{key}={settings[key]}" for key in _TOLD if key in settings)
        picture = draw(directory, f"{run_directory.name}: {records[0]['task']}")
        lines += [f"{directory} ({told})", table(records), _best(records), picture, ""]
    return lines[:-1]


def of_branches(directory: Path) -> list[dict[str, Any]]:
    """What was scored of the run's branches by the task and settings of one directory of the run."""
    found = directory.parent.parent.glob(f"branches/*/evaluation/{directory.name}")
    return sorted((record for branch in found for record in read(branch).values()), key=_branch_point)


def _branch_point(record: dict[str, Any]) -> int:
    """The tokens that a branch's run had been trained on where the branch began; its name is <first>-<last step>."""
    return record["tokens"] // record["step"] * int(record["run"].split("-")[0])


def draw(directory: Path, title: str) -> str:
    """Draws the scores against tokens with error bars of one standard error; says where, or why not.

    Those of a branch stand above the tokens of the checkpoint that it decays from.
    """
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    own, branches = list(read(directory).values()), of_branches(directory)
    names = [name for name in (own or branches)[0]["scores"] if not name.endswith(_ERROR)]
    if "bits_per_byte" in names:
        names = ["bits_per_byte"]  # another scale than the loss, and the one to compare
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name in names:
        curves = (name, own, lambda record: record["tokens"]), (f"{name}, decayed", branches, _branch_point)
        for label, records, tokens in curves:
            having = [record for record in records if name in record["scores"]]
            errors = [record["scores"].get(name + _ERROR, 0.0) for record in having]
            points = [record["scores"][name] for record in having]
            if having:
                axes.errorbar(list(map(tokens, having)), points, errors, marker="o", capsize=3, label=label)
    axes.set(xlabel="tokens", ylabel="score", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    directory.mkdir(parents=True, exist_ok=True)
    figure.savefig(directory / PICTURE, dpi=120)
    pyplot.close(figure)
    return f"Picture: {directory / PICTURE}; scores: {directory / FILE}"


def _scores(record: dict[str, Any]) -> str:
    scores = record["scores"]
    percent = record["task"] != "heldout"
    told = []
    for name in (name for name in scores if not name.endswith(_ERROR)):
        error = scores.get(name + _ERROR)
        value = f"{100 * scores[name]:.2f}%" if percent else f"{scores[name]:.4f}"
        told.append(f"{name} {value}" + (f" ± {100 * error:.2f}" if error is not None and percent else ""))
    return ", ".join(told)


def _best(records: list[dict[str, Any]]) -> str:
    name = next(name for name in (*_MAIN, *records[0]["scores"]) if name in records[0]["scores"])
    choose = min if name in _LOWER_IS_BETTER else max
    best = choose(records, key=lambda record: record["scores"].get(name, float("inf" if choose is min else "-inf")))
    others = [r for r in records if r is not best and name in r["scores"]]
    error = best["scores"].get(name + _ERROR, 0.0)
    near = [_name(r) for r in others if error and abs(r["scores"][name] - best["scores"][name]) <= error]
    note = f"; within one standard error: {', '.join(near)}" if near else ""
    return f"best by {name}: checkpoint {_name(best)}{note}"


def _name(record: dict[str, Any]) -> str:
    return f"{record['step']} of {record['run']}"
