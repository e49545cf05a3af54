"""The compiled programs of generation: reading a prompt, and steps that write tokens for all rows at once.

A step reads, for each row, the token chosen last and what the multi-token prediction heads guess after it; it chooses a
token after each of them, and keeps those up to and with the first that a guess is not. Every choice is made as without
guesses, from the same scores with the same random number: so guessing changes how many tokens a step gives, and
nothing else. Without heads a step gives one token. A prompt is read but for its last token, which the first step reads.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import FrozenConfigDict

from MaxText import models
from MaxText.inference import sampling
from MaxText.inference.sampling import Settings
from MaxText.inference.weights import Weights
from MaxText.kernels import logits
from MaxText.layers.memory import Memory
from MaxText.sharding import shard

NO_GUESS = -1  # no token has this id


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memories:
    """One memory for each decoder layer, and for each head that has a layer."""

    layers: tuple[Memory, ...]
    heads: tuple[Memory, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The state of B texts that are being written.

    Attributes:
        length: how many tokens are in the memories.
        token: the one that comes next.
        guesses: [B, heads], what the heads think comes after it.
        count: tokens written so far.
        with_alternatives: whether the row wants to know them.
        allowed: [B, V], which tokens may be the first.
    """

    memories: Memories
    length: Int[Array, "B"]
    token: Int[Array, "B"]
    guesses: Int[Array, "B heads"]
    count: Int[Array, "B"]
    settings: Settings
    with_alternatives: Array
    allowed: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Written:
    """What some steps wrote: of each step and row the first `num` of W tokens count; arrays are [steps, B, ...]."""

    tokens: Any
    num: Any
    log_probabilities: Any
    alternatives: Any  # ids and log-probabilities


class Program:
    """The programs of one model on one mesh; jitted, so compiled at the first call with new shapes.

    Args:
        num_guesses: how many heads guess; 0 = none.
    """

    def __init__(self, config: FrozenConfigDict, mesh: jax.sharding.Mesh, num_guesses: int):
        if not 0 <= num_guesses <= config.mtp_num_layers:
            raise ValueError(
                f"speculative_tokens={num_guesses}, but the model has mtp_num_layers={config.mtp_num_layers} heads "
                f"that can guess; use at most {config.mtp_num_layers}"
            )
        self.config, self.mesh, self.num_guesses = config, mesh, num_guesses
        self.model = models.abstract(config)
        self.batch_shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self.read = jax.jit(self._read)
        self.write = jax.jit(self._write, static_argnums=2, donate_argnums=1)
        self.place = jax.jit(self._place, donate_argnums=0)
        self.lengthen = jax.jit(self._lengthen, static_argnums=1)
        self.empty_rows = jax.jit(self._empty_rows, static_argnums=(0, 1))

    def _parts(self, weights: Weights) -> tuple[models.Transformer, Any, Any]:
        """The model without layers, and what makes a layer, and a head, of its weights."""
        shapes = self.model.params
        rest = weights.rest | {"decoder": weights.rest["decoder"] | {"layers": shapes["decoder"]["layers"]}}
        if self.config.mtp_num_layers:
            rest["mtp"] = shapes["mtp"]
        transformer = self.model.merge(rest)
        layer_structure, _ = nnx.split(transformer.decoder.layers)
        head_structure = nnx.split(transformer.mtp.layers)[0] if self.config.mtp_num_layers else None

        def made(structure: Any, weights: Any) -> Any:
            return nnx.merge(structure, nnx.State(weights))

        return transformer, functools.partial(made, layer_structure), functools.partial(made, head_structure)

    def extend(
        self, weights: Weights, memories: tuple[Memory, ...], tokens: Int[Array, "B T"], first: Int[Array, "B"]
    ) -> tuple[Float[Array, "B T D"], tuple[Memory, ...]]:
        """The trunk's states of T more tokens of each row, and the memories with them."""
        transformer, layer, _ = self._parts(weights)
        state = transformer.token_embedder(tokens)
        tables = self._tables(transformer, first, tokens.shape[1])
        grown = []
        for depth, (layer_weights, memory) in enumerate(zip(weights.layers, memories, strict=True)):
            state, memory = layer(layer_weights).recall(state, *tables, memory, first, jnp.array(depth))
            grown.append(memory)
        return state, tuple(grown)

    @staticmethod
    def _tables(transformer: models.Transformer, first: Array, length: int) -> tuple[Array, Array]:
        return transformer.rotary.tables(first[:, None] + jnp.arange(length)[None])

    def _guess(
        self,
        weights: Weights,
        memories: tuple[Memory, ...],
        state: Float[Array, "B T D"],
        following: Int[Array, "B T"],
        last: Int[Array, "B"],
        first: Int[Array, "B"],
    ) -> tuple[Int[Array, "B heads"], tuple[Memory, ...]]:
        """What each head thinks comes after the newest token, in turn; and their memories with the places of `state`.

        A head's memory keeps what it made of a guess that turned out wrong: later guesses may suffer, the text cannot.

        Args:
            following: the token after each place; what is after `last` does not count.
            last: the place before the newest token.
        """
        if not self.num_guesses:
            return jnp.zeros((state.shape[0], 0), jnp.int32), memories
        transformer, _, head_of = self._parts(weights)
        tables = self._tables(transformer, first, state.shape[1])
        places = jnp.arange(state.shape[1])[None]
        grown, guesses = list(memories), []
        for k in range(self.num_guesses):
            head = head_of(weights.heads[k])
            state = head.joined(state, transformer.token_embedder(following))
            if memories:
                depth = jnp.array(len(weights.layers) + k)
                state, grown[k] = head.block.recall(state, *tables, memories[k], first, depth)
            newest = jnp.take_along_axis(state, last[:, None, None], axis=1)
            guess = sampling.likeliest(transformer.scores(head.final_norm(newest)))
            guesses.append(guess)
            # The next head reads one token further on.
            following = jnp.where(places < last[:, None], jnp.roll(following, -1, axis=1), guess)
        return jnp.concatenate(guesses, axis=1), tuple(grown)

    def _read(self, weights: Weights, tokens: Int[Array, "R T_1"]) -> Memories:
        """The memories of prompts, all tokens of which but the last are read; padding behind them does no harm."""
        rows, length = tokens.shape[0], tokens.shape[1] - 1
        empty = self._empty_memories(rows, length)
        first = jnp.zeros(rows, jnp.int32)
        state, layers = self.extend(weights, empty.layers, tokens[:, :-1], first)
        if not empty.heads:
            return Memories(layers, ())
        _, heads = self._guess(weights, empty.heads, state, tokens[:, 1:], jnp.full_like(first, length - 1), first)
        return Memories(layers, heads)

    def _write(self, weights: Weights, rows: Rows, steps: int) -> tuple[Rows, Written]:
        """`steps` steps of all rows."""
        return jax.lax.scan(lambda rows, _: self._step(weights, rows), rows, length=steps)

    def _step(self, weights: Weights, rows: Rows) -> tuple[Rows, Written]:
        tokens = jnp.concatenate([rows.token[:, None], rows.guesses], axis=1)
        state, layers = self.extend(weights, rows.memories.layers, tokens, rows.length)
        transformer, _, _ = self._parts(weights)
        scores = transformer.scores(transformer.decoder.decoder_norm(state))
        chosen = sampling.choose(self._allowed(rows, scores), rows.settings, rows.count)
        right = jnp.cumprod(chosen[:, :-1] == rows.guesses, axis=1)
        last = jnp.sum(right, axis=1)
        guesses, heads = self._guess(weights, rows.memories.heads, state, chosen, last, rows.length)
        written = Written(
            chosen,
            last + 1,
            sampling.log_probabilities(scores, chosen),
            sampling.alternatives(scores, rows.with_alternatives),
        )
        rows = dataclasses.replace(
            rows,
            memories=Memories(layers, heads),
            length=rows.length + last + 1,
            token=jnp.take_along_axis(chosen, last[:, None], axis=1)[:, 0],
            guesses=guesses,
            count=rows.count + last + 1,
        )
        return self._placed(rows), written

    @staticmethod
    def _allowed(rows: Rows, scores: Float[Array, "B T V"]) -> Float[Array, "B T V"]:
        """The scores, where a text begins only of the tokens it may begin with."""

        def masked() -> Array:
            first = (rows.count == 0)[:, None] & (jnp.arange(scores.shape[1]) == 0)[None]
            return jnp.where(first[..., None] & ~rows.allowed[:, None], logits.MASKED, scores)

        return jax.lax.cond(jnp.any(rows.count == 0), masked, lambda: scores)

    def _place(self, rows: Rows, prompt: Memories | None, row: Array, length: Array, token: Array, one: Any) -> Rows:
        """The rows with one of them begun anew, from the memories of a prompt of length + 1 tokens, the last `token`.

        Args:
            one: the row's settings, whether it wants alternatives, and the tokens it may begin with.
        """
        memories = rows.memories
        if prompt is not None:
            is_memory = {"is_leaf": lambda node: isinstance(node, Memory)}
            memories = jax.tree.map(lambda mine, new: mine.with_row(new, row), memories, prompt, **is_memory)
        settings, alternatives, allowed = one
        return self._placed(
            Rows(
                memories,
                rows.length.at[row].set(length),
                rows.token.at[row].set(token),
                rows.guesses.at[row].set(NO_GUESS),
                rows.count.at[row].set(0),
                jax.tree.map(lambda all_rows, value: all_rows.at[row].set(value), rows.settings, settings),
                rows.with_alternatives.at[row].set(alternatives),
                rows.allowed.at[row].set(allowed),
            )
        )

    def _lengthen(self, rows: Rows, length: int) -> Rows:
        is_memory = {"is_leaf": lambda node: isinstance(node, Memory)}
        longer = jax.tree.map(lambda memory: memory.longer(length), rows.memories, **is_memory)
        return self._placed(dataclasses.replace(rows, memories=longer))

    def _empty_rows(self, num_rows: int, length: int) -> Rows:
        whole, real = jnp.zeros(num_rows, jnp.int32), jnp.zeros(num_rows, jnp.float32)
        guesses = jnp.full((num_rows, self.num_guesses), NO_GUESS, jnp.int32)
        settings = Settings(real, whole, real, real, whole.astype(jnp.uint32))
        memories = self._empty_memories(num_rows, length)
        allowed = jnp.ones((num_rows, self.config.vocab_size), bool)
        return self._placed(Rows(memories, whole, whole, guesses, whole, settings, whole.astype(bool), allowed))

    def _empty_memories(self, num_rows: int, length: int) -> Memories:
        stacked = self.model.params["decoder"]["layers"]
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stacked)
        structure, _ = nnx.split(self.model.merge(self.model.params).decoder.layers)
        empty = nnx.merge(structure, nnx.State(shapes)).self_attention.empty_memory
        layers = tuple(empty(num_rows, length) for _ in range(self.config.base_num_decoder_layers))
        with_memory = self.num_guesses if self.config.mtp_transformer_block else 0
        return Memories(layers, tuple(empty(num_rows, length) for _ in range(with_memory)))

    def _placed(self, rows: Rows) -> Rows:
        """Everything but the memories, which place themselves, split over the rows."""

        def placed(x: Array) -> Array:
            return shard(x, "activation_batch", *([None] * (x.ndim - 1)))

        memories = rows.memories
        others = jax.tree.map(placed, dataclasses.replace(rows, memories=Memories((), ())))
        return dataclasses.replace(others, memories=memories)
