"""Exports a trained model as a directory for `transformers`: weights, configuration, tokenizer and a model card."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from MaxText import checkpointing, flops, hf_directory, job, metric_logger
from MaxText.inference import runs

USAGE = """usage: python MaxText/export_hf.py RUN OUT [dtype=float32|bfloat16] [key=value ...]

  RUN    a run directory (its newest checkpoint is exported) or one of its checkpoints
  OUT    the directory to write; it must not exist or be empty
  dtype  of the weights in the files; float32, the default, is exact
  key    of configs/base.yml, such as rope_factor=4 max_target_length=8192 for a longer context by YaRN"""
DTYPES = ("float32", "bfloat16")


def main(argv: list[str], emit: Callable[[str], None]) -> int:
    """The exit code: 0 exported, 2 the command is not understood.

    Raises:
        ValueError, OSError: the run cannot be read, cannot be exported, or OUT cannot be written.
    """
    if {"-h", "--help"} & set(argv):
        emit(USAGE)
        return 0
    dtypes = [word.removeprefix("dtype=") for word in argv if word.startswith("dtype=")] or ["float32"]
    settings = [word for word in argv if "=" in word and not word.startswith("dtype=")]
    paths = [word for word in argv if "=" not in word]
    if len(paths) != 2 or dtypes[-1] not in DTYPES:
        emit(f"error: cannot understand {' '.join(argv) or 'no arguments'}\n\n{USAGE}")
        return 2
    export(runs.find([paths[0], *settings]), Path(paths[1]).expanduser(), dtypes[-1], emit)
    return 0


def export(run: runs.TrainedRun, out: Path, dtype: str, emit: Callable[[str], None]) -> None:
    """Writes the model of the run's newest checkpoint, or of the one that was named, to `out`.

    Raises:
        ValueError, OSError: the run cannot be read or exported, or `out` is not empty.
    """
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; give a directory that does not exist yet")
    step = run.newest()
    config, info = run.config(step), run.info(step)
    state = job.make_job(config, jax.devices()[:1]).abstract_state
    params = jax.device_get(checkpointing.restore_params(run.step_directory(step), state, config.to_dict()))
    words = runs.load_tokenizer(run, step, config) if info["tokenizer"] else None
    hf_directory.write(out, config, params, dtype, None if words is None else words.eos_id)
    if words is not None:
        words.save(out)
    count = str(flops.count_parameters(params))
    (out / "README.md").write_text(model_card(run, step, config, count, dtype))
    size = sum(file.stat().st_size for file in out.iterdir())
    emit(f"Exported step {step:,} of {run.directory} to {out}: {size / 1e6:,.1f} MB, {dtype}")
    emit(f"Load it with transformers.AutoModelForCausalLM.from_pretrained({os.fspath(out)!r})")


def model_card(run: runs.TrainedRun, step: int, config: FrozenConfigDict, parameters: str, dtype: str) -> str:
    """What the model is, what it was trained on, and how good it is, with the numbers its run recorded."""
    info = run.info(step)
    saved = info["config"]
    last = _recorded(run.directory / "metrics" / "metrics.jsonl", step)

    def measured(name: str, unit: str) -> str:
        if name not in last:
            return "not measured"
        value, at = last[name]
        return f"{value:.4f} {unit}".strip() + ("" if at == step else f" (at step {at:,})")

    tokens = step * info["tokens_per_step"]
    rows = {
        "Architecture": hf_directory.ARCHITECTURES[config.attention_type][1],
        "Parameters": parameters,
        "Data": info["data"],
        "Steps": f"{step:,} of {saved['steps']:,}",
        "Tokens seen": f"{tokens:,} ({info['tokens_per_step']:,} a step, sequences of {saved['max_target_length']:,})",
        "Training loss": measured("learning/lm_loss", "nats per token"),
        "Held-out loss": measured("eval/avg_loss", "nats per token"),
        "Held-out bits per byte": measured("eval/bits_per_byte", ""),
        "Weights": f"{dtype} (trained with {saved['weight_dtype']} weights, {saved['dtype']} activations)",
        "Code": f"commit {info['git_commit']}, JAX {info['jax_version']}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    notes = ["A base model: it continues text, and follows no instructions. What it writes has not been checked."]
    if config.mtp_num_layers:
        notes.append(
            f"`{hf_directory.EXTRA}` has the multi-token prediction weights, for which the architecture has no place."
        )
    if not info["tokenizer"]:
        notes.append("It was trained on random tokens, so there is no tokenizer.")
    front = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [code, python]\n---"
    return "\n\n".join([f"{front}\n# {saved['run_name']}", f"| | |\n|---|---|\n{table}", *notes]) + "\n"


def _recorded(metrics: Path, step: int) -> dict[str, tuple[Any, int]]:
    """The newest value of every metric at or before the step, and at which step it was."""
    last: dict[str, tuple[Any, int]] = {}
    if metrics.is_file():
        for line in metrics.read_text().splitlines():
            record = metric_logger.read_record(line)
            if record.get("step", step + 1) <= step:
                last |= {name: (value, record["step"]) for name, value in record.items()}
    return last
