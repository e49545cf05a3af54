"""The training step and the evaluation step: pure functions from a factory, the only place gradients are taken.

The loss is sum(loss * weight) / sum(weight) over the whole global batch, in float32. Gradients are accumulated as sums
and divided once, so neither the mesh nor the number of accumulation steps changes what is computed.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from MaxText import compiler_options, hardware, loss, models, optimizers, sharding, spikes, train_state
from MaxText.input_pipeline import packing
from MaxText.layers import dropout
from MaxText.loss import Batch
from MaxText.train_state import TrainState

Metrics = dict[str, jax.Array]  # float32 scalars


def abstract_batch(rows: int, length: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a global batch of `rows` sequences."""
    leaf = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=sharding.batch_sharding(mesh))
    return dict.fromkeys(packing.KEYS, leaf)


def accumulate(gradient: Callable, params: Any, batch: Batch, steps: int) -> tuple[Any, Metrics]:
    """Gradients and sums over the batch, in `steps` pieces; accumulated in float32."""
    if steps == 1:
        gradients, sums = gradient(params, batch)
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), sums

    def piece(x: jax.Array) -> jax.Array:
        # Piece i takes every steps-th row, so that each device's rows stay on it.
        pieces = jnp.moveaxis(x.reshape(x.shape[0] // steps, steps, *x.shape[1:]), 1, 0)
        return sharding.shard(pieces, None, *("activation_batch", "activation_length")[: x.ndim])

    def add(total: tuple[Any, Metrics], small: Batch) -> tuple[tuple[Any, Metrics], None]:
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, gradient(params, small)), None

    pieces = {key: piece(value) for key, value in batch.items()}
    shapes = jax.eval_shape(gradient, params, {key: value[0] for key, value in pieces.items()})
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    total, _ = jax.lax.scan(add, zeros, pieces)
    return total


def make_train_step(
    config: FrozenConfigDict, model: models.AbstractModel, abstract: TrainState, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted (state, batch) -> (state, metrics); it donates the state. Call and lower it under `jax.set_mesh`."""
    optimizer = optimizers.make_optimizer(config)
    schedule = optimizers.learning_rate_schedule(config)
    mtp_weight = optimizers.mtp_weight_schedule(config)
    sums_of = functools.partial(loss.training_sums, config, model, head_dtype=loss.head_dtype(config, mesh))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        gradient = jax.grad(functools.partial(sums_of, mtp_weight=mtp_weight(state.step)), has_aux=True)
        if config.dropout_rate:
            rows = batch["inputs"].shape[0]
            batch = {**batch, "dropout_keys": dropout.row_keys(config.init_weights_seed, state.step, rows)}
        gradients, sums = accumulate(gradient, state.params, batch, config.gradient_accumulation_steps)
        total_weights = jnp.maximum(sums["total_weights"], 1.0)
        gradients = jax.tree.map(lambda g: g / total_weights, gradients)
        raw_grad_norm = optax.tree.norm(gradients)
        threshold = config.gradient_clipping_threshold
        scale = jnp.minimum(1.0, threshold / raw_grad_norm) if threshold > 0 else jnp.ones(())
        gradients = jax.tree.map(lambda g: g * scale, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = _loss_metrics(sums)
        good, window = spikes.judge(config, state.spikes, metrics["learning/loss"], raw_grad_norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        metrics |= {
            "learning/raw_grad_norm": raw_grad_norm,
            "learning/grad_norm": raw_grad_norm * scale,
            "learning/param_norm": optax.tree.norm(params),
            "learning/current_learning_rate": jnp.asarray(schedule(state.step)),
            "optim/step_skipped": 1.0 - good.astype(jnp.float32),
        }
        return TrainState(state.step + 1, params, opt_state, window), metrics

    chip = hardware.find_chip(mesh.devices.flat[0].device_kind)
    places = train_state.shardings(abstract)
    batch_places = dict.fromkeys(packing.KEYS, sharding.batch_sharding(mesh))
    return jax.jit(
        train_step,
        in_shardings=(places, batch_places),
        out_shardings=(places, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options.options(chip.name if chip else None, config.compile_xla_flags) or None,
    )


def make_eval_step(
    config: FrozenConfigDict, model: models.AbstractModel, abstract: TrainState, mesh: Mesh
) -> Callable[[Any, Batch, jax.Array], Metrics]:
    """The jitted (params, batch, token_bytes [V] int32) -> the loss's sums, and that of the targets' bytes."""

    def eval_step(params: Any, batch: Batch, token_bytes: jax.Array) -> Metrics:
        sums = loss.evaluation_sums(config, model, params, batch, loss.head_dtype(config, mesh))
        counted = batch["targets_segmentation"] != 0
        target_bytes = jnp.sum(jnp.where(counted, jnp.take(token_bytes, batch["targets"], mode="clip"), 0))
        return sums | {"bytes": target_bytes}

    everywhere = sharding.replicated(mesh)
    batch_places = dict.fromkeys(packing.KEYS, sharding.batch_sharding(mesh))
    places = train_state.shardings(abstract).params
    return jax.jit(eval_step, in_shardings=(places, batch_places, everywhere), out_shardings=everywhere)


def _loss_metrics(sums: Metrics) -> Metrics:
    total_weights = jnp.maximum(sums["total_weights"], 1.0)
    metrics = {f"learning/{name}": sums[name] / total_weights for name in ("loss", "lm_loss", "z_loss")}
    if "mtp_loss" in sums:
        metrics["learning/mtp_loss"] = sums["mtp_loss"] / jnp.maximum(sums["mtp_weights"], 1.0)
    return metrics | {
        "learning/perplexity": jnp.exp(metrics["learning/lm_loss"]),
        "learning/total_weights": sums["total_weights"],
    }
