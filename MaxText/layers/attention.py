"""Multi-head, grouped-query and multi-query self-attention: one layer, by the number of key/value heads.

In and out are the residual stream's width; the arithmetic between the projections is `kernels.attention`'s. The
differential layers are this one with other shapes and another `attend`.
"""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from MaxText import sharding
from MaxText.kernels import attention as kernel
from MaxText.kernels.attention_cached import CachedRows
from MaxText.kernels.projection import project
from MaxText.layers import parameters, rope
from MaxText.layers.memory import Memory
from MaxText.layers.normalizations import RMSNorm
from MaxText.sharding import shard


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and no biases.

    Args:
        use_qk_norm: normalize queries and keys before they are rotated (Henry et al. 2020, arXiv:2010.04245).
    """

    def __init__(
        self,
        dim: int,
        num_query_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        epsilon: float,
        use_qk_norm: bool,
        implementation: str,
        stddev: float,
        out_stddev: float,
        dtype: str,
        weight_dtype: str,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.epsilon = epsilon
        self.implementation = implementation
        query_heads, kv_heads, out_heads = self.shapes(num_query_heads, num_kv_heads, head_dim)
        pair = ("pair",) * (len(query_heads) - 1)
        self.query_axes, self.kv_axes = (*pair, "heads"), (*pair, sharding.kv_head_axis(kv_heads[-1]))

        def projection(heads: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            shape, axes = (dim, *heads, head_dim), ("embed", *axes, "kv")
            return parameters.weight(rngs, shape, axes, stddev=stddev, dtype=weight_dtype)

        self.query = projection(query_heads, self.query_axes)
        self.key = projection(kv_heads, self.kv_axes)
        self.value = projection(kv_heads, self.kv_axes)
        self.use_qk_norm = use_qk_norm
        if use_qk_norm:
            self.query_norm = RMSNorm(head_dim, epsilon=epsilon, weight_dtype=weight_dtype)
            self.key_norm = RMSNorm(head_dim, epsilon=epsilon, weight_dtype=weight_dtype)
        self.out = parameters.weight(
            rngs, (*out_heads, dim), ("heads", "kv", "embed"), stddev=out_stddev, dtype=weight_dtype
        )

    @staticmethod
    def shapes(num_query_heads: int, num_kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
        """The heads of the query, those of key and value, and the context's heads with their width."""
        return (num_query_heads,), (num_kv_heads,), (num_query_heads, head_dim)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cosine: Float[Array, "B T h"],
        sine: Float[Array, "B T h"],
        segment_ids: Int[Array, "B T"],
        depth: Int[Array, ""],
    ) -> Float[Array, "B T D"]:
        """The attention of each position to those before it in its document.

        Args:
            depth: which layer this is, from 0.
        """
        query, key, value = self.heads(x, cosine, sine)
        return self.output(self.attend(x, query, key, value, segment_ids, depth))

    def recall(
        self,
        x: Float[Array, "B T D"],
        cosine: Float[Array, "B T h"],
        sine: Float[Array, "B T h"],
        memory: Memory,
        first: Int[Array, "B"],
        depth: Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], Memory]:
        """As a call, where what is before x comes from a memory; and that memory with x in it.

        Args:
            first: where in its row of the memory each row of x begins.
        """
        query, key, value = self.heads(x, cosine, sine)
        memory = self._placed(memory.extended(key, value, first))
        context = self.attend(x, query, memory.keys, memory.values, CachedRows(first), depth)
        return self.output(context), memory

    def empty_memory(self, batch: int, length: int) -> Memory:
        """Room for `length` tokens in each of `batch` rows."""
        *pair, num_heads, width = self.key.shape[1:]
        key, value = (batch, *pair, num_heads, length, width), (batch, num_heads, length, width * math.prod(pair))
        return self._placed(Memory(jnp.zeros(key, self.dtype), jnp.zeros(value, self.dtype)))

    def heads(self, x: Array, cosine: Array, sine: Array) -> tuple[Array, Array, Array]:
        """Queries and keys, rotated, and values."""
        query = self._project(x, self.query, self.query_axes)
        key = self._project(x, self.key, self.kv_axes)
        if self.use_qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query = checkpoint_name(rope.rotate(query, cosine, sine), "query_proj")
        key = checkpoint_name(rope.rotate(key, cosine, sine), "key_proj")
        value = checkpoint_name(self._project(x, self.value, self.kv_axes), "value_proj")
        return query, key, self.joined(value)

    def joined(self, value: Array) -> Float[Array, "B T K W"]:
        """The values as the attention takes them."""
        return value

    def output(self, context: Float[Array, "B T N W"]) -> Float[Array, "B T D"]:
        """What the layer adds to the residual stream."""
        context = shard(context, "activation_batch", "activation_length", "activation_heads", "activation_kv")
        return checkpoint_name(project("btnh,nhd->btd", context, self.out[...]), "out_proj")

    def _placed(self, memory: Memory) -> Memory:
        def placed(x: Array, axes: tuple[str, ...]) -> Array:
            names = (f"activation_{axis}" for axis in axes)
            return shard(x, "activation_batch", *names, "activation_length", "activation_kv")

        return Memory(placed(memory.key, self.kv_axes), placed(memory.value, self.kv_axes[-1:]))

    def attend(
        self, x: Array, query: Array, key: Array, value: Array, segment_ids: Array | CachedRows, depth: Array
    ) -> Float[Array, "B T N W"]:
        """The context: what the heads saw, before the output projection."""
        return kernel.attention(query, key, value, segment_ids, **self.kernel_options)

    @property
    def kernel_options(self) -> dict[str, Any]:
        """Which kernel, and how its arguments lie on the mesh."""
        axes = {"batch_axes": sharding.BATCH_AXES, "head_axis": sharding.HEAD_AXIS}
        return {"implementation": self.implementation, **axes}

    def _project(self, x: Array, weight: nnx.Param, axes: tuple[str, ...]) -> Array:
        heads = "cn"[-len(axes) :]  # c: the two maps of a differential pair
        projected: Array = project(f"btd,d{heads}h->bt{heads}h", x, weight[...])  # pyright: ignore[reportAssignmentType]
        names = (f"activation_{axis}" for axis in axes)
        return shard(projected, "activation_batch", "activation_length", *names, "activation_kv")
