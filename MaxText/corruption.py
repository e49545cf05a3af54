"""Silent corruption: a step taken twice must give the same bits, and so must all copies of the same weights.

Every device sums the bits of its own shards, so what is compared is a table of [devices, arrays] numbers; a difference
names the device. It needs room for a second state while it runs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from MaxText import sharding
from MaxText.train_state import TrainState


class Corrupted(ArithmeticError):
    """The hardware, or its memory, does not compute the same twice."""


class Checker:
    """Takes a step twice and compares; for one mesh and one kind of state."""

    def __init__(self, mesh: Mesh, abstract: TrainState):
        specs = jax.tree.map(lambda leaf: leaf.sharding.spec, abstract)
        every_device = PartitionSpec(mesh.axis_names)
        self._devices = [str(device) for device in mesh.devices.flatten()]
        self._names = [sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract)]
        self._copies = np.stack([_copies(leaf, mesh) for leaf in jax.tree.leaves(abstract)], axis=1)
        sums = jax.shard_map(_sums, mesh=mesh, in_specs=(specs,), out_specs=every_device, check_vma=False)
        self._sums = jax.jit(sums, out_shardings=sharding.replicated(mesh))
        self._copy = jax.jit(functools.partial(jax.tree.map, jnp.copy))

    def step(self, compiled: Any, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        """What compiled(state, batch) returns; the state is donated.

        Raises:
            Corrupted: the second time it returned something else, or copies of the weights differ.
        """
        other, _ = compiled(self._copy(state), batch)
        expected = np.asarray(self._sums(other))
        del other
        state, metrics = compiled(state, batch)
        found = np.asarray(self._sums(state))
        wrong = self._described(found != expected, "differ when the step is taken twice")
        wrong += self._described(found != found[self._copies, np.arange(found.shape[1])], "differ from their copies")
        if wrong:
            raise Corrupted("; ".join(wrong))
        return state, metrics

    def _described(self, different: np.ndarray, what: str) -> list[str]:
        devices = [self._devices[row] for row in sorted(set(np.nonzero(different)[0].tolist()))]
        arrays = [self._names[column] for column in sorted(set(np.nonzero(different)[1].tolist()))]
        if not arrays:
            return []
        return [f"on {', '.join(devices)} {len(arrays)} arrays {what}, such as {arrays[0]}"]


def _sums(state: TrainState) -> jax.Array:
    """uint32 [1, arrays]: of this device's shards, a sum that any single changed bit changes."""

    def one(x: jax.Array) -> jax.Array:
        width = 8 * x.dtype.itemsize
        return jnp.sum(jax.lax.bitcast_convert_type(x, f"uint{width}").astype(jnp.uint32), dtype=jnp.uint32)

    return jnp.stack([one(leaf) for leaf in jax.tree.leaves(state)])[None]


def _copies(leaf: Any, mesh: Mesh) -> np.ndarray:
    """int [devices]: for each device the first one that holds the same part of the array."""
    parts = leaf.sharding.devices_indices_map(leaf.shape)
    keys = [str(parts[device]) for device in mesh.devices.flatten()]
    return np.array([keys.index(key) for key in keys])
