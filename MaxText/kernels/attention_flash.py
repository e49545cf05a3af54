"""Standard and differential attention by the kernels of `flash`, run on each device's own rows and heads.

Lengths that the blocks do not divide are padded here. How large the blocks are stands in `flash_blocks`. A length whose
keys and values do not fit into VMEM is refused in words.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from MaxText.kernels import flash, flash_blocks
from MaxText.kernels.head_spec import head_spec

_LOG2_E = 1.4426950408889634


def attention_flash(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K W"],
    segment_ids: Int[Array, "B T"],
    *,
    batch_axes: tuple[str, ...],
    head_axis: str,
    chip: str,
    interpret: bool,
) -> Float[Array, "B T N W"]:
    """As `attention_reference`, on the current mesh.

    Args:
        chip: the devices' kind, as JAX calls it.
        interpret: run the kernel's logic without a TPU; slow.

    Raises:
        ValueError: too long.
    """
    arrays = (query[:, :, None], key[:, :, None], value, None, segment_ids)
    return _sharded(*arrays, batch_axes=batch_axes, head_axis=head_axis, chip=chip, interpret=interpret)


def differential_flash(
    query: Float[Array, "B T 2 N H"],
    key: Float[Array, "B T C K H"],
    value: Float[Array, "B T K W"],
    weight: Float[Array, "B T N"],
    segment_ids: Int[Array, "B T"],
    *,
    batch_axes: tuple[str, ...],
    head_axis: str,
    chip: str,
    interpret: bool,
) -> Float[Array, "B T N W"]:
    """As `differential_attention`, on the current mesh; the other arguments are those of `attention_flash`."""
    arrays = (query, key, value, weight, segment_ids)
    return _sharded(*arrays, batch_axes=batch_axes, head_axis=head_axis, chip=chip, interpret=interpret)


def _sharded(query, key, value, weight, segment_ids, *, batch_axes, head_axis, chip, interpret):
    length, num_maps, head_dim = query.shape[1], query.shape[2], query.shape[-1]
    shape = (length, num_maps, key.shape[2], head_dim, value.shape[-1])
    plan = flash_blocks.plan(chip, *shape, query.dtype.name, interpret)
    spec = functools.partial(head_spec, batch_axes=batch_axes, head_axis=head_axis)
    num_heads, num_kv_heads = query.shape[3], value.shape[2]
    by_head = spec(num_heads, 2)  # of the weight and of the result
    in_specs = (spec(num_heads, 3), spec(num_kv_heads, 3), spec(num_kv_heads, 2), by_head, PartitionSpec(batch_axes))
    local = functools.partial(_local, plan=plan)
    mapped = jax.shard_map(local, in_specs=in_specs, out_specs=by_head, check_vma=False)
    return mapped(query, key, value, weight, segment_ids)


def _local(query, key, value, weight, segment_ids, *, plan):
    length, head_dim = query.shape[1], query.shape[-1]
    padding = -length % max(plan.forward.query, plan.backward.query)

    def padded(x, fill=0):
        return jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)), constant_values=fill)

    scaled = (query.astype(jnp.float32) * (head_dim**-0.5 * _LOG2_E)).astype(query.dtype)
    q = jnp.transpose(padded(scaled), (0, 3, 2, 1, 4))
    k = jnp.transpose(padded(key), (0, 3, 2, 1, 4))
    v = jnp.transpose(padded(value), (0, 2, 1, 3))
    if weight is not None:
        weight = jnp.transpose(padded(weight), (0, 2, 1))[:, :, None]
    # Padding is a document of its own, so that no query sees nothing.
    segments = padded(segment_ids, fill=-1)[:, None]
    return jnp.swapaxes(flash.flash(q, k, v, weight, segments, plan), 1, 2)[:, :length]
