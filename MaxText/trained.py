"""A trained model opened for reading: config, weights and tokenizer, from a run directory or one of its checkpoints.

Everything comes from what the run saved, so nothing has to be said twice. The weights go to whatever devices are given.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from MaxText import checkpoint_manifest, checkpointing, config_files, config_rules, job, pyconfig
from MaxText.models import AbstractModel

# What a run was trained on says nothing of where its weights are read: neither its devices nor its data need be here.
_READING = dict(zip(config_rules.MESH_KEYS, (-1, 1, 1), strict=True)) | {"dataset_type": "synthetic"}


@dataclasses.dataclass(frozen=True)
class Trained:
    """Weights with all that is needed to use them.

    Attributes:
        config: of the run, but with the mesh of the devices it was opened on, and without its data.
        directory: the checkpoint's step directory.
        tokenizer_path: what tokenizer.load takes; empty where the run had no text.
        info: what was saved beside the weights: resolved config, commit, versions.
    """

    config: FrozenConfigDict
    model: AbstractModel
    mesh: jax.sharding.Mesh
    params: Any
    step: int
    directory: Path
    tokenizer_path: str
    info: dict[str, Any]


def step_directories(path: Path) -> list[Path]:
    """The checkpoints under a run directory, the newest first; a step directory is its own only one.

    Raises:
        FileNotFoundError: there are none.
    """
    path = path.expanduser()
    if (path / "state").is_dir():
        return [path]
    for directory in (path / "checkpoints", path):
        steps = checkpoint_manifest.steps_in(directory)
        if steps:
            return [directory / str(step) for step in steps]
    raise FileNotFoundError(
        f"{path}: no checkpoint there; give a run directory, such as outputs/validate_10m, or one of its checkpoints, "
        "such as outputs/validate_10m/checkpoints/500"
    )


def load(path: Path, devices: Sequence[jax.Device], overrides: Mapping[str, Any]) -> Trained:
    """The model of a step directory, or of the newest one in a run directory, on these devices.

    Args:
        overrides: config keys to change, such as rope_factor, the mesh, or the run's own dataset_type to read its data.

    Raises:
        FileNotFoundError, OSError: there is no checkpoint, or it cannot be read.
        pyconfig.ConfigError: the config with the overrides cannot be.
    """
    directory = step_directories(path)[0]
    info = checkpointing.read_info(directory)
    defaults = {key.name: key.default for key in config_files.manual().values()}
    known = {key: value for key, value in info["config"].items() if key in defaults}
    config = FrozenConfigDict(pyconfig.checked_values(defaults | known | _READING | dict(overrides)))
    opened = job.make_job(config, devices)
    params = checkpointing.restore_params(directory, opened.abstract_state, config.to_dict())
    return Trained(
        config=config,
        model=opened.model,
        mesh=opened.mesh,
        params=params,
        step=int(directory.name),
        directory=directory,
        tokenizer_path=_tokenizer_path(directory, info),
        info=info,
    )


def _tokenizer_path(directory: Path, info: Mapping[str, Any]) -> str:
    """The copy in the run's directory where there is one, else what the run was given."""
    copy = directory.parent.parent / "tokenizer"
    models = sorted(copy.glob("*.model"))
    if models and not (copy / "tokenizer.json").is_file():
        return str(models[0])
    return str(copy) if copy.is_dir() else str(info.get("tokenizer", ""))
