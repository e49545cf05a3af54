"""A trained run, from its directory or its config: which checkpoints it has, and a model made from one of them.

Everything comes from what the checkpoint itself says it was made with; only what the command line gives is different.
Generation takes one device unless the command line gives a mesh, whatever the run was trained on.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from MaxText import checkpoint_manifest, checkpointing, config_files, config_rules, pyconfig, schedule_plan, sharding
from MaxText.inference import weights
from MaxText.inference.program import Program
from MaxText.inference.weights import Weights
from MaxText.input_pipeline import tokenizer
from MaxText.input_pipeline.token_blocks import file_sha256
from MaxText.train_state import TrainState

_MESH = dict.fromkeys((*config_rules.MESH_KEYS, *config_rules.SLICE_KEYS), "1")


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run directory, and what the command line wants to be different.

    Attributes:
        only_step: the one step that was named, if one was.
    """

    directory: Path
    overrides: Mapping[str, str]
    only_step: int | None

    def steps(self) -> list[int]:
        """Its checkpoints, the oldest first."""
        return checkpoint_manifest.steps_in(self.directory / "checkpoints")[::-1]

    def branches(self) -> "list[TrainedRun]":
        """The runs that decay from its checkpoints, by their first steps."""
        found = sorted(self.directory.glob("branches/[0-9]*-*/"), key=lambda path: int(path.name.split("-")[0]))
        return [TrainedRun(path, self.overrides, None) for path in found]

    def step_directory(self, step: int) -> Path:
        """Where a checkpoint lies."""
        return self.directory / "checkpoints" / str(step)

    def newest(self) -> int:
        """The step that was named, or the newest one.

        Raises:
            ValueError: there is none.
        """
        steps = self.steps()
        if self.only_step is not None:
            return self.only_step
        if not steps:
            raise ValueError(f"{self.directory} has no checkpoint yet; train first: python MaxText/train.py ...")
        return steps[-1]

    def info(self, step: int) -> dict[str, Any]:
        """What was saved beside the weights of a step."""
        return checkpointing.read_info(self.step_directory(step))

    def fingerprint(self, step: int) -> str:
        """The hash of a step's manifest, and so of every byte in it.

        Raises:
            OSError: it was never finished.
        """
        return file_sha256(self.step_directory(step) / checkpoint_manifest.NAME)

    def config(self, step: int, with_data: bool = False) -> FrozenConfigDict:
        """The config a step was made with, with the command line's changes.

        Args:
            with_data: whether the data that it names must be here.

        Raises:
            ConfigError: the result is no valid config.
        """
        known = config_files.manual().keys()
        saved = {key: _written(value) for key, value in self.info(step)["config"].items() if key in known}
        values = saved | _MESH | ({} if with_data else {"dataset_type": "synthetic"}) | dict(self.overrides)
        return pyconfig.initialize([str(config_files.BASE_PATH), *(f"{k}={v}" for k, v in values.items())], {})


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to write."""

    config: FrozenConfigDict
    program: Program
    weights: Weights
    tokenizer: tokenizer.Tokenizer
    step: int


def find(words: Sequence[str]) -> TrainedRun:
    """The run that the first word names: a run's directory, one of its checkpoints, or a config; the rest is key=value.

    Raises:
        ValueError: there is no such run.
        ConfigError: a config that cannot be, or words that are no settings.
    """
    if not words:
        raise ValueError("no run is given: its directory, one of its checkpoints, or a config")
    target, *rest = words
    settings = dict(word.split("=", 1) for word in rest if "=" in word)
    strange = [word for word in rest if "=" not in word]
    if strange or len(settings) < len(rest):
        raise ValueError(f"{' '.join(strange or rest)}: settings are written key=value, each once, after the run")
    path = Path(target).expanduser()
    if path.suffix in (".yml", ".yaml"):
        if (path.parent / "checkpoints").is_dir():
            return TrainedRun(path.parent, settings, None)
        names = ("run_name", "base_output_directory", "branch_decay_from")
        where = [f"{key}={settings.pop(key)}" for key in names if key in settings]
        return TrainedRun(schedule_plan.run_directory(pyconfig.initialize([target, *where], {})), settings, None)
    if path.name.isdecimal() and path.parent.name == "checkpoints" and path.is_dir():
        return TrainedRun(path.parent.parent, settings, int(path.name))
    if (path / "checkpoints").is_dir():
        return TrainedRun(path, settings, None)
    raise ValueError(
        f"{target} is no run: give a run's directory (it has a folder checkpoints), one of its checkpoints, or a config"
    )


def load(run: TrainedRun, step: int) -> LoadedModel:
    """The model of one checkpoint, on the mesh its config asks for.

    Raises:
        ValueError, OSError: the checkpoint cannot be read or does not fit the config; its tokenizer is not there.
    """
    config = run.config(step)
    vocabulary = load_tokenizer(run, step, config)
    precision = None if config.matmul_precision == "default" else config.matmul_precision
    jax.config.update("jax_default_matmul_precision", precision)
    sizes = [config[key] for key in config_rules.MESH_KEYS]
    mesh = sharding.make_mesh(sizes, devices_for(config))
    # Ids that the tokenizer has no token for are padding, too.
    padding = max(config.vocab_padding, config.vocab_size - vocabulary.vocab_size)
    narrowed = FrozenConfigDict(config.to_dict() | {"vocab_padding": padding})
    program = Program(narrowed, mesh, config.speculative_tokens)
    wanted = weights.abstract_params(config, program.model, mesh)
    with jax.set_mesh(mesh):
        state = TrainState(None, wanted, None)
        params = checkpointing.restore_params(run.step_directory(step), state, config.to_dict())
        return LoadedModel(narrowed, program, weights.unstacked(params), vocabulary, step)


def devices_for(config: FrozenConfigDict) -> list[jax.Device]:
    """As many devices as the config's mesh has; all of them where one of its sizes is -1.

    Raises:
        ConfigError: the mesh does not fit.
    """
    sizes = [config[key] for key in config_rules.MESH_KEYS]
    devices = jax.devices() if -1 in sizes else jax.devices()[: math.prod(sizes)]
    problems = config_rules.mesh_problems(config, len(devices))
    if problems:
        raise pyconfig.ConfigError(problems)
    return devices


def load_tokenizer(run: TrainedRun, step: int, config: FrozenConfigDict) -> tokenizer.Tokenizer:
    """The tokenizer the run was trained with.

    Raises:
        ValueError: it is not there any more, or there never was one.
    """
    kept = run.directory / "tokenizer"
    models = sorted(kept.glob("*.model")) if not (kept / "tokenizer.json").is_file() else []
    copy = str(models[0]) if models else str(kept) if kept.is_dir() else ""
    path = run.overrides.get("tokenizer_path", "") or copy or run.info(step).get("tokenizer", "")
    if not path:
        raise ValueError(
            f"the tokenizer of {run.directory} is not known: there is no {kept}, and the run had no text; "
            "give tokenizer_path=<directory or hub name>"
        )
    found = tokenizer.load(path)
    if found.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer {path} has {found.vocab_size} entries, the model {config.vocab_size}")
    return found


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
