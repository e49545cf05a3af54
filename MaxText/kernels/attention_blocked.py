"""Causal attention in blocks of queries: each block meets only the keys up to its end.

A plain-jnp implementation for machines without a fused kernel. Against the reference it skips a quarter of the scores,
and of them it keeps for the backward pass one number a row. Its products have the form that is fast on CPU: both sides
in the inputs' dtype, the result float32, and of the large arrays the left side's last axis contracted.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from MaxText.kernels.attention_reference import RESIDUALS

_MASKED = -1e30
_NUM_BLOCKS = 2  # more skip more scores, but are smaller products and more kernels to compile


@jax.custom_vjp
def attention_blocked(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K W"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T N W"]:
    """As `attention_reference`, to rounding.

    Source: blocks: Rabe & Staats 2021, arXiv:2112.05682; here without the running softmax, as whole rows fit. Backward:
    Dao et al. 2022, arXiv:2205.14135, algorithm 4, without its loop over keys.
    """
    return _forward(query, key, value, segment_ids)[0]


def _forward(query, key, value, segment_ids):
    grouped = _grouped(query, key.shape[2]) * _scale(query)
    contexts, log_sums = [], []
    for start, end in _blocks(query.shape[1]):
        scores = _product("bkgth,bskh->bkgts", grouped[:, :, :, start:end], key[:, :end])
        scores += _bias(segment_ids, start, end)[:, None, None]
        maximum = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - maximum)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        contexts.append(_product("bkgts,bskw->bkgtw", weights.astype(value.dtype), value[:, :end]) / total)
        log_sums.append((maximum + jnp.log(total))[..., 0])
    context = _ungrouped(jnp.concatenate(contexts, axis=3)).astype(value.dtype)
    context, log_sums = (checkpoint_name(x, RESIDUALS) for x in (context, jnp.concatenate(log_sums, axis=3)))
    return context, (query, key, value, segment_ids, context, log_sums)


def _backward(residuals, d_context):
    query, key, value, segment_ids, context, log_sums = residuals
    num_kv_heads = key.shape[2]
    grouped, d_grouped = _grouped(query, num_kv_heads) * _scale(query), _grouped(d_context, num_kv_heads)
    d_sums = jnp.sum(d_context.astype(jnp.float32) * context.astype(jnp.float32), axis=-1, keepdims=True)
    d_sums = _grouped(d_sums, num_kv_heads)[..., 0]
    d_queries, d_key, d_value = [], 0, 0
    for start, end in _blocks(query.shape[1]):
        # Keys first: then every product but one contracts the last axis of weights or their derivatives as they lie.
        q, d_o = grouped[:, :, :, start:end], d_grouped[:, :, :, start:end]
        scores = _product("bskh,bkgth->bksgt", key[:, :end], q)
        scores += jnp.swapaxes(_bias(segment_ids, start, end), 1, 2)[:, None, :, None]
        weights = jnp.exp(scores - log_sums[:, :, None, :, start:end])
        d_weights = _product("bskw,bkgtw->bksgt", value[:, :end], d_o)
        d_scores = (weights * (d_weights - d_sums[:, :, None, :, start:end])).astype(query.dtype)
        d_queries.append(_product("bskh,bksgt->bkhgt", key[:, :end], d_scores) * _scale(query))
        rest = ((0, 0), (0, 0), (0, query.shape[1] - end), (0, 0))
        d_key += jnp.pad(_product("bksgt,bkgth->bksh", d_scores, q), rest)
        d_value += jnp.pad(_product("bksgt,bkgtw->bksw", weights.astype(value.dtype), d_o), rest)
    d_query = _ungrouped(jnp.moveaxis(jnp.concatenate(d_queries, axis=4), 2, 4)).astype(query.dtype)
    d_key, d_value = jnp.swapaxes(d_key, 1, 2).astype(key.dtype), jnp.swapaxes(d_value, 1, 2).astype(value.dtype)
    return d_query, d_key, d_value, None


attention_blocked.defvjp(_forward, _backward)


def _scale(query: Array) -> Float[Array, ""]:
    return jnp.asarray(query.shape[-1] ** -0.5, query.dtype)


def _product(equation: str, left: Array, right: Array) -> Float[Array, "..."]:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """The first row of each block of queries, and the one after its last."""
    size = -(-length // _NUM_BLOCKS)
    return ((start, min(start + size, length)) for start in range(0, length, size))


def _grouped(x: Float[Array, "B T N W"], num_kv_heads: int) -> Float[Array, "B K G T W"]:
    """The heads that share a key head side by side: their rows are those of one matrix."""
    batch, length, num_heads, width = x.shape
    return jnp.moveaxis(x.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, width), 1, 3)


def _ungrouped(x: Float[Array, "B K G T W"]) -> Float[Array, "B T N W"]:
    batch, num_kv_heads, group, length, width = x.shape
    return jnp.moveaxis(x, 3, 1).reshape(batch, length, num_kv_heads * group, width)


def _bias(segment_ids: Int[Array, "B T"], start: int, end: int) -> Float[Array, "B t S"]:
    """0 for the keys before `end` that a query from `start` sees, those of its document up to itself."""
    causal = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
    seen = causal[None] & (segment_ids[:, start:end, None] == segment_ids[:, None, :end])
    return jnp.where(seen, 0.0, _MASKED)
