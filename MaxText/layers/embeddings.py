"""The token embedding table, which with tied weights is the output projection too."""

from flax import nnx
from jaxtyping import Array, Float, Int

from MaxText.kernels.lookup import lookup
from MaxText.layers import parameters
from MaxText.sharding import BATCH_AXES, EMBED_AXIS, VOCAB_AXIS, shard


class Embed(nnx.Module):
    """A table of vocab_size rows; calling it looks rows up."""

    def __init__(self, vocab_size: int, dim: int, *, stddev: float, dtype: str, weight_dtype: str, rngs: nnx.Rngs):
        self.dtype = dtype
        self.embedding = parameters.weight(
            rngs, (vocab_size, dim), ("vocab", "embed"), stddev=stddev, dtype=weight_dtype
        )

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        axes = {"batch_axes": BATCH_AXES, "vocab_axis": VOCAB_AXIS, "embed_axis": EMBED_AXIS}
        rows = lookup(self.embedding[...], ids, self.dtype, **axes)
        return shard(rows, "activation_batch", "activation_length", "activation_embed")
