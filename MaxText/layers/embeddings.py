"""The token embedding table, which with tied weights is the output projection too."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from MaxText.layers import parameters
from MaxText.sharding import shard


class Embed(nnx.Module):
    """A table of vocab_size rows; calling it looks rows up."""

    def __init__(self, vocab_size: int, dim: int, *, stddev: float, dtype: str, weight_dtype: str, rngs: nnx.Rngs):
        self.dtype = dtype
        self.embedding = parameters.weight(
            rngs, (vocab_size, dim), ("vocab", "embed"), stddev=stddev, dtype=weight_dtype
        )

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # Whole rows: looking up rows that are split over fsdp would make the partitioner replicate the activations.
        table = shard(self.embedding[...], "vocab", "activation_embed")
        rows = jnp.take(table, ids, axis=0, mode="clip").astype(self.dtype)
        return shard(rows, "activation_batch", "activation_length", "activation_embed")
