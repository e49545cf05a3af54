"""The loss: next-token cross-entropy, z-loss and multi-token prediction, as sums over the batch's tokens.

Sums and not means, so that pieces of a batch can be added and divided once, by the number of next tokens, for every
term. One pass over the vocabulary serves all heads: their states are [B, heads, T, D], those for the next token first.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from MaxText import hardware, models, sharding
from MaxText.kernels import cross_entropy
from MaxText.layers import multi_token_prediction

Batch = Mapping[str, jax.Array]  # [B, T] int32 each; in training with dropout also `dropout_keys`, [B]
Sums = dict[str, jax.Array]  # float32 scalars


def head_dtype(config: FrozenConfigDict, mesh: Mesh) -> str:
    """The dtype of the products with the unembedding: the config's, but float32 on a CPU that is slow at bfloat16."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return "float32" if on_cpu and not hardware.cpu_multiplies_bfloat16() else config.dtype


def training_sums(
    config: FrozenConfigDict,
    model: models.AbstractModel,
    params: Any,
    batch: Batch,
    *,
    mtp_weight: Any,
    head_dtype: str,
) -> tuple[jax.Array, Sums]:
    """The loss summed over the batch's weighted tokens, and the sums its metrics are made of.

    Args:
        mtp_weight: what the mean over heads of the multi-token prediction losses counts beside the next token's; both
            are divided by the number of next tokens.
        head_dtype: of the products with the unembedding.

    Source: DeepSeek-AI 2024, arXiv:2412.19437, equations 24 and 25.
    """
    hidden, unembedding, targets, counted = _heads(config, model, params, batch, head_dtype)
    num_ahead = config.mtp_num_layers
    scales = jnp.stack([jnp.ones(()), *[jnp.asarray(mtp_weight) / num_ahead] * num_ahead])
    loss, nll = cross_entropy.cross_entropy(  # pyright: ignore[reportGeneralTypeIssues]: custom_vjp hides the type
        _flat(hidden), unembedding, _flat(targets), _flat(counted * scales[None, :, None]), _options(config)
    )
    nll_sums = jnp.sum(nll.reshape(counted.shape) * counted, axis=(0, 2))
    sums = {
        "loss": loss,
        "lm_loss": nll_sums[0],
        # A difference of large sums: exactly nothing where it is off, and not their rounding.
        "z_loss": loss - jnp.sum(nll_sums * scales) if config.z_loss_multiplier else jnp.zeros(()),
        "total_weights": jnp.sum(counted[:, 0]),
    }
    if num_ahead:
        sums |= {"mtp_loss": jnp.sum(nll_sums[1:]), "mtp_weights": jnp.sum(counted[:, 1:])}
    return loss, sums


def evaluation_sums(
    config: FrozenConfigDict, model: models.AbstractModel, params: Any, batch: Batch, head_dtype: str
) -> Sums:
    """Negative log-likelihoods in nats and the tokens they are of, for the next token and for those further ahead.

    `mtp_accepted` counts the tokens ahead that greedy decoding would draft as the next-token head then chooses them, up
    to the first that it does not.
    """
    hidden, unembedding, targets, counted = _heads(config, model, params, batch, head_dtype)
    options = _options(config)
    _, nll = cross_entropy.cross_entropy(  # pyright: ignore[reportGeneralTypeIssues]: custom_vjp hides the type
        _flat(hidden), unembedding, _flat(targets), _flat(counted), options
    )
    nll_sums = jnp.sum(nll.reshape(counted.shape) * counted, axis=(0, 2))
    sums = {"nll": nll_sums[0], "total_weights": jnp.sum(counted[:, 0])}
    if config.mtp_num_layers:
        chosen = cross_entropy.greedy(_flat(hidden), unembedding, options).reshape(counted.shape)
        ahead = range(1, config.mtp_num_layers + 1)
        same = [chosen[:, k] == multi_token_prediction.shifted(chosen[:, 0], k) for k in ahead]
        accepted = jnp.cumprod(jnp.stack(same, axis=1).astype(counted.dtype), axis=1)
        sums |= {
            "mtp_nll": jnp.sum(nll_sums[1:]),
            "mtp_weights": jnp.sum(counted[:, 1:]),
            "mtp_accepted": jnp.sum(counted[:, 1:] * accepted),
        }
    return sums


def _heads(
    config: FrozenConfigDict, model: models.AbstractModel, params: Any, batch: Batch, head_dtype: str
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """States [B, heads, T, D], unembedding [V, D]; what each head should say and whether it counts, [B, heads, T]."""
    transformer = model.merge(params)
    weights = (batch["targets_segmentation"] != 0).astype(jnp.float32)
    inputs = (batch["inputs"], batch["inputs_position"], batch["inputs_segmentation"])
    hidden = transformer.of_all_heads(*inputs, batch["targets"], weights, batch.get("dropout_keys"))
    ahead = multi_token_prediction.ahead(batch["targets"], weights, len(hidden))
    targets, counted = (jnp.stack(arrays, axis=1) for arrays in zip(*ahead, strict=True))
    return jnp.stack(hidden, axis=1).astype(head_dtype), transformer.unembedding, targets, counted


def _flat(x: jax.Array) -> jax.Array:
    """[B, heads, T, ...] as [B, heads * T, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _options(config: FrozenConfigDict) -> cross_entropy.Options:
    return cross_entropy.Options(
        z_loss_multiplier=config.z_loss_multiplier,
        soft_cap=config.final_logits_soft_cap,
        vocab_padding=config.vocab_padding,
        num_chunks=config.num_vocab_tiling * (1 + config.mtp_num_layers),
        batch_axes=sharding.BATCH_AXES,
        vocab_axis=sharding.VOCAB_AXIS,
        embed_axis=sharding.EMBED_AXIS,
    )
