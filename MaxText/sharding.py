"""The mesh, the one table of logical-axis rules, and everything derived from it.

A weight or activation names its logical axes; the rules map each name to mesh axes. A name that is unknown, a mesh axis
used twice by one array, or a size that does not divide is a ValueError, never silent replication. Axis types are Auto:
the constraints below steer the compiler's partitioner, they are not part of an array's type.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
VOCAB_AXIS = "tensor"
EMBED_AXIS = "fsdp"
HEAD_AXIS = "tensor"

# Logical axis -> mesh axes. None: replicated, on purpose.
RULES: dict[str, tuple[str, ...] | None] = {
    # weights
    "vocab": (VOCAB_AXIS,),
    "embed": (EMBED_AXIS,),
    "mlp": ("tensor",),
    "heads": (HEAD_AXIS,),
    "kv_heads": (HEAD_AXIS,),
    "pair": None,  # the two maps of differential attention stay together
    "one_kv_head": None,  # multi-query attention: a single head cannot be split, so every tensor shard has it
    "kv": None,
    "norm": None,
    "mtp_output": None,  # a small square weight, split over its input only
    "layers": None,
    # activations
    "activation_batch": BATCH_AXES,
    "activation_length": None,
    "activation_embed": None,
    "activation_mlp": ("tensor",),
    "activation_heads": (HEAD_AXIS,),
    "activation_kv_heads": (HEAD_AXIS,),
    "activation_pair": None,
    "activation_one_kv_head": None,
    "activation_kv": None,
    "activation_vocab": ("tensor",),
}


def kv_head_axis(num_kv_heads: int) -> str:
    """The logical axis of the key/value heads: a single one (multi-query) is replicated under tensor parallelism."""
    return "one_kv_head" if num_kv_heads == 1 else "kv_heads"


def mesh_shape(sizes: Sequence[int], num_devices: int) -> tuple[int, ...]:
    """The mesh's sizes with a -1 filled in.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    given = math.prod(size for size in sizes if size != -1)
    filled = tuple(num_devices // given if size == -1 else size for size in sizes)
    if math.prod(filled) != num_devices:
        named = ", ".join(f"ici_{axis}_parallelism={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise ValueError(
            f"{named} needs {math.prod(filled)} devices or a divisor of what there is, but there are {num_devices}; "
            "set one of them to -1 to fill the mesh"
        )
    return filled


def make_mesh(sizes: Sequence[int], devices: Sequence[jax.Device], slices: Sequence[int] = (1, 1, 1)) -> Mesh:
    """The device mesh data x fsdp x tensor; a size of -1 takes the devices that are left.

    Args:
        sizes: devices along each axis within a slice; JAX lays them along the slice's own wires.
        slices: slices along each axis. An axis has the product of both, and only its outer part crosses slices.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or `slices` to that of slices.
    """
    types = (AxisType.Auto,) * len(MESH_AXES)
    shape = mesh_shape(sizes, len(devices) // math.prod(slices))
    if num_slices(devices) == math.prod(slices) == 1:
        if 8 in shape and (ring := ring_of_eight(devices)):
            return Mesh(np.array(ring).reshape(shape), MESH_AXES, axis_types=types)
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    return Mesh(hybrid_devices(shape, slices, devices), MESH_AXES, axis_types=types)


def ring_of_eight(devices: Sequence[Any]) -> list[Any]:
    """The eight chips of a v5e or v6e 2x4 grid, each wired to the next and the last to the first; empty for others.

    JAX 0.10.2 puts them in the order of a 4x2 grid, in which four of the eight steps are no wires. Each half of the
    ring is one host where there are two.
    """
    grid: dict[tuple[int, ...], Any] = {tuple(getattr(device, "coords", ())[:2]): device for device in devices}
    edge = [(1, 1), (1, 0), (0, 0), (0, 1), (0, 2), (0, 3), (1, 3), (1, 2)]
    return [grid[place] for place in edge] if len(devices) == 8 and set(grid) == set(edge) else []


def num_slices(devices: Sequence[Any]) -> int:
    """TPU slices; where a platform has none, all devices are one."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def hybrid_devices(shape: Sequence[int], slices: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array whose outer parts are slices; where a platform has none, processes.

    Raises:
        ValueError: there is another number of slices.
    """
    from jax.experimental import mesh_utils

    by_process = devices[0].platform != "tpu" and num_slices(devices) == 1
    there = len({device.process_index for device in devices}) if by_process else num_slices(devices)
    if there != math.prod(slices):
        given = " x ".join(f"dcn_{axis}_parallelism={size}" for axis, size in zip(MESH_AXES, slices, strict=True))
        raise ValueError(
            f"{given} is {math.prod(slices)} slices, but there are {there} {'processes' if by_process else 'slices'}; "
            f"use dcn_data_parallelism={there} dcn_fsdp_parallelism=1"
        )
    return mesh_utils.create_hybrid_device_mesh(shape, slices, devices, process_is_granule=by_process)


def partition_spec(
    logical_axes: Sequence[str | None], shape: Sequence[int], axis_sizes: dict[str, int], path: str
) -> PartitionSpec:
    """The mesh axes of one array, by the rules.

    Args:
        logical_axes: one name, or None for a replicated dimension, for each dimension of `shape`.
        axis_sizes: mesh axis -> number of devices.
        path: what to call the array in an error.

    Raises:
        ValueError: an unknown name, a mesh axis used twice, or a dimension that does not divide.
    """
    if len(logical_axes) != len(shape):
        raise ValueError(f"{path}: {len(logical_axes)} logical axes {tuple(logical_axes)} for shape {tuple(shape)}")
    spec: list[Any] = []
    used: dict[str, str | None] = {}
    for name, size in zip(logical_axes, shape, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(f"{path}: unknown logical axis {name!r}; known are {', '.join(sorted(RULES))}")
        mesh_axes = (RULES[name] if name is not None else None) or ()
        for axis in mesh_axes:
            if axis in used:
                raise ValueError(f"{path}: logical axes {used[axis]!r} and {name!r} both lie on mesh axis {axis!r}")
            used[axis] = name
        parts = math.prod(axis_sizes[axis] for axis in mesh_axes)
        if size % parts:
            fits = [n for n in range(1, parts + 1) if size % n == 0]
            raise ValueError(
                f"{path}: dimension {name!r} of shape {tuple(shape)} has size {size}, which "
                f"{'x'.join(mesh_axes)}={parts} does not divide; use one of {fits}"
            )
        spec.append(mesh_axes[0] if len(mesh_axes) == 1 else (mesh_axes or None))
    return PartitionSpec(*spec)


def shard(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """x, constrained to lie on the current mesh as the rules say. The only function that applies a constraint.

    Raises:
        ValueError: there is no current mesh (`with jax.set_mesh(mesh):`), or the rules do not fit x.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError("shard() needs a current mesh: wrap the call in `with jax.set_mesh(mesh):`")
    spec = partition_spec(logical_axes, x.shape, dict(mesh.shape), "activation")
    return jax.lax.with_sharding_constraint(x, spec)


def named_sharding(mesh: Mesh, logical_axes: Any, shapes: Any) -> Any:
    """A tree of NamedSharding for a nested dict of logical-axis tuples and the matching tree of shapes."""

    def one(path: tuple[Any, ...], leaf: Any, axes: tuple[str | None, ...]) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(axes, leaf.shape, dict(mesh.shape), path_name(path)))

    return jax.tree_util.tree_map_with_path(one, shapes, logical_axes)


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path in dots: decoder.layers.mlp.wi_0.kernel."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value every device has."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a [B, T] batch: rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, None))


def replicated_share(shapes: Any, shardings: Any) -> float:
    """The share of all elements that every device holds although the mesh could have split them."""
    leaves = list(zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True))
    total = sum(math.prod(leaf.shape) for leaf, _ in leaves)
    whole = sum(math.prod(leaf.shape) for leaf, sharding in leaves if sharding.is_fully_replicated)
    return whole / max(total, 1)
