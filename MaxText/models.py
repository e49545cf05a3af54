"""The Transformer, and the only place where a config becomes modules.

`build` makes one with real weights, `abstract` the same without any: its structure, the shapes of its parameters and
their logical axes. Parameters are a plain nested dict, whose paths are the checkpoint's, the decay mask's and the
export's names.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import FrozenConfigDict

from MaxText.layers import parameters
from MaxText.layers.attention import Attention
from MaxText.layers.decoder import CHECKPOINT_NAMES, Decoder, DecoderLayer
from MaxText.layers.embeddings import Embed
from MaxText.layers.mlp import SwiGLU
from MaxText.layers.normalizations import RMSNorm
from MaxText.sharding import path_name, shard


class Transformer(nnx.Module):
    """Decoder-only language model; `unembedding` is the token embedding where weights are tied."""

    def __init__(self, token_embedder: Embed, decoder: Decoder, logits_dense: nnx.Param | None):
        self.token_embedder = token_embedder
        self.decoder = decoder
        if logits_dense is not None:
            self.logits_dense = logits_dense

    def __call__(
        self, inputs: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """The normalized last hidden states."""
        return self.decoder(self.token_embedder(inputs), positions, segment_ids)

    @property
    def unembedding(self) -> Float[Array, "V D"]:
        """The output projection, one row for each token."""
        return self.logits_dense[...] if hasattr(self, "logits_dense") else self.token_embedder.embedding[...]

    def logits(
        self, inputs: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
    ) -> Float[Array, "B T V"]:
        """Every token's score at every position, in float32."""
        hidden = self(inputs, positions, segment_ids)
        table = self.unembedding.astype(hidden.dtype)
        scores = jax.numpy.einsum("btd,vd->btv", hidden, table, preferred_element_type=jax.numpy.float32)
        return shard(scores, "activation_batch", "activation_length", "activation_vocab")


def build(config: FrozenConfigDict, rngs: nnx.Rngs) -> Transformer:
    """The model that the config describes, with freshly initialized weights.

    Source: initialization: Radford et al. 2019 (GPT-2), section 2.3: normal, the projections that write to the residual
    stream scaled by 1/sqrt(2L).
    """
    dim, stddev = config.base_emb_dim, config.initializer_range
    out_stddev = stddev / (2 * config.base_num_decoder_layers) ** 0.5
    types = {"dtype": config.dtype, "weight_dtype": config.weight_dtype}

    def norm() -> RMSNorm:
        return RMSNorm(dim, epsilon=config.normalization_layer_epsilon, weight_dtype=config.weight_dtype)

    def layer(rngs: nnx.Rngs) -> DecoderLayer:
        return DecoderLayer(
            attention=Attention(
                dim,
                config.base_num_query_heads,
                config.base_num_kv_heads,
                config.head_dim,
                implementation=config.attention,
                stddev=stddev,
                out_stddev=out_stddev,
                **types,
                rngs=rngs,
            ),
            mlp=SwiGLU(dim, config.base_mlp_dim, stddev=stddev, out_stddev=out_stddev, **types, rngs=rngs),
            attention_norm=norm(),
            mlp_norm=norm(),
        )

    embed = Embed(config.vocab_size, dim, stddev=stddev, **types, rngs=rngs)
    decoder = Decoder(
        layer,
        config.base_num_decoder_layers,
        norm=norm(),
        head_dim=config.head_dim,
        rope_max_timescale=config.rope_max_timescale,
        remat_policy=config.remat_policy,
        checkpoint_places=tuple(config[name] for name in CHECKPOINT_NAMES),
        rngs=rngs,
    )
    untied = None
    if not config.logits_via_embedding:
        shape, axes = (config.vocab_size, dim), ("vocab", "embed")
        untied = parameters.weight(rngs, shape, axes, stddev=stddev, dtype=config.weight_dtype)
    return Transformer(embed, decoder, untied)


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
