"""Causal attention in blocks of queries: each block meets only the keys up to its end, and its weights are recomputed.

A plain-jnp implementation for machines without a fused kernel. Against the reference it skips a quarter of the scores,
and between forward and backward it keeps queries, keys and values instead of every layer's [T, S] weights.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_MASKED = -1e30
_NUM_BLOCKS = 2  # more skip more scores, but are smaller products and more kernels to compile


def attention_blocked(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K W"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T N W"]:
    """As `attention_reference`, to rounding.

    Source: blocks: Rabe & Staats 2021, arXiv:2112.05682; here without the running softmax, as whole rows fit.
    """
    length = query.shape[1]
    size = -(-length // _NUM_BLOCKS)
    blocks = [(start, min(start + size, length)) for start in range(0, length, size)]
    rows = [
        _block(query[:, start:end], key[:, :end], value[:, :end], segment_ids[:, start:end], segment_ids[:, :end])
        for start, end in blocks
    ]
    return jnp.concatenate(rows, axis=1)


@jax.checkpoint
def _block(query: Array, key: Array, value: Array, query_segments: Array, key_segments: Array) -> Array:
    """The last rows of causal attention: queries [B, t, N, H] that end where keys and values [B, S, K, H] end."""
    batch, rows, num_query_heads, head_dim = query.shape
    length, num_kv_heads = key.shape[1:3]
    group = num_query_heads // num_kv_heads
    # [B, K, t * G, H]: the heads that share keys become rows of one matrix.
    grouped = jnp.moveaxis((query * head_dim**-0.5).reshape(batch, rows, num_kv_heads, group, head_dim), 2, 1)
    grouped = grouped.reshape(batch, num_kv_heads, rows * group, head_dim)
    scores = jnp.einsum("bkqh,bskh->bkqs", grouped, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, num_kv_heads, rows, group, length)
    position = jnp.arange(length)
    seen = (position[None, None, :] <= position[None, length - rows :, None]) & (
        query_segments[:, :, None] == key_segments[:, None, :]
    )
    scores = jnp.where(seen[:, None, :, None, :], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype).reshape(batch, num_kv_heads, rows * group, length)
    context = jnp.einsum("bkqs,bskw->bkqw", weights, value)
    context = jnp.moveaxis(context.reshape(batch, num_kv_heads, rows, group, value.shape[-1]), 1, 2)
    return context.reshape(batch, rows, num_query_heads, value.shape[-1])
