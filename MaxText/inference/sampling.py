"""The choice of the next token: temperature, top-k, top-p, min-p, one random number a token.

Every row has its own settings and its own seed, and the random number is a function of the seed and of how many
tokens the row has: so a text does not depend on what else is in the batch, nor on how many tokens are made at once.
Cutoffs are found by bisecting probabilities, not by sorting them: the same set, ties kept together.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TOP_LOGPROBS = 5  # alternatives that can be told beside the chosen token
_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """One value for each row: [B], or of one row a scalar.

    Attributes:
        temperature: float32, as top_p and min_p; 0 takes the likeliest token.
        top_k: int32; only the k likeliest; 0 = all.
        top_p: of those, the likeliest that together have this share.
        min_p: of those, the ones at least this much as likely as the likeliest.
        seed: uint32.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    seed: Any


def choose(scores: Float[Array, "B T V"], settings: Settings, count: Int[Array, "B"]) -> Int[Array, "B T"]:
    """A token for each place: place t of a row is the row's token number count + t, from 0."""
    batch, length, size = scores.shape
    flat = scores.reshape(batch * length, size)
    each = jax.tree.map(lambda x: jnp.repeat(x, length), settings)
    numbers = (count[:, None] + jnp.arange(length)[None]).reshape(-1)
    top = likeliest(flat)

    def sampled() -> Array:
        drawn = _draw(_weights(flat, each), _uniform(each.seed, numbers), top)
        return jnp.where(each.temperature > 0, drawn, top)

    tokens = jax.lax.cond(jnp.any(settings.temperature > 0), sampled, lambda: top)
    return tokens.reshape(batch, length)


def likeliest(scores: Float[Array, "... V"]) -> Int[Array, "..."]:
    """The first of the highest, as jnp.argmax, in two plain reductions: XLA does not vectorize argmax on CPUs."""
    ids = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    is_top = scores == jnp.max(scores, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_top, ids, scores.shape[-1] - 1), axis=-1)


def log_probabilities(scores: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """The model's own log-probability of each token, whatever the sampling."""
    chosen = jnp.take_along_axis(scores, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(scores, axis=-1)


def alternatives(scores: Float[Array, "B T V"], wanted: Array) -> tuple[Int[Array, "B T 5"], Float[Array, "B T 5"]]:
    """The likeliest tokens with their log-probabilities, where any row wants them; else zeros."""
    shape = (*scores.shape[:2], TOP_LOGPROBS)

    def found() -> tuple[Array, Array]:
        values, ids = jax.lax.top_k(scores, TOP_LOGPROBS)
        return ids.astype(jnp.int32), values - jax.nn.logsumexp(scores, axis=-1, keepdims=True)

    return jax.lax.cond(jnp.any(wanted), found, lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, scores.dtype)))


def _uniform(seed: Array, number: Int[Array, "R"]) -> Float[Array, "R"]:
    def one(seed: Array, number: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), number))

    return jax.vmap(one)(seed, number)


def _weights(scores: Float[Array, "R V"], settings: Settings) -> Float[Array, "R V"]:
    """What each token may be drawn with: its probability over the likeliest one's, or 0."""
    temperature = jnp.where(settings.temperature > 0, settings.temperature, 1.0)
    scaled = (scores - jnp.max(scores, axis=-1, keepdims=True)) / temperature[:, None]
    weights = jnp.exp(scaled)  # of a padding id 0: its score is too low
    cut = (settings.temperature > 0) & ((settings.top_k > 0) | (settings.top_p < 1))
    weights = jax.lax.cond(jnp.any(cut), lambda: _top(weights, settings.top_k, settings.top_p), lambda: weights)
    return jnp.where(weights >= settings.min_p[:, None], weights, 0.0)


def _top(weights: Float[Array, "R V"], top_k: Int[Array, "R"], top_p: Float[Array, "R"]) -> Float[Array, "R V"]:
    top_k = jnp.where(top_k > 0, top_k, weights.shape[-1])
    least = _largest_cutoff(lambda cutoff: jnp.sum(weights >= cutoff[:, None], axis=-1) >= top_k, weights)
    weights = jnp.where(weights >= least[:, None], weights, 0.0)

    def share(cutoff: Array) -> Array:
        return jnp.sum(jnp.where(weights >= cutoff[:, None], weights, 0.0), axis=-1)

    # Of all, not of their rounded sum: with top_p 1 none is cut off.
    enough = jnp.where(top_p < 1, top_p, 2.0) * jnp.sum(weights, axis=-1)
    least = _largest_cutoff(lambda cutoff: share(cutoff) >= enough, weights)
    return jnp.where(weights >= least[:, None], weights, 0.0)


def _largest_cutoff(holds: Callable[[Array], Array], weights: Float[Array, "R V"]) -> Float[Array, "R"]:
    """The largest float32 in [0, 1] for which `holds`, or 0; what holds for one holds for all smaller ones.

    Floats that are not negative are ordered as their bits are as integers, so 30 halvings find it exactly.
    """

    def value(bits: Array) -> Array:
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def halve(_: int | Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # low holds, high does not
        middle = (low + high) // 2
        good = holds(value(middle))
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
    low = jnp.zeros(weights.shape[0], jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, one + 1)))
    return value(low)


def _draw(weights: Float[Array, "R V"], uniform: Float[Array, "R"], fallback: Int[Array, "R"]) -> Int[Array, "R"]:
    """The token at which the running sum passes `uniform` of the whole, first by blocks and then within one."""
    rows, size = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -size % _BLOCK))).reshape(rows, -1, _BLOCK)
    block_sums = jnp.sum(blocks, axis=-1)
    upto = jnp.cumsum(block_sums, axis=-1)
    target = uniform * upto[:, -1]
    block = jnp.sum(upto <= target[:, None], axis=-1)
    block = jnp.minimum(block, block_sums.shape[-1] - 1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    before = jnp.take_along_axis(upto - block_sums, block[:, None], axis=1)[:, 0]
    place = jnp.sum(jnp.cumsum(inside, axis=-1) <= (target - before)[:, None], axis=-1)
    token = jnp.minimum(block * _BLOCK + place, size - 1)
    # Rounding may lead to a token that must not be drawn, about once in ten million times.
    return jnp.where(jnp.take_along_axis(weights, token[:, None], axis=-1)[:, 0] > 0, token, fallback)
