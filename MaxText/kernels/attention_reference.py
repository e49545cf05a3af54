"""Scaled dot-product attention in plain jnp: the oracle every other implementation is tested against.

Causality is by index in the row, documents are kept apart by segment id. The G = N/K query heads that share a key/value
head stay grouped, so keys and values are never repeated. The softmax is float32 whatever the inputs are.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# checkpoint_name, in every implementation, of what the backward pass needs besides q, k, v; cuDNN's sums have no name
RESIDUALS = "context"
_MASKED = -1e30  # finite, so that a row's maximum is never the result of inf - inf


def attention_reference(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K W"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T N W"]:
    """Causal attention within each document of each row.

    Args:
        segment_ids: equal numbers may see each other.

    Source: Vaswani et al. 2017, section 3.2.1; grouping of query heads: Ainslie et al. 2023, arXiv:2305.13245.
    """
    batch, length, num_query_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, num_kv_heads, num_query_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32) * head_dim**-0.5
    position = jnp.arange(length)
    causal = position[None, :, None] >= position[None, None, :]
    same_document = segment_ids[:, :, None] == segment_ids[:, None, :]
    scores = jnp.where((causal & same_document)[:, None, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    context = jnp.einsum("bkgts,bskw->btkgw", weights, value)
    return context.reshape(batch, length, num_query_heads, value.shape[-1])
