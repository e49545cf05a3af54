"""Dropout whose masks are a function of the row's key and the place in the model: of nothing else.

In: one key for each row of the batch, or None where nothing is dropped. Keys belong to rows, not to devices or pieces
of the batch, so that neither the mesh nor gradient accumulation changes a mask.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def dropout(
    x: Float[Array, "B T D"], rate: float, keys: Key[Array, "B"] | None, place: int | Int[Array, ""]
) -> Float[Array, "B T D"]:
    """x with a share of `rate` of its elements set to 0 and the others scaled up to keep the mean.

    Args:
        rate: taken to the nearest multiple of 2^-16; less than 1.
        place: a number of its own for each use in the model.

    Source: Srivastava et al. 2014, section 4.
    """
    if keys is None or rate == 0:
        return x

    length, dim = x.shape[1:]
    kept = max(1, round((1 - rate) * 2**16))

    def numbers(key: Array) -> Array:
        return jax.random.bits(jax.random.fold_in(key, place), (-(-length // 2), dim), jnp.uint32)

    # On a TPU random numbers cost more than all the rest: each decides for two elements, half a row apart, and behind
    # the barrier the masks are made once, and not again inside each product that reads the result.
    both = jax.vmap(numbers)(keys)
    halves = jax.lax.optimization_barrier(((both & 0xFFFF) < kept, (both >> 16) < kept))
    masks = jnp.concatenate(halves, axis=1)[:, :length]
    return jnp.where(masks, x * (2**16 / kept), 0).astype(x.dtype)


def row_keys(seed: int, step: Int[Array, ""], num_rows: int) -> Key[Array, "B"]:
    """A key for each row of a step's batch: nothing about them needs to be saved."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_rows))
