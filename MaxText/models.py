"""The Transformer, and the only place where a config becomes modules.

`build` makes one with real weights, `abstract` the same without any: its structure, the shapes of its parameters and
their logical axes. Parameters are a plain nested dict, whose paths are the checkpoint's, the decay mask's and the
export's names.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key
from ml_collections import FrozenConfigDict

from MaxText.kernels import logits
from MaxText.layers import multi_token_prediction, parameters
from MaxText.layers.attention import Attention
from MaxText.layers.decoder import CHECKPOINT_NAMES, Decoder, DecoderLayer
from MaxText.layers.differential_attention import DifferentialAttention, DifferentialAttentionV2
from MaxText.layers.dropout import dropout
from MaxText.layers.embeddings import Embed
from MaxText.layers.mlp import SwiGLU
from MaxText.layers.multi_token_prediction import MultiTokenPrediction
from MaxText.layers.normalizations import RMSNorm
from MaxText.layers.rope import Rotary
from MaxText.sharding import path_name, shard

ATTENTION_TYPES = {
    "standard": Attention,
    "differential": DifferentialAttention,
    "differential_v2": DifferentialAttentionV2,
}


class Transformer(nnx.Module):
    """Decoder-only language model; `unembedding` is the token embedding where weights are tied."""

    def __init__(
        self,
        token_embedder: Embed,
        decoder: Decoder,
        *,
        rotary: Rotary,
        logits_dense: nnx.Param | None,
        mtp: MultiTokenPrediction | None,
        vocab_padding: int,
        soft_cap: float,
        dropout_rate: float,
    ):
        self.token_embedder = token_embedder
        self.decoder = decoder
        self.rotary = rotary
        self.vocab_padding = vocab_padding
        self.soft_cap = soft_cap
        self.dropout_rate = dropout_rate
        if logits_dense is not None:
            self.logits_dense = logits_dense
        if mtp is not None:
            self.mtp = mtp

    def __call__(
        self, inputs: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """The normalized last hidden states."""
        state = self.decoder(self.token_embedder(inputs), *self.rotary.tables(positions), segment_ids, None)
        return self.decoder.decoder_norm(state)

    def of_all_heads(
        self,
        inputs: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        weights: Float[Array, "B T"],
        dropout_keys: Key[Array, "B"] | None,
    ) -> list[Float[Array, "B T D"]]:
        """The normalized last hidden states, and what each multi-token prediction head has beside them.

        Args:
            targets: the token after each input.
            weights: 1 where that is of the same document, else 0.
            dropout_keys: one for each row; None drops nothing.
        """
        layer_inputs = (*self.rotary.tables(positions), segment_ids, dropout_keys)
        embedded = dropout(self.token_embedder(inputs), self.dropout_rate, dropout_keys, 0)
        state = self.decoder(embedded, *layer_inputs)
        hidden = [self.decoder.decoder_norm(state)]
        if hasattr(self, "mtp"):
            ahead = multi_token_prediction.ahead(targets, weights, self.mtp.num_layers)
            tokens = [self.token_embedder(token) * weight[..., None].astype(state.dtype) for token, weight in ahead]
            hidden += self.mtp(state, tokens, *layer_inputs, depth=self.decoder.num_layers)
        return hidden

    @property
    def unembedding(self) -> Float[Array, "V D"]:
        """The output projection, one row for each token."""
        return self.logits_dense[...] if hasattr(self, "logits_dense") else self.token_embedder.embedding[...]

    def logits(
        self, inputs: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
    ) -> Float[Array, "B T V"]:
        """Every token's score at every position, in float32; a padding id's is too low ever to be sampled."""
        return self.scores(self(inputs, positions, segment_ids))

    def scores(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The logits of normalized last hidden states."""
        table = self.unembedding.astype(hidden.dtype)
        scores = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
        ids, size = jnp.arange(table.shape[0])[None, None], table.shape[0]
        scores = logits.finished(scores, ids, vocab_size=size, vocab_padding=self.vocab_padding, soft_cap=self.soft_cap)
        return shard(scores, "activation_batch", "activation_length", "activation_vocab")


def build(config: FrozenConfigDict, rngs: nnx.Rngs) -> Transformer:
    """The model that the config describes, with freshly initialized weights.

    Source: initialization: Radford et al. 2019 (GPT-2), section 2.3: normal, the projections that write to the residual
    stream scaled by 1/sqrt(2L); or by 0, as in Zhang et al. 2019 (Fixup), arXiv:1901.09321, section 3.
    """
    dim, stddev = config.base_emb_dim, config.initializer_range
    scale = config.residual_init_scale
    out_stddev = stddev * ((2 * config.base_num_decoder_layers) ** -0.5 if scale == -1 else scale)
    types = {"dtype": config.dtype, "weight_dtype": config.weight_dtype}

    def norm() -> RMSNorm:
        return RMSNorm(dim, epsilon=config.normalization_layer_epsilon, weight_dtype=config.weight_dtype)

    def layer(rngs: nnx.Rngs) -> DecoderLayer:
        return DecoderLayer(
            attention=ATTENTION_TYPES[config.attention_type](
                dim,
                config.base_num_query_heads,
                config.base_num_kv_heads,
                config.head_dim,
                epsilon=config.normalization_layer_epsilon,
                use_qk_norm=config.use_qk_norm,
                implementation=config.attention,
                stddev=stddev,
                out_stddev=out_stddev,
                **types,
                rngs=rngs,
            ),
            mlp=SwiGLU(dim, config.base_mlp_dim, stddev=stddev, out_stddev=out_stddev, **types, rngs=rngs),
            attention_norm=norm(),
            mlp_norm=norm(),
            dropout_rate=config.dropout_rate,
        )

    def head(rngs: nnx.Rngs) -> multi_token_prediction.Head:
        block = layer(rngs) if config.mtp_transformer_block else None
        values = {"stddev": stddev, "weight_dtype": config.weight_dtype}
        return multi_token_prediction.Head(dim, make_norm=norm, block=block, **values, rngs=rngs)

    memory = {
        "remat_policy": config.remat_policy,
        "checkpoint_places": tuple(config[name] for name in CHECKPOINT_NAMES),
    }
    embed = Embed(config.vocab_size, dim, stddev=stddev, **types, rngs=rngs)
    decoder = Decoder(layer, config.base_num_decoder_layers, norm=norm(), **memory, rngs=rngs)
    untied = None
    if not config.logits_via_embedding:
        shape, axes = (config.vocab_size, dim), ("vocab", "embed")
        untied = parameters.weight(rngs, shape, axes, stddev=stddev, dtype=config.weight_dtype)
    mtp = MultiTokenPrediction(head, config.mtp_num_layers, **memory, rngs=rngs) if config.mtp_num_layers else None
    rotary = Rotary(
        config.head_dim,
        config.rope_max_timescale,
        factor=config.rope_factor,
        trained_length=config.original_max_position_embeddings,
        beta_fast=config.beta_fast,
        beta_slow=config.beta_slow,
    )
    return Transformer(
        embed,
        decoder,
        rotary=rotary,
        logits_dense=untied,
        mtp=mtp,
        vocab_padding=config.vocab_padding,
        soft_cap=config.final_logits_soft_cap,
        dropout_rate=config.dropout_rate,
    )


@dataclasses.dataclass(frozen=True)
class AbstractModel:
    """A model without its weights: merging parameters into `structure` gives a Transformer."""

    structure: nnx.GraphDef
    params: Any  # nested dict of jax.ShapeDtypeStruct
    logical_axes: Any  # the same nested dict, of tuples of names

    def merge(self, params: Any) -> Transformer:
        """The model with these parameters: a pure function of them."""
        return nnx.merge(self.structure, nnx.State(params))


def abstract(config: FrozenConfigDict) -> AbstractModel:
    """Structure, parameter shapes and logical axes of the config's model; nothing is allocated."""
    structure, state = nnx.split(nnx.eval_shape(lambda: build(config, nnx.Rngs(params=0))))
    axes = jax.tree.map(
        lambda p: p.get_metadata()["logical_axes"], state, is_leaf=lambda node: isinstance(node, nnx.Param)
    )
    return AbstractModel(structure, nnx.to_pure_dict(state), nnx.to_pure_dict(axes))


def initial_params(config: FrozenConfigDict, key: jax.Array) -> Any:
    """Freshly initialized parameters as a nested dict: a pure function of the key."""
    return nnx.to_pure_dict(nnx.state(build(config, nnx.Rngs(params=key))))


def parameter_paths(params: Any) -> list[str]:
    """The dotted names of all parameters, in tree order."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
