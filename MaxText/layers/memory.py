"""The memory of one attention layer while a text is generated: the keys and values of all tokens so far."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """Keys and values of S places in each row, heads before places, so that a head's places lie together.

    Attributes:
        key: with one more dimension, 2, before the heads where attention is differential.
    """

    key: Float[Array, "B *C K S H"]
    value: Float[Array, "B K S W"]

    @property
    def keys(self) -> Float[Array, "B S *C K H"]:
        """As the attention takes them."""
        return jnp.moveaxis(self.key, -2, 1)

    @property
    def values(self) -> Float[Array, "B S K W"]:
        return jnp.moveaxis(self.value, -2, 1)

    def extended(
        self, key: Float[Array, "B T *C K H"], value: Float[Array, "B T K W"], first: Int[Array, "B"]
    ) -> "Memory":
        """With the keys and values of T tokens in the places from `first` on; there must be as many in the row."""

        def written(row: Array, new: Array, at: Array) -> Array:
            starts = (*[0] * (row.ndim - 2), at, 0)
            return jax.lax.dynamic_update_slice(row, jnp.moveaxis(new, 0, -2).astype(row.dtype), starts)

        write = jax.vmap(written)
        return Memory(write(self.key, key, first), write(self.value, value, first))

    def longer(self, length: int) -> "Memory":
        """With room for `length` tokens."""

        def padded(x: Array) -> Array:
            return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, length - x.shape[-2]), (0, 0)])

        return Memory(padded(self.key), padded(self.value))

    def with_row(self, other: "Memory", row: int | Int[Array, ""]) -> "Memory":
        """With the first row of another memory, of the same or less room, in place of one of its own."""

        def written(mine: Array, theirs: Array) -> Array:
            return jax.lax.dynamic_update_slice(mine, theirs[:1], [row] + [0] * (mine.ndim - 1))

        return Memory(written(self.key, other.key), written(self.value, other.value))
