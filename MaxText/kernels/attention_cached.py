"""Attention of a few new queries to a cache of keys and values, in plain jnp: what generation is made of.

Every row of the batch is one text. Its queries stand in the cache from `first` on, so that rows of different lengths
go together; what lies behind a query is never seen, and so need not be cleared.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CachedRows:
    """Stands where segment ids stand without a cache: where in its row's cache each row's first query is."""

    first: Int[Array, "B"]


def attention_cached(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K W"],
    rows: CachedRows,
) -> Float[Array, "B T N W"]:
    """As `attention_reference`, where query t of a row sees its cache up to and with place first + t."""
    batch, length, num_query_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    group = num_query_heads // num_kv_heads
    # [B, K, T * G, H]: the heads that share keys become rows of one matrix.
    grouped = jnp.moveaxis(query.reshape(batch, length, num_kv_heads, group, head_dim), 2, 1)
    grouped = grouped.reshape(batch, num_kv_heads, length * group, head_dim)
    keys, values = jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2)
    scores = jnp.einsum("bkqh,bksh->bkqs", grouped, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
    last_seen = rows.first[:, None] + jnp.arange(length)[None]
    seen = jnp.arange(key.shape[1])[None, None, :] <= jnp.repeat(last_seen, group, axis=1)[:, :, None]
    scores = jnp.where(seen[:, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    context = jnp.einsum("bkqs,bksw->bkqw", weights, values)
    context = jnp.moveaxis(context.reshape(batch, num_kv_heads, length, group, value.shape[-1]), 1, 2)
    return context.reshape(batch, length, num_query_heads, value.shape[-1])
