"""Rows of a table that is split over the mesh: of its columns over one axis, of its rows over another.

Each device looks up its share of the columns for the tokens of all, and the shares are exchanged: so tokens cross the
network and back come rows, and neither the table nor its gradient does. `lookup_reference` is the plain oracle.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int


def lookup_reference(table: Float[Array, "V D"], ids: Int[Array, "B T"], dtype: str) -> Float[Array, "B T D"]:
    """The ids' rows, cast; the nearest row for an id out of range."""
    return jnp.take(table, ids, axis=0, mode="clip").astype(dtype)


def lookup(
    table: Float[Array, "V D"],
    ids: Int[Array, "B T"],
    dtype: str,
    *,
    batch_axes: tuple[str, ...],
    vocab_axis: str,
    embed_axis: str,
) -> Float[Array, "B T D"]:
    """As `lookup_reference`, on the current mesh; the gradient is summed in the table's dtype.

    Args:
        batch_axes: mesh axes that B is split over; embed_axis is one of them.
        vocab_axis: mesh axis that V is split over.
        embed_axis: mesh axis that D is split over.
    """

    def local(table: Array, ids: Array) -> Array:
        ids = jax.lax.all_gather(ids, embed_axis, tiled=True)
        size = table.shape[0]
        ids = jnp.clip(ids, 0, size * jax.lax.axis_size(vocab_axis) - 1) - size * jax.lax.axis_index(vocab_axis)
        inside = (ids >= 0) & (ids < size)  # one device has the row, the others add zeros
        rows = jnp.where(inside[..., None], lookup_reference(table, ids, dtype), 0)
        rows = jax.lax.psum(rows, vocab_axis)
        return jax.lax.all_to_all(rows, embed_axis, split_axis=0, concat_axis=2, tiled=True)

    specs = PartitionSpec(vocab_axis, embed_axis), PartitionSpec(batch_axes)
    return jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec(batch_axes))(table, ids)
