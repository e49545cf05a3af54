"""Causal attention by cuDNN's fused kernels for NVIDIA GPUs, run on each device's own rows and heads.

They skip what is above the diagonal and take values as wide as the keys, so wider values are taken in pieces. Documents
are kept apart by a mask of two bytes for each pair of positions of a row; JAX makes a gradient of it that nobody reads.
What the backward pass needs has no name to be kept by: a layer that is rematerialized runs the forward kernel again.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from MaxText.kernels.head_spec import head_spec


def attention_cudnn(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K W"],
    segment_ids: Int[Array, "B T"],
    *,
    batch_axes: tuple[str, ...],
    head_axis: str,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N W"]:
    """As `attention_reference`, on the current mesh.

    Args:
        implementation: `xla` is JAX's plain computation of the same, for machines without a GPU.
    """
    heads, kv_heads = (head_spec(x.shape[2], 2, batch_axes, head_axis) for x in (query, key))
    in_specs = (heads, kv_heads, kv_heads, PartitionSpec(batch_axes))
    local = functools.partial(_local, implementation=implementation)
    return jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=False)(query, key, value, segment_ids)


def _local(query, key, value, segment_ids, *, implementation):
    length, head_dim = query.shape[1], query.shape[-1]
    padding = ((0, 0), (0, length % 2))  # with a mask cuDNN takes even lengths only
    # Padding is a document of its own, so that no row of scores is empty.
    segments = jnp.pad(segment_ids, padding, constant_values=-1)
    same_document = (segments[:, :, None] == segments[:, None, :])[:, None]
    q, k, v = (jnp.pad(x, (*padding, (0, 0), (0, 0))) for x in (query, key, value))
    attend = functools.partial(
        jax.nn.dot_product_attention, q, k, mask=same_document, is_causal=True, implementation=implementation
    )
    pieces = [attend(v[..., i : i + head_dim]) for i in range(0, v.shape[-1], head_dim)]
    return jnp.concatenate(pieces, axis=-1)[:, :length]
