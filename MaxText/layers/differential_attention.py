"""Differential self-attention, in its two published forms: noise that two softmax attentions share cancels out.

The heads of a pair stand beside each other in every weight, so that a pair is never split between devices; for export
the weights are only reshaped.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from MaxText.kernels.attention_cached import CachedRows
from MaxText.kernels.differential import differential_attention
from MaxText.kernels.projection import project
from MaxText.layers import parameters
from MaxText.layers.attention import Attention
from MaxText.layers.normalizations import normalized

LAMBDA_VECTORS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
_LAMBDA_STDDEV = 0.1  # Ye et al. 2024, section 2.1


class DifferentialAttention(Attention):
    """Two maps for each pair of heads, one lambda for each layer, and a norm for each pair.

    As in the `transformers` library's DiffLlama: query heads i and i + N/2 are a pair, so are key/value heads i and
    i + K/2, a pair's values are both its value heads side by side, and the norm has no gain.
    Source: Ye et al. 2024, arXiv:2410.05258, equations 1 to 3.
    """

    def __init__(self, dim: int, num_query_heads: int, num_kv_heads: int, head_dim: int, **keywords):
        super().__init__(dim, num_query_heads, num_kv_heads, head_dim, **keywords)
        for name in LAMBDA_VECTORS:
            vector = parameters.weight(
                keywords["rngs"], (head_dim,), ("kv",), stddev=_LAMBDA_STDDEV, dtype=keywords["weight_dtype"]
            )
            setattr(self, name, vector)

    @staticmethod
    def shapes(num_query_heads: int, num_kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
        pairs = num_query_heads // 2
        return (2, pairs), (2, num_kv_heads // 2), (pairs, 2 * head_dim)

    def joined(self, value: Array) -> Float[Array, "B T K W"]:
        return jnp.concatenate([value[:, :, 0], value[:, :, 1]], axis=-1)

    def attend(
        self, x: Array, query: Array, key: Array, value: Array, segment_ids: Array | CachedRows, depth: Array
    ) -> Float[Array, "B T N W"]:
        initial = 0.8 - 0.6 * jnp.exp(-0.3 * depth.astype(jnp.float32))
        q1, k1, q2, k2 = (getattr(self, name)[...].astype(jnp.float32) for name in LAMBDA_VECTORS)
        weight = jnp.exp(jnp.sum(q1 * k1)) - jnp.exp(jnp.sum(q2 * k2)) + initial
        weights = jnp.broadcast_to(weight, (*query.shape[:2], query.shape[3]))
        context = differential_attention(query, key, value, weights, segment_ids, **self.kernel_options)
        return ((1 - initial) * normalized(context, self.epsilon)).astype(context.dtype)


class DifferentialAttentionV2(Attention):
    """Twice the query heads; lambda is a function of the token, for each head; no norm and no initial lambda.

    Heads 2i and 2i + 1 are a pair and share their keys and values.
    Source: Ye et al. 2026, "Differential Transformer V2", huggingface.co/blog/microsoft/diff-attn-v2.
    """

    def __init__(self, dim: int, num_query_heads: int, num_kv_heads: int, head_dim: int, **keywords):
        super().__init__(dim, num_query_heads, num_kv_heads, head_dim, **keywords)
        self.lambda_projection = parameters.weight(
            keywords["rngs"],
            (dim, num_query_heads),
            ("embed", "heads"),
            stddev=keywords["stddev"],
            dtype=keywords["weight_dtype"],
        )

    @staticmethod
    def shapes(num_query_heads: int, num_kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
        return (2 * num_query_heads,), (num_kv_heads,), (num_query_heads, head_dim)

    def attend(
        self, x: Array, query: Array, key: Array, value: Array, segment_ids: Array | CachedRows, depth: Array
    ) -> Float[Array, "B T N W"]:
        weight: Array = project("btd,dn->btn", x, self.lambda_projection[...])  # pyright: ignore[reportAssignmentType]
        weight = jax.nn.sigmoid(weight.astype(jnp.float32))
        batch, length, heads, width = query.shape
        pairs = jnp.moveaxis(query.reshape(batch, length, heads // 2, 2, width), 3, 2)
        return differential_attention(pairs, key[:, :, None], value, weight, segment_ids, **self.kernel_options)
