"""The learning-rate schedule and the optimizer: Optax's own, configured.

Weight decay falls on matrices only: every parameter except normalization gains. With layers stacked for scan a gain is
a two-dimensional array, so what is a gain is decided by the parameter's name and not by its rank.
"""

from typing import Any

import jax
import optax
from ml_collections import FrozenConfigDict


def learning_rate_schedule(config: FrozenConfigDict) -> optax.Schedule:
    """Step -> learning rate: linear from 0 to the peak, then a cosine to the final fraction, then constant."""
    length = config.steps if config.learning_rate_schedule_steps == -1 else config.learning_rate_schedule_steps
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=round(length * config.warmup_steps_fraction),
        decay_steps=length,
        end_value=config.learning_rate * config.learning_rate_final_fraction,
    )


def decay_mask(params: Any) -> Any:
    """True for the parameters that are decayed."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def make_optimizer(config: FrozenConfigDict) -> optax.GradientTransformation:
    """AdamW, without clipping: the step clips, because it reports the norm before and after.

    Source: Loshchilov & Hutter 2017, arXiv:1711.05101, algorithm 2.
    """
    return optax.adamw(
        learning_rate_schedule(config),
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        weight_decay=config.adam_weight_decay,
        mu_dtype=config.mu_dtype,
        mask=decay_mask,
    )
