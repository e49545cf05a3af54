"""Rotary position embedding: tables for positions, stretched by YaRN where asked, and the rotation.

Pairs are dimensions i and i + H/2 (the half-split layout of GPT-NeoX and Hugging Face Llama). Tables and rotation are
float32: bfloat16 cannot hold position 511 exactly.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Which angle each position has.

    Attributes:
        factor: how many times the trained length is to be read; 1 changes nothing.
        trained_length: tokens.
        beta_fast, beta_slow: turns in the trained length; frequencies that make more than beta_fast keep their angles,
            those that make fewer than beta_slow are slowed down by the whole factor.
    """

    head_dim: int
    max_timescale: float
    factor: float
    trained_length: int
    beta_fast: float
    beta_slow: float

    def tables(self, positions: Int[Array, "B T"]) -> tuple[Float[Array, "B T h"], Float[Array, "B T h"]]:
        """Cosine and sine of every position's angle, for the H/2 frequencies.

        Source: Su et al. 2021, arXiv:2104.09864, equation 15; temperature: Peng et al. 2023, arXiv:2309.00071, 3.4.
        """
        frequencies = jnp.asarray(self.frequencies(), jnp.float32)
        angle = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
        temperature = 0.1 * math.log(self.factor) + 1
        return jnp.cos(angle) * temperature, jnp.sin(angle) * temperature

    def frequencies(self) -> np.ndarray:
        """Radians per position, float64: an error in them grows with the position.

        Source: Peng et al. 2023, arXiv:2309.00071, section 3.2, with the ramp over dimensions of the authors' code.
        """
        frequency = self.max_timescale ** -(np.arange(0, self.head_dim, 2) / self.head_dim)
        if self.factor == 1:
            return frequency

        def dimension(turns: float) -> float:
            """Where the frequency stands that makes so many turns in the trained length."""
            ratio = self.trained_length / (turns * 2 * math.pi)
            return self.head_dim * math.log(ratio) / (2 * math.log(self.max_timescale))

        low = max(math.floor(dimension(self.beta_fast)), 0)
        high = min(math.ceil(dimension(self.beta_slow)), self.head_dim - 1)
        width = high - low if high > low else 1e-3
        slowed = np.clip((np.arange(self.head_dim // 2) - low) / width, 0, 1)
        return frequency * (1 - slowed) + frequency / self.factor * slowed


def rotate(
    x: Float[Array, "B T *N H"], cosine: Float[Array, "B T h"], sine: Float[Array, "B T h"]
) -> Float[Array, "B T *N H"]:
    """x with each head rotated by its position."""
    heads = range(2, x.ndim - 1)
    cosine = jnp.expand_dims(jnp.concatenate([cosine, cosine], axis=-1), heads)
    sine = jnp.expand_dims(jnp.concatenate([-sine, sine], axis=-1), heads)
    swapped = jax.lax.platform_dependent(x, cpu=_swapped, default=_swapped_by_product)
    return (x.astype(jnp.float32) * cosine + swapped.astype(jnp.float32) * sine).astype(x.dtype)


def _swapped(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """x with the two halves of its last dimension exchanged."""
    return jnp.concatenate(jnp.split(x, 2, axis=-1)[::-1], axis=-1)


def _swapped_by_product(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """The same, exactly, by a permutation matrix: faster on a TPU than halves of a register copied apart."""
    permutation = jnp.asarray(np.roll(np.eye(x.shape[-1]), x.shape[-1] // 2, axis=1), x.dtype)
    return jnp.einsum("...h,hk->...k", x, permutation, precision="highest" if x.dtype == jnp.float32 else None)
