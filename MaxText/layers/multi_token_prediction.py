"""Multi-token prediction: a chain of small heads that predict tokens further ahead, sharing embedding and unembedding.

Head k reads the state of the one before it (the first: the trunk's) and the token k places ahead, and predicts the one
after that. Everything is per document: a token of the next one is neither read nor counted.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Shaped

from MaxText.kernels.projection import project
from MaxText.layers import parameters
from MaxText.layers.decoder import DecoderLayer, remat
from MaxText.layers.normalizations import RMSNorm
from MaxText.sharding import shard


class Head(nnx.Module):
    """[norm(state); norm(token)] projected to one width, an optional decoder layer, and a norm for the unembedding."""

    def __init__(
        self,
        dim: int,
        *,
        make_norm: Callable[[], RMSNorm],
        block: DecoderLayer | None,
        stddev: float,
        weight_dtype: str,
        rngs: nnx.Rngs,
    ):
        self.hidden_norm, self.token_norm, self.final_norm = make_norm(), make_norm(), make_norm()
        self.projection = parameters.weight(
            rngs, (2 * dim, dim), ("embed", "mtp_output"), stddev=stddev, dtype=weight_dtype
        )
        if block is not None:
            self.block = block

    def __call__(self, state: Float[Array, "B T D"], tokens: Float[Array, "B T D"], *layer_inputs) -> Array:
        """The next state, not yet normalized.

        Args:
            layer_inputs: what a decoder layer takes after x.
        """
        state = self.joined(state, tokens)
        return self.block(state, *layer_inputs) if hasattr(self, "block") else state

    def joined(self, state: Float[Array, "B T D"], tokens: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """State and token projected to one width."""
        both = jnp.concatenate([self.hidden_norm(state), self.token_norm(tokens)], axis=-1)
        state = project("btc,cd->btd", both, self.projection[...])  # pyright: ignore[reportAssignmentType]
        return shard(state, "activation_batch", "activation_length", "activation_embed")


class MultiTokenPrediction(nnx.Module):
    """num_layers heads in a chain.

    Source: DeepSeek-AI 2024 (DeepSeek-V3), arXiv:2412.19437, section 2.2.
    """

    def __init__(
        self,
        make_head: Callable[[nnx.Rngs], Head],
        num_layers: int,
        *,
        remat_policy: str,
        checkpoint_places: tuple[str, ...],
        rngs: nnx.Rngs,
    ):
        self.layers = parameters.stacked(make_head, num_layers, rngs)
        self.num_layers = num_layers
        self.remat_policy = remat_policy
        self.checkpoint_places = checkpoint_places

    def __call__(
        self,
        state: Float[Array, "B T D"],
        tokens: Sequence[Float[Array, "B T D"]],
        cosine: Float[Array, "B T h"],
        sine: Float[Array, "B T h"],
        segment_ids: Int[Array, "B T"],
        dropout_keys: Key[Array, "B"] | None,
        depth: int,
    ) -> list[Float[Array, "B T D"]]:
        """What the unembedding takes from each head.

        Args:
            state: the trunk's, before its last normalization.
            tokens: for each head, the embedding of the token it reads at each position.
            depth: the number of decoder layers before the first head.
        """
        structure, weights = nnx.split(self.layers)

        def step(head_weights: Any, state: Array, token: Array, depth: Array) -> tuple[Array, Array]:
            head = nnx.merge(structure, head_weights)
            state = head(state, token, cosine, sine, segment_ids, dropout_keys, depth)
            return state, head.final_norm(state)

        step = remat(step, self.remat_policy, self.checkpoint_places)
        hidden = []
        for k, token in enumerate(tokens):
            head_weights = jax.tree.map(lambda leaf, k=k: leaf[k], weights)
            state, normalized = step(head_weights, state, token, jnp.array(depth + k))
            hidden.append(normalized)
        return hidden


def ahead(
    targets: Int[Array, "B T"], weights: Float[Array, "B T"], count: int
) -> list[tuple[Int[Array, "B T"], Float[Array, "B T"]]]:
    """For 1, 2, ... count places ahead: the token there, and 1 where it is of the position's document, else 0.

    Args:
        targets: the next token of each position.
        weights: 1 where that is of the same document, else 0.
    """
    found = []
    counted = jnp.ones_like(weights)
    for by in range(count):
        counted = counted * shifted(weights, by)
        found.append((shifted(targets, by), counted))
    return found


def shifted(x: Shaped[Array, "B T"], by: int) -> Shaped[Array, "B T"]:
    """What stands `by` places further on; 0 past the end."""
    return jnp.pad(x[:, by:], ((0, 0), (0, by)))
