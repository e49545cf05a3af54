"""Rotary position embedding: tables for positions, and the rotation.

Pairs are dimensions i and i + H/2 (the half-split layout of GPT-NeoX and Hugging Face Llama). Tables and rotation are
float32: bfloat16 cannot hold position 511 exactly.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def tables(
    positions: Int[Array, "B T"], head_dim: int, max_timescale: float
) -> tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]:
    """Cosine and sine of every position's angle, for the H/2 frequencies.

    Source: Su et al. 2021, arXiv:2104.09864, equation 15.
    """
    fraction = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = max_timescale**-fraction
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B T N H"], cosine: Float[Array, "B T 1 h"], sine: Float[Array, "B T 1 h"]
) -> Float[Array, "B T N H"]:
    """x with each head rotated by its position."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x.dtype)
