"""The learning-rate schedule and the optimizer: Optax's own, configured.

Weight decay falls on matrices only: every parameter except normalization gains and the vectors of differential
attention. With layers stacked for scan a vector is a two-dimensional array, so names decide and not ranks.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import FrozenConfigDict
from optax import contrib

from MaxText.schedule_plan import phases

_VECTORS = ("scale", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
_ADAM_RMS = 0.2  # root mean square of an entry of AdamW's updates, before the learning rate

# How much of the way from the final to the peak rate is left after a share p of the decay.
DECAY_STYLES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "cosine": lambda p: (1 + jnp.cos(jnp.pi * p)) / 2,
    "linear": lambda p: 1 - p,
    "1-sqrt": lambda p: 1 - jnp.sqrt(p),
}


def learning_rate_schedule(config: FrozenConfigDict) -> optax.Schedule:
    """Step -> learning rate: linear from 0 to the peak, then as lr_schedule_type says, then constant."""
    decay = _decay(config)

    def rate(step: Any) -> Any:
        warmup = phases(config)[0]  # here, because steps may be `auto` while only the state's shapes are asked for
        warm = jnp.minimum(step / warmup, 1.0) if warmup else 1.0
        return config.learning_rate * warm * decay(step)

    return rate


def mtp_weight_schedule(config: FrozenConfigDict) -> optax.Schedule:
    """Step -> weight of the multi-token prediction loss: it goes to its final value as the learning rate decays."""
    decay, lowest = _decay(config), config.learning_rate_final_fraction
    first, last = config.mtp_loss_scaling_factor, config.mtp_loss_scaling_factor_final

    def weight(step: Any) -> Any:
        left = (decay(step) - lowest) / (1 - lowest) if lowest < 1 else jnp.ones(())
        return last + (first - last) * left

    return weight


def _decay(config: FrozenConfigDict) -> optax.Schedule:
    """Step -> the share of the peak rate after warm-up: 1, then down to the final fraction.

    Source: cosine: Loshchilov & Hutter 2016, arXiv:1608.03983; stable phase: Hu et al. 2024, arXiv:2404.06395,
    section 4; 1-sqrt: Hägele et al. 2024, arXiv:2405.18392, section 3.
    """
    lowest = config.learning_rate_final_fraction
    style = "cosine" if config.lr_schedule_type == "cosine" else config.wsd_decay_style

    def share(step: Any) -> Any:
        _, start, end = phases(config)
        passed = jnp.clip((step - start) / max(end - start, 1), 0.0, 1.0)
        if style == "exponential":
            return lowest**passed
        return lowest + (1 - lowest) * DECAY_STYLES[style](passed)

    return share


def decay_mask(params: Any) -> Any:
    """True for the parameters that are decayed."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in _VECTORS, params)


def is_muon(path: Any) -> bool:
    """True for the parameters that Muon updates where it is chosen: the matrices of the layers."""
    names = [key.key for key in path]
    return "layers" in names and names[-1] not in (*_VECTORS, "lambda_projection")


def _matrix_axes(path: Any, leaf: Any) -> contrib.MuonDimensionNumbers:
    """The input and the output axes of each layer's matrix; the axis of the layers is neither, so each stands alone."""
    split = _first_output_axis(path, leaf)
    return contrib.MuonDimensionNumbers(tuple(range(1, split)), tuple(range(split, leaf.ndim)))


def _first_output_axis(path: Any, leaf: Any) -> int:
    return leaf.ndim - 1 if path[-1].key == "out" else 2  # the attention's output reads heads and their width


def _as_large_as_adam(updates: Any, _: Any) -> Any:
    """Scales orthogonal updates to the root mean square of AdamW's, so that both take one learning rate and decay."""

    def scaled(path: Any, update: jax.Array) -> jax.Array:
        split = _first_output_axis(path, update)
        longer = max(math.prod(update.shape[1:split]), math.prod(update.shape[split:]))
        return update * _ADAM_RMS * math.sqrt(longer)

    return jax.tree_util.tree_map_with_path(scaled, updates)


def make_optimizer(config: FrozenConfigDict) -> optax.GradientTransformation:
    """AdamW, or Muon with AdamW; without clipping: the step clips, because it reports the norm before and after.

    Source: Loshchilov & Hutter 2017, arXiv:1711.05101, algorithm 2; Liu et al. 2025, arXiv:2502.16982, equation 4.
    """
    adamw = optax.adamw(
        learning_rate_schedule(config),
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        weight_decay=config.adam_weight_decay,
        mu_dtype=config.mu_dtype,
        mask=decay_mask,
    )
    if config.opt_type == "adamw":
        return adamw
    muon = optax.chain(
        contrib.scale_by_muon(
            beta=config.muon_beta,
            mu_dtype=config.mu_dtype,
            weight_dimension_numbers=functools.partial(jax.tree_util.tree_map_with_path, _matrix_axes),
        ),
        optax.stateless(_as_large_as_adam),
        optax.add_decayed_weights(config.adam_weight_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(config)),
    )
    labels = functools.partial(jax.tree_util.tree_map_with_path, lambda path, _: "muon" if is_muon(path) else "adamw")
    return optax.partition({"muon": muon, "adamw": adamw}, labels)
