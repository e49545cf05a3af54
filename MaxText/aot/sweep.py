"""Compiles a config in many variants and ranks those that fit by estimated speed: `sweep=` of train_compile.py.

Every variant is a process of its own, because the compiler ends the process on some errors. Its report is kept in the
run directory, so that a sweep that was interrupted goes on where it was. Out: a table, a picture (SVG), the best keys.
"""

import html
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

AUTO = "auto"
_TRAIN_COMPILE = Path(__file__).resolve().parents[1] / "train_compile.py"
_SHOWN = 12  # lines of the table that a picture shows


def variants(config: FrozenConfigDict, devices: int) -> list[dict[str, str]]:
    """Every combination of the sweep's values, as overrides.

    Args:
        devices: of one slice; `auto` tries data and fsdp meshes over them.

    Raises:
        ValueError: the sweep is not written as key=value,value;key=value,value.
    """
    text = config.sweep
    if text == AUTO:
        rows = sorted({max(1, config.per_device_batch_size * times // 2) for times in (1, 2, 4)})
        text = f"remat_policy=none,minimal,attention,full;per_device_batch_size={','.join(map(str, rows))}"
        if devices > 1:
            text += f";ici_fsdp_parallelism=1,{devices}"
    axes: dict[str, list[str]] = {}
    for part in text.split(";"):
        key, equals, values = part.strip().partition("=")
        if not equals or key not in config or not all(values.split(",")):
            raise ValueError(
                f"sweep={config.sweep!r}: {part!r} is not KEY=VALUE,VALUE with a key of base.yml; such as "
                "sweep='remat_policy=minimal,full;per_device_batch_size=4,8', or sweep=auto"
            )
        axes[key] = values.split(",")
    if "ici_fsdp_parallelism" in axes and "ici_data_parallelism" not in axes:
        axes["ici_data_parallelism"] = ["-1"]  # takes what fsdp leaves
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def run(
    config: FrozenConfigDict, arguments: Sequence[str], folder: Path, devices: int, emit: Callable[[str], None]
) -> int:
    """Compiles what has no result yet, and prints the ranking; the exit code is 1 when no variant fits.

    Args:
        arguments: the command line of this run, which each variant's overrides are added to.
        folder: where the results are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    chosen = variants(config, devices)
    for number, overrides in enumerate(chosen, 1):
        words = [f"{key}={value}" for key, value in overrides.items()]
        path = folder / f"{'+'.join(words).replace('/', '_')}.json"
        if path.exists():
            found = json.loads(path.read_text())
        else:
            emit(f"{number} of {len(chosen)}: {' '.join(words)}")
            found = _compiled(arguments, overrides)
            if found.get("exit_code", 0) >= 0:
                _keep(path, found)
        results.append((overrides, found))
    ranking = rank(results)
    for line in table(ranking):
        emit(line)
    picture = folder / "sweep.svg"
    picture.write_text(draw(ranking[:_SHOWN]))
    emit(f"Picture: {picture}; results are kept in {folder}, and a deleted one is compiled again")
    if not fits(ranking[0][1]):
        return 1
    emit("The best, ready to paste: " + " ".join(f"{key}={value}" for key, value in ranking[0][0].items()))
    return 0


def _keep(path: Path, found: dict[str, Any]) -> None:
    """Writes a result, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(path)


def _compiled(arguments: Sequence[str], overrides: dict[str, str]) -> dict[str, Any]:
    """The report of one variant, or why there is none; a negative exit code is that of a process that was killed."""
    words = {"sweep": "", "compiled_trainstep_file": "", **overrides}
    kept = [argument for argument in arguments if argument.partition("=")[0] not in words]
    command = [sys.executable, str(_TRAIN_COMPILE), *kept, *(f"{key}={value}" for key, value in words.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    marker = "The same as JSON: "
    for line in done.stdout.splitlines():
        if line.startswith(marker):
            return json.loads(Path(line.removeprefix(marker)).read_text())
    lines = done.stderr.splitlines()
    begin = next((index for index, line in enumerate(lines) if "error" in line.lower()), 0)
    said = " ".join(lines[begin : begin + 3])[:500]
    if done.returncode < 0:
        said = f"ended by signal {-done.returncode}, to be tried again: {said}"
    return {"error": said or f"the compiler ended with code {done.returncode}", "exit_code": done.returncode}


def fits(found: dict[str, Any]) -> bool:
    """Whether a variant could be compiled and fits into memory."""
    return "error" not in found and found["memory"]["fits"]


def rank(results: list[tuple[dict[str, str], dict[str, Any]]]) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """Fastest first; those that do not fit, or could not be compiled, last."""

    def order(result: tuple[dict[str, str], dict[str, Any]]) -> tuple[bool, float]:
        found = result[1]
        return not fits(found), -found.get("estimated_tokens_per_second_per_device", 0.0)

    return sorted(results, key=order)


def table(ranking: list[tuple[dict[str, str], dict[str, Any]]]) -> list[str]:
    """The ranking in lines of text; every speed is an estimate."""
    lines = [f"{'est. tokens/s/device':>20} {'est. MFU':>8} {'peak GiB':>8}  variant"]
    for overrides, found in ranking:
        words = " ".join(f"{key}={value}" for key, value in overrides.items())
        if "estimated_mfu" not in found:
            why = found.get("error") or f"does not fit: {found['memory']['refused']}"
            lines.append(f"{'-':>20} {'-':>8} {'-':>8}  {words}: {why}")
            continue
        speed = f"{found['estimated_tokens_per_second_per_device']:,.0f}" if fits(found) else "does not fit"
        memory = found["memory"]["peak"] / 2**30
        lines.append(f"{speed:>20} {found['estimated_mfu']:>8.1%} {memory:>8.2f}  {words}")
    return lines


def draw(ranking: list[tuple[dict[str, str], dict[str, Any]]]) -> str:
    """The ranking as an SVG picture: one bar for each variant that fits."""
    bars = [(overrides, found) for overrides, found in ranking if fits(found)]
    fastest = max((found["estimated_tokens_per_second_per_device"] for _, found in bars), default=1.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{30 * len(bars) + 30}" font-family="sans-serif" '
        'font-size="13"><text x="8" y="18">Estimated tokens/s per device, and memory at the peak</text>'
    ]
    for number, (overrides, found) in enumerate(bars):
        speed, y = found["estimated_tokens_per_second_per_device"], 30 * number + 30
        words = html.escape(" ".join(f"{key}={value}" for key, value in overrides.items()))
        parts.append(
            f'<rect x="8" y="{y}" width="{880 * speed / fastest:.0f}" height="22" fill="#9ec5fe"/>'
            f'<text x="14" y="{y + 16}">{speed:,.0f}, {found["memory"]["peak"] / 2**30:.1f} GiB: {words}</text>'
        )
    return "".join(parts) + "</svg>\n"
