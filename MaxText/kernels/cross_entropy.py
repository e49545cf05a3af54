"""Softmax cross-entropy with z-loss, straight from hidden states, so that the whole [B, T, V] logits never exist.

`cross_entropy_reference` is the plain oracle. `cross_entropy` cuts the tokens into chunks and, when it is
differentiated, computes the gradients' ingredients in the forward pass: each chunk's logits are made once and never
kept or recomputed. It runs under shard_map: rows are split over the batch axes, the vocabulary over the vocabulary
axis, and the gradient of the unembedding is summed locally over all chunks before it crosses the network once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from MaxText.kernels import logits
from MaxText.kernels.projection import row_major

# The weighted sum of nll + z-loss, and each token's nll, unweighted and in nats.
Losses = tuple[Float[Array, ""], Float[Array, "B T"]]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the loss is made of, and how.

    Attributes:
        soft_cap: logits stay between this and its negative; 0 = no cap.
        vocab_padding: the last ids of the vocabulary that no token has.
        num_chunks: divides the tokens of every device.
        batch_axes: mesh axes the rows are split over.
        vocab_axis: mesh axis the vocabulary is split over; its size divides V.
        embed_axis: the one of batch_axes that the gradient of the unembedding is split over; its size divides D.
    """

    z_loss_multiplier: float
    soft_cap: float
    vocab_padding: int
    num_chunks: int
    batch_axes: tuple[str, ...]
    vocab_axis: str
    embed_axis: str


def cross_entropy_reference(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    options: Options,
) -> Losses:
    """Summed loss with z-loss, and each token's negative log-likelihood.

    Source: z-loss: Chowdhery et al. 2022, arXiv:2204.02311, section 5.
    """
    scores = jnp.einsum("btd,vd->btv", hidden, unembedding, preferred_element_type=jnp.float32)
    if options.soft_cap:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    scores = scores[..., : scores.shape[-1] - options.vocab_padding]
    log_z = jax.nn.logsumexp(scores, axis=-1)
    nll = log_z - jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return jnp.sum((nll + options.z_loss_multiplier * jnp.square(log_z)) * weights), nll


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    options: Options,
) -> Losses:
    """As `cross_entropy_reference`, in chunks, on the current mesh. The second result is not differentiable."""
    losses, _ = _run(hidden, unembedding, targets, weights, options, with_gradients=False)
    return losses


def _forward(hidden, unembedding, targets, weights, options):
    losses, gradients = _run(hidden, unembedding, targets, weights, options, with_gradients=True)
    assert gradients is not None
    d_hidden, d_unembedding = gradients
    return losses, (d_hidden, d_unembedding.astype(unembedding.dtype))


def _backward(options, residuals, cotangents):
    d_hidden, d_unembedding = residuals
    scale = cotangents[0]
    return d_hidden * scale.astype(d_hidden.dtype), d_unembedding * scale.astype(d_unembedding.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


def greedy(hidden: Float[Array, "B T D"], unembedding: Float[Array, "V D"], options: Options) -> Int[Array, "B T"]:
    """The id with the highest logit at each position, on the current mesh; of equal ones the smallest."""
    rows, vocab = PartitionSpec(options.batch_axes), PartitionSpec(options.vocab_axis)

    def local(hidden: Array, unembedding: Array) -> Array:
        def of_chunk(x: Array) -> Array:
            scores, ids = _logits(unembedding, x, options)
            highest = jax.lax.pmax(jnp.max(scores, axis=0), options.vocab_axis)
            candidates = jnp.where(scores == highest[None], ids, jnp.iinfo(jnp.int32).max)
            return jax.lax.pmin(jnp.min(candidates, axis=0), options.vocab_axis)

        chunks = hidden.reshape(options.num_chunks, -1, hidden.shape[-1])
        return jax.lax.map(of_chunk, chunks).reshape(hidden.shape[:2])

    mapped = jax.shard_map(local, in_specs=(rows, vocab), out_specs=rows, check_vma=False)
    return mapped(hidden, unembedding.astype(hidden.dtype))


def _run(hidden, unembedding, targets, weights, options, *, with_gradients):
    """((loss, nll), (d_hidden, d_unembedding) or None) on the current mesh.

    The products are made in the dtype of hidden; the gradient of the unembedding is summed, and crosses the network, in
    float32.
    """
    rows, vocab = PartitionSpec(options.batch_axes), PartitionSpec(options.vocab_axis)
    local = functools.partial(_local, options=options, with_gradients=with_gradients)
    split = PartitionSpec(options.vocab_axis, options.embed_axis)
    out_specs = ((PartitionSpec(), rows), (rows, split) if with_gradients else None)
    mapped = jax.shard_map(local, in_specs=(rows, vocab, rows, rows), out_specs=out_specs, check_vma=False)
    return mapped(hidden, unembedding.astype(hidden.dtype), targets, weights)


def _logits(unembedding: Array, x: Array, options: Options) -> tuple[Array, Array]:
    """One device's share of a chunk's logits, [V, tokens], and the ids [V, 1] they are of."""
    local_size = unembedding.shape[0]
    ids = jax.lax.axis_index(options.vocab_axis) * local_size + jnp.arange(local_size)[:, None]
    vocab_size = local_size * jax.lax.axis_size(options.vocab_axis)
    scores = jnp.einsum("vd,nd->vn", unembedding, x, preferred_element_type=jnp.float32)
    keywords = {"vocab_size": vocab_size, "vocab_padding": options.vocab_padding, "soft_cap": options.soft_cap}
    return logits.finished(scores, ids, **keywords), ids


def _local(hidden, unembedding, targets, weights, *, options, with_gradients):
    """One device's share: its rows against its slice of the vocabulary.

    A chunk's logits are [V, tokens]: products contract their left side's last axis, the fast form on CPU, and tokens
    fill the lanes of a TPU. Exponentials are not normalized before they are multiplied, and a row of ones among the
    unembeddings sums them: so between the products no pass over the logits is left that a TPU could not fuse. A CPU
    takes longer for a pass that exponentiates and rounds than for one of each.
    """
    dim, vocab_axis, soft_cap = hidden.shape[-1], options.vocab_axis, options.soft_cap
    ones = jnp.ones((unembedding.shape[0], 1), unembedding.dtype)
    # Transposed before it is joined, on CPU; elsewhere the two transpositions are none, and XLA does both in one pass.
    with_ones = row_major(jnp.concatenate([row_major(unembedding.T).T, ones], axis=1).T)

    def chunked(x):
        return x.reshape(options.num_chunks, -1, *x.shape[2:])

    def chunk_step(carry, chunk):
        loss_sum, d_table = carry
        x, target, weight = chunk
        scores, ids = _logits(unembedding, x, options)
        is_target = ids == target[None]
        inside = (target >= ids[0]) & (target <= ids[-1])  # outside the slice: another device has it
        target_row = jnp.take(unembedding, target - ids[0], axis=0, mode="clip").astype(jnp.float32)
        target_row = jax.lax.psum(jnp.where(inside[:, None], target_row, 0), vocab_axis)
        target_logit = jnp.sum(target_row * x.astype(jnp.float32), axis=1)
        if soft_cap:
            target_logit = soft_cap * jnp.tanh(target_logit / soft_cap)
        maximum = jax.lax.pmax(jnp.max(scores, axis=0), vocab_axis)
        exponentials = jnp.exp(scores - maximum[None])
        mixed = None
        if with_gradients:
            exponentials = row_major(exponentials)
            if soft_cap:
                sloped = exponentials * (1 - jnp.square(scores / soft_cap))
            else:  # rounded once, for both products: at the maximum, where the most cancels below, it is exactly 1
                sloped = row_major(exponentials.astype(x.dtype))
            mixed = jnp.einsum("dv,vn->dn", with_ones, sloped.astype(x.dtype), preferred_element_type=jnp.float32)
            mixed = jax.lax.psum(mixed, vocab_axis)
        if mixed is None or soft_cap:
            normalizer = jax.lax.psum(jnp.sum(exponentials, axis=0), vocab_axis)
        else:
            normalizer = mixed[dim]
        log_z = jnp.log(normalizer) + maximum
        nll = log_z - target_logit
        loss = jnp.sum((nll + options.z_loss_multiplier * jnp.square(log_z)) * weight)
        d_x = None
        if mixed is not None:
            z_slope = 1 + 2 * options.z_loss_multiplier * log_z
            slope = weight * z_slope / normalizer
            cap_slope = 1 - jnp.square(target_logit / soft_cap) if soft_cap else jnp.ones_like(target_logit)
            d_scores = sloped - jnp.where(is_target, (cap_slope * normalizer / z_slope)[None], 0)
            scaled = (x * slope[:, None]).astype(x.dtype)
            d_table += jnp.einsum("vn,nd->vd", d_scores.astype(x.dtype), scaled, preferred_element_type=jnp.float32)
            d_x = mixed[:dim].T * slope[:, None] - target_row * (weight * cap_slope)[:, None]
            d_x = d_x.astype(x.dtype)
        return (loss_sum + loss, d_table), (nll, d_x)

    d_table = jnp.zeros(unembedding.shape, jnp.float32) if with_gradients else None
    chunks = (chunked(hidden), chunked(targets), chunked(weights))
    (loss_sum, d_table), (nll, d_hidden) = jax.lax.scan(chunk_step, (jnp.zeros((), jnp.float32), d_table), chunks)
    losses = jax.lax.psum(loss_sum, options.batch_axes), nll.reshape(targets.shape)
    if d_hidden is None:
        return losses, None
    # Over one device there is nothing to sum, and XLA's CPU backend would copy the whole table for it.
    axes = [axis for axis in options.batch_axes if jax.lax.axis_size(axis) > 1]
    if options.embed_axis in axes:
        d_table = jax.lax.psum_scatter(d_table, options.embed_axis, scatter_dimension=1, tiled=True)
    others = tuple(axis for axis in axes if axis != options.embed_axis)
    return losses, (d_hidden.reshape(hidden.shape), jax.lax.psum(d_table, others))
