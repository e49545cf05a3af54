"""Scores a run's checkpoints on a task, and remembers: under {run}/evaluation/<task>-<digest of the settings>/.

There `<step>.jsonl` holds every sample of a checkpoint, `scores.jsonl` one line for each checkpoint, `scores.png` the
scores against tokens. Whatever is there already is not made again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from MaxText import checkpointing, job
from MaxText.evaluation import grading, held_out, humaneval, infilling, mbpp, sandbox, score_report
from MaxText.inference import generate, runs
from MaxText.input_pipeline import embedded, loader
from MaxText.input_pipeline.token_blocks import TokenBlockReader
from MaxText.input_pipeline.tokenizer import Tokenizer

Log = Callable[[str], None]
CONTEXT_CHARACTERS = 1500  # of the text on each side of a gap
CALLS_OF_ROWS = 8  # prompts asked for at once, in batches of rows: few idle rows at the end, much to resume from
# What decides the scores besides the task and the checkpoint.
SETTINGS = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "sampling_seed", "max_target_length", "rope_factor")
SETTINGS += ("dtype", "matmul_precision")


def evaluate(run: runs.TrainedRun, log: Log) -> list[dict[str, Any]]:
    """The scores of the checkpoints that the config names, the oldest first; see `score_report` for a record.

    Raises:
        ValueError, OSError: no such checkpoint, task or sandbox; results that are damaged.
    """
    newest = run.newest()
    config = run.config(newest)
    if config.task in ("heldout", *infilling.MAX_LINES):
        config = run.config(newest, with_data=True)
    steps = chosen_steps(run, config.checkpoints)
    log(f"{run.directory}: {config.task} of {len(steps)} checkpoints: {', '.join(map(str, steps))}")
    if config.task == "heldout":
        directory = _directory(run, "heldout", {"eval_steps": config.eval_steps, "dtype": config.dtype})
        score = _held_out_score
    else:
        directory = _directory(run, config.task, {key: config[key] for key in SETTINGS} | _task_settings(config))
        log(decontamination(run.info(newest)["config"]))
        score = _Sampled(run, config, directory, log)
    for step in steps:
        known = score_report.read(directory).get(step)
        if known is not None and known["num_samples"] >= (0 if config.task == "heldout" else config.num_samples):
            log(f"checkpoint {step}: scored before")
        else:
            scores = score(run, step, log)
            score_report.add(directory, _record(run, step, config, scores))
        log(score_report.line(score_report.read(directory)[step]))
    log(score_report.draw(directory, f"{run.directory.name}: {config.task}"))
    records = score_report.read(directory)
    return [records[step] for step in steps]


def chosen_steps(run: runs.TrainedRun, wanted: str) -> list[int]:
    """The checkpoints that `wanted` means: last, all, epochs or a number.

    Raises:
        ValueError: there are none.
    """
    there = run.steps()
    if run.only_step is not None:
        return [run.only_step]
    if wanted in ("last", "all"):
        return [run.newest()] if wanted == "last" else there
    if wanted == "epochs":
        ends = set(run.info(run.newest()).get("epoch_ends", ()))
        steps = [step for step in there if step in ends]
        if not steps:
            raise ValueError(
                f"{run.directory} has no checkpoint at the end of an epoch; train with checkpoint_every_epoch=true, or "
                f"use checkpoints=all for {there}"
            )
        return steps
    if int(wanted) not in there:
        raise ValueError(f"{run.directory} has no checkpoint {wanted}; there are {', '.join(map(str, there))}")
    return [int(wanted)]


def make_task(config: FrozenConfigDict, tokenizer: Tokenizer) -> grading.Task:
    """The task that the config names."""
    if config.task == "humaneval":
        return humaneval.load(config.task_file)
    if config.task == "mbpp":
        return mbpp.load(config.task_file)
    texts = held_out_texts(config, tokenizer)
    lines = infilling.MAX_LINES[config.task]
    return infilling.build(texts, config.infilling_problems, lines, CONTEXT_CHARACTERS, config.sampling_seed)


def held_out_texts(config: FrozenConfigDict, tokenizer: Tokenizer) -> list[str]:
    """The documents of the run's held-out data.

    Raises:
        ValueError: it has none that is text.
    """
    directory: Path | str = config.grain_eval_files
    if config.dataset_type == "embedded":
        cache = Path(config.data_cache_directory).expanduser()
        corpus = embedded.prepare(cache, config.embedded_corpus_bytes, config.vocab_size, config.tokenizer_path, print)
        directory = corpus.heldout
    if not directory:
        raise ValueError("task=infilling needs held-out text: give grain_eval_files=<directory with a manifest.json>")
    reader = TokenBlockReader(directory, config.vocab_size)
    if reader.manifest.tokenizer["sha256"] != tokenizer.fingerprint:
        raise ValueError(f"{directory} was made with another tokenizer than the run's, {tokenizer.name}")
    texts = []
    for index, shard in enumerate(reader.manifest.shards):
        document: list[int] = []
        for token in memoryview(reader.read(index, 0, shard.tokens)).cast("H" if reader.dtype.itemsize == 2 else "I"):
            if token == reader.manifest.eos_id:
                texts.append(tokenizer.decode(document))
                document = []
            else:
                document.append(token)
    return texts


def decontamination(saved: Mapping[str, Any]) -> str:
    """Whether the training data was cleaned of the benchmarks, as far as its manifest tells."""
    path = Path(saved["grain_train_files"]) / "manifest.json"
    if saved["dataset_type"] != "grain" or not path.is_file():
        return "decontamination: the training data was not compared with any benchmark"
    dropped = json.loads(path.read_text()).get("dropped", {})
    found = {reason: count for reason, count in dropped.items() if "contamin" in reason or "benchmark" in reason}
    if not found:
        return "decontamination: the training data's manifest says nothing of benchmarks"
    return "decontamination: " + ", ".join(f"{reason} {count:,}" for reason, count in found.items())


class _Sampled:
    """Scores checkpoints by completions that are graded; the sandbox is chosen once."""

    def __init__(self, run: runs.TrainedRun, config: FrozenConfigDict, directory: Path, log: Log):
        self._config, self._directory = config, directory
        self._task = make_task(config, runs.load_tokenizer(run, run.newest(), config))
        self._tier = sandbox.strongest(config.allow_unsafe_sandbox, log)

    def __call__(self, run: runs.TrainedRun, step: int, log: Log) -> dict[str, float]:
        config, task = self._config, self._task
        loaded = runs.load(run, step)
        batcher = generate.make_batcher(loaded, config.decode_rows)
        make = generate.Generator(batcher, config, task.stop)
        settings = {"run": run.directory.name, "step": step} | {key: config[key] for key in SETTINGS}
        path, samples, seed = self._directory / f"{step}.jsonl", config.num_samples, config.sampling_seed
        with sandbox.Sandbox(self._tier, sandbox.STANDARD_LIMITS, workers=sandbox_workers()) as box:
            per_call = config.decode_rows * CALLS_OF_ROWS
            scores = grading.evaluate(task, make, box, path, samples, seed, per_call, settings, log)
        if make.num_cut:
            log(f"{make.num_cut:,} samples had prompts longer than the context; of them only the end was read")
        return scores


def sandbox_workers() -> int:
    """As many as there are cores, less one for the model."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - 1)


def _held_out_score(run: runs.TrainedRun, step: int, log: Log) -> dict[str, float]:
    config = run.config(step, with_data=True)
    made = job.make_job(config, runs.devices_for(config))
    data = loader.open_datasets(config, log)
    if data.evaluation is None:
        raise ValueError("task=heldout needs held-out data: give grain_eval_files=<directory with a manifest.json>")
    measure = held_out.HeldOut(config, made.mesh, made.model, made.abstract_state, data)
    with jax.set_mesh(made.mesh):
        params = checkpointing.restore_params(run.step_directory(step), made.abstract_state, config.to_dict())
        measured = measure(params)
    names = {"eval/avg_loss": "loss", "eval/avg_perplexity": "perplexity", "eval/bits_per_byte": "bits_per_byte"}
    return {name: measured[key] for key, name in names.items() if key in measured}


def _task_settings(config: FrozenConfigDict) -> dict[str, Any]:
    if config.task not in infilling.MAX_LINES:
        return {}
    return {"problems": config.infilling_problems, "max_lines": infilling.MAX_LINES[config.task]}


def _directory(run: runs.TrainedRun, name: str, settings: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    directory = run.directory / "evaluation" / f"{name}-{digest}"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    return directory


def _record(run: runs.TrainedRun, step: int, config: FrozenConfigDict, scores: dict[str, float]) -> dict[str, Any]:
    tokens = step * run.info(step)["tokens_per_step"]
    return {
        "run": run.directory.name,
        "task": config.task,
        "step": step,
        "tokens": tokens,
        "num_samples": 0 if config.task == "heldout" else config.num_samples,
        "scores": scores,
        "settings": {key: config[key] for key in SETTINGS},
    }
