"""Small configs, models and batches that the tests share."""

import pathlib

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from MaxText import models, pyconfig, sharding, train_state, train_step

ROOT = pathlib.Path(__file__).resolve().parent.parent

SMALL = {
    "run_name": "test",
    "base_emb_dim": 32,
    "base_num_decoder_layers": 2,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 1,
    "head_dim": 8,
    "base_mlp_dim": 64,
    "vocab_size": 128,
    "max_target_length": 16,
    "num_vocab_tiling": 4,
    "dtype": "float32",
    "dataset_type": "synthetic",
    "sharding_tolerance": 1.0,
    "steps": 20,
    "warmup_steps_fraction": 0.1,
}


def shipped_config(path: pathlib.Path, *settings: str) -> FrozenConfigDict:
    """A file of configs/ with these settings, whether or not its data is on this machine."""
    return pyconfig.initialize([str(path), "run_name=test", "compile_topology=v5e-8", *settings], {})


def small_config(**overrides: object) -> FrozenConfigDict:
    """A float32 model of a few thousand parameters, checked like any config."""
    keys = SMALL | overrides
    return pyconfig.initialize([str(ROOT / "configs/base.yml"), *(f"{k}={v}" for k, v in keys.items())], {})


def initial_params(config: FrozenConfigDict, seed: int = 0):
    """A model's parameters, made by one program."""
    return jax.jit(lambda key: models.initial_params(config, key))(jax.random.key(seed))


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    """A mesh over the first CPU devices."""
    return sharding.make_mesh((data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


def packed_batch(config: FrozenConfigDict, rows: int, seed: int) -> dict[str, np.ndarray]:
    """Random tokens, small ids more often, in rows of up to three documents; the last row ends in padding."""
    rng = np.random.default_rng(seed)
    length = config.max_target_length
    tokens = (rng.random((rows, length + 1)) ** 3 * config.vocab_size).astype(np.int32)
    segments = np.ones((rows, length + 1), np.int32)
    for row, cuts in enumerate(np.sort(rng.integers(1, length, (rows, 2)))):
        segments[row, cuts[0] :] += 1
        segments[row, cuts[1] :] += 1
    segments[-1, length - 3 :] = 0
    same = segments[:, 1:] == segments[:, :-1]
    starts = np.maximum.accumulate(
        np.where(np.diff(segments, axis=1, prepend=-1) != 0, np.arange(length + 1), 0), axis=1
    )
    positions = np.arange(length + 1, dtype=np.int32) - starts.astype(np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "inputs_position": positions[:, :-1],
        "targets_position": positions[:, 1:],
        "inputs_segmentation": segments[:, :-1],
        "targets_segmentation": np.where(same, segments[:, 1:], 0).astype(np.int32),
    }


class Trainer:
    """A model and its step on a mesh, ready to be fed host batches."""

    def __init__(self, config: FrozenConfigDict, mesh: jax.sharding.Mesh):
        self.mesh = mesh
        self.model = models.abstract(config)
        self.abstract = train_state.abstract_train_state(config, self.model, mesh)
        self.step = train_step.make_train_step(config, self.model, self.abstract, mesh)
        with jax.set_mesh(mesh):
            self.state = train_state.initial_train_state(config, self.abstract)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, float]:
        """Takes one step; the metrics."""
        with jax.set_mesh(self.mesh):
            placed = jax.device_put(batch, sharding.batch_sharding(self.mesh))
            self.state, metrics = self.step(self.state, placed)
        return {name: float(value) for name, value in metrics.items()}
