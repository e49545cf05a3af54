"""Differential attention: the difference of two softmax attentions over the same values, one of them weighed.

In: queries for both maps, keys for each or one for both, values of any width. Out: one context for each pair of heads,
subtracted in float32. On TPUs one kernel computes both maps; elsewhere each is an attention of its own.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from MaxText.kernels.attention import attention, chip, serving
from MaxText.kernels.attention_cached import CachedRows


def differential_attention(
    query: Float[Array, "B T 2 N H"],
    key: Float[Array, "B S C K H"],
    value: Float[Array, "B S K W"],
    weight: Float[Array, "B T N"],
    segment_ids: Int[Array, "B T"] | CachedRows,
    *,
    implementation: str,
    batch_axes: tuple[str, ...],
    head_axis: str,
) -> Float[Array, "B T N W"]:
    """(softmax(Q1 K1) - weight * softmax(Q2 K2)) V, causal and within each document.

    Args:
        key: C = 2: one for each map; C = 1: one for both.
        weight: lambda, float32; the others are as for `attention`.

    Source: Ye et al. 2024, arXiv:2410.05258, equation 1.
    """
    axes = {"batch_axes": batch_axes, "head_axis": head_axis}
    if isinstance(segment_ids, CachedRows) and key.shape[2] == 1:  # both maps read the cache at once
        batch, length, _, heads, head_dim = query.shape
        both = jnp.moveaxis(query, 2, 3).reshape(batch, length, 2 * heads, head_dim)
        context = attention(both, key[:, :, 0], value, segment_ids, implementation=implementation, **axes)
        pairs = context.reshape(batch, length, heads, 2, -1).astype(jnp.float32)
        return (pairs[..., 0, :] - weight[..., None] * pairs[..., 1, :]).astype(query.dtype)
    shape = (query.shape[1], 2, key.shape[2], query.shape[-1], value.shape[-1])
    if not isinstance(segment_ids, CachedRows) and serving(implementation, shape, query.dtype.name) == "flash":
        from MaxText.kernels.attention_flash import differential_flash  # here: importing Pallas takes a quarter second

        return differential_flash(query, key, value, weight, segment_ids, **axes, chip=chip(), interpret=False)
    one, other = (
        attention(
            query[:, :, i], key[:, :, i % key.shape[2]], value, segment_ids, implementation=implementation, **axes
        )
        for i in (0, 1)
    )
    return (one.astype(jnp.float32) - weight[..., None] * other.astype(jnp.float32)).astype(query.dtype)
