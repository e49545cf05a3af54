"""Scores a run's checkpoints on a task, and remembers: under {run}/evaluation/<task>-<digest of the settings>/.

There `<step>.jsonl` holds every sample of a checkpoint, `scores.jsonl` one line for each checkpoint, `scores.png` the
scores against tokens. Whatever is there already is not made again. The digest is of all that decides a score: the
settings and the data; a record names the checkpoint's own hash.
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
from MaxText.input_pipeline.token_blocks import MANIFEST, TokenBlockReader
from MaxText.input_pipeline.token_dataset import parse_mixture
from MaxText.input_pipeline.tokenizer import Tokenizer, num_token_ids

Log = Callable[[str], None]
CONTEXT_CHARACTERS = 1500  # of the text on each side of a gap
CALLS_OF_ROWS = 8  # prompts asked for at once, in batches of rows: few idle rows at the end, much to resume from
# What a manifest calls the problems of a task that data may have been compared with.
BENCHMARKS = {"humaneval": "HumanEval", "mbpp": "MBPP"}
# What decides the scores besides the data and the checkpoint.
_MODEL_SETTINGS = ("max_target_length", "rope_factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
_MODEL_SETTINGS += ("dtype", "matmul_precision")
SAMPLING_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "sampling_seed", *_MODEL_SETTINGS)
SAMPLING_SETTINGS += ("decode_rows", "speculative_tokens")  # which round otherwise in bfloat16
HELD_OUT_SETTINGS = ("eval_steps", *_MODEL_SETTINGS)


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
    if config.task in BENCHMARKS:
        log(decontamination(run.info(newest)["config"], BENCHMARKS[config.task]))
    score = (_HeldOut if config.task == "heldout" else _Sampled)(run, config, log)
    directory = _directory(run, config.task, score.settings)
    for step in steps:
        known, checkpoint = score_report.read(directory).get(step), run.fingerprint(step)
        if known is not None and known["checkpoint"] == checkpoint and known["num_samples"] >= score.num_samples:
            log(f"checkpoint {step}: scored before")
        else:
            record = {
                "run": run.directory.name,
                "task": config.task,
                "step": step,
                "checkpoint": checkpoint,
                "tokens": step * run.info(step)["tokens_per_step"],
                "num_samples": score.num_samples,
                "scores": score(step, directory),
                "settings": score.settings,
            }
            score_report.add(directory, record)
        log(score_report.line(score_report.read(directory)[step]))
    log(score_report.draw(directory, f"{run.directory.name}: {config.task}"))
    records = score_report.read(directory)
    return [records[step] for step in steps]


def evaluate_branches(run: runs.TrainedRun, log: Log) -> None:
    """Scores the checkpoints of all the run's decay branches, with results in the directory of each.

    Raises:
        ValueError, OSError: there is no branch; as `evaluate`.
    """
    branches = run.branches()
    if not branches:
        raise ValueError(f"{run.directory} has no branches; train some with branch_decay_from=<step>, for each a run")
    for branch in branches:
        evaluate(branch, log)


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
        directory = embedded.prepare(**loader.embedded_settings(config), log=print).heldout
    if not directory:
        raise ValueError("task=infilling needs held-out text: give grain_eval_files=<directory with a manifest.json>")
    reader = TokenBlockReader(directory, num_token_ids(config))
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


def decontamination(saved: Mapping[str, Any], benchmark: str) -> str:
    """Whether the training data was cleaned of the benchmark, as far as its manifests tell."""
    if saved["dataset_type"] != "grain":
        return f"decontamination: the training data was not compared with {benchmark}"
    told = []
    for directory, _ in parse_mixture(saved["grain_train_files"]):
        path = Path(directory).expanduser() / MANIFEST
        compared = json.loads(path.read_text())["preparation"].get("benchmarks", {}) if path.is_file() else {}
        found = f"{compared[benchmark]:,} documents left out" if benchmark in compared else "not known to be compared"
        told.append(f"{directory} with {benchmark}: {found}")
    return f"decontamination: {'; '.join(told)}"


class _Sampled:
    """Scores checkpoints by completions that are graded; the sandbox is chosen once."""

    def __init__(self, run: runs.TrainedRun, config: FrozenConfigDict, log: Log):
        self._run, self._config, self._log = run, config, log
        self._task = make_task(config, runs.load_tokenizer(run, run.newest(), config))
        self._tier = sandbox.strongest(config.allow_unsafe_sandbox, log)
        self._sampling = {key: config[key] for key in SAMPLING_SETTINGS}
        self.settings = self._sampling | self._task.description
        self.num_samples = config.num_samples

    def __call__(self, step: int, directory: Path) -> dict[str, float]:
        config, task, run = self._config, self._task, self._run
        loaded = runs.load(run, step)
        batcher = generate.make_batcher(loaded, config.decode_rows)
        make = generate.Generator(batcher, config, task.stop)
        named = {"run": run.directory.name, "step": step, "checkpoint": run.fingerprint(step)}
        path, samples, seed = directory / f"{step}.jsonl", config.num_samples, config.sampling_seed
        with sandbox.Sandbox(self._tier, sandbox.STANDARD_LIMITS, workers=sandbox_workers()) as box:
            per_call, settings = config.decode_rows * CALLS_OF_ROWS, named | self._sampling
            scores = grading.evaluate(task, make, box, path, samples, seed, per_call, settings, self._log)
        if make.num_cut:
            self._log(f"{make.num_cut:,} samples had prompts longer than the context; of them only the end was read")
        return scores


def sandbox_workers() -> int:
    """As many as there are cores, less one for the model."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - 1)


class _HeldOut:
    """Scores checkpoints by their loss on the held-out data, which is opened once."""

    num_samples = 0

    def __init__(self, run: runs.TrainedRun, config: FrozenConfigDict, log: Log):
        self._run, self._job = run, job.make_job(config, runs.devices_for(config))
        data = loader.open_datasets(config, log)
        if data.evaluation is None:
            raise ValueError("task=heldout needs held-out data: give grain_eval_files=<directory with a manifest.json>")
        rows = config.eval_per_device_batch_size * self._job.mesh.size
        self.settings = {key: config[key] for key in HELD_OUT_SETTINGS} | {"rows": rows}
        self.settings["data"] = data.evaluation.identity
        self._measure = held_out.HeldOut(config, self._job.mesh, self._job.model, self._job.abstract_state, data)

    def __call__(self, step: int, _: Path) -> dict[str, float]:
        config, state = self._job.config, self._job.abstract_state
        with jax.set_mesh(self._job.mesh):
            params = checkpointing.restore_params(self._run.step_directory(step), state, config.to_dict())
            measured = self._measure(params)
        names = {"eval/avg_loss": "loss", "eval/avg_perplexity": "perplexity", "eval/bits_per_byte": "bits_per_byte"}
        return {name: measured[key] for key, name in names.items() if key in measured}


def _directory(run: runs.TrainedRun, name: str, settings: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    directory = run.directory / "evaluation" / f"{name}-{digest}"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    return directory
