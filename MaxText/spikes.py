"""Which updates are skipped: of a loss or gradient that is not finite and, if asked, of one far above the last ones.

Runs inside the training step, so the update that is bad is the one that is skipped. A rejected value never enters the
window: one NaN in it would make every limit NaN, one spike would make room for the next.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import FrozenConfigDict


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """The last accepted losses and gradient norms, a ring; part of the state, so that a resumed run skips the same."""

    values: Any  # float32 [2, W]
    accepted: Any  # int32 scalar: how many there have been


def initial(config: FrozenConfigDict) -> Window | None:
    """An empty window, or None where only what is not finite is skipped."""
    if not config.skip_step_on_spikes:
        return None
    return Window(jnp.zeros((2, config.skip_step_interval), jnp.float32), jnp.zeros((), jnp.int32))


def judge(
    config: FrozenConfigDict, window: Any, loss: Float[Array, ""], grad_norm: Float[Array, ""]
) -> tuple[Bool[Array, ""], Any]:
    """Whether the update is to be made, and the window after it.

    A spike is more than skip_step_scaling_factor standard deviations above the window's mean, once the window is half
    full. Source: OLMo 2, arXiv:2501.00656, section 3.4, without its window taking in what was rejected.
    """
    measured = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    good = jnp.all(jnp.isfinite(measured))
    if window is None:
        return good, None
    size = window.values.shape[1]
    filled = (jnp.arange(size) < window.accepted).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(filled), 1.0)
    mean = jnp.sum(window.values * filled[None], axis=1) / count
    variance = jnp.sum((window.values - mean[:, None]) ** 2 * filled[None], axis=1) / count
    # Rounding makes values differ that are the same: no limit closer than a thousandth.
    deviation = jnp.maximum(jnp.sqrt(variance), 1e-3 * jnp.abs(mean))
    spike = jnp.any(measured > mean + config.skip_step_scaling_factor * deviation)
    good &= ~(spike & (2 * window.accepted >= size))
    place = window.accepted % size
    values = jnp.where(good, window.values.at[:, place].set(measured), window.values)
    return good, Window(values, window.accepted + good)
