"""One decoder layer, and the stack of them: a scan over layers with a rematerialization policy.

The stack's parameters have a leading axis `layers`, so the compiled program holds one layer whatever the depth is.
"""

from collections.abc import Callable

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from MaxText.layers import parameters, rope
from MaxText.layers.attention import Attention
from MaxText.layers.mlp import SwiGLU
from MaxText.layers.normalizations import RMSNorm
from MaxText.sharding import shard

# The tensors of a layer that the custom policy names, in order of computation; each is a config key.
CHECKPOINT_NAMES = (
    "decoder_layer_input",
    "query_proj",
    "key_proj",
    "value_proj",
    "context",
    "out_proj",
    "mlpwi_0",
    "mlpwi_1",
    "mlpwo",
)


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then that plus mlp(norm(that))."""

    def __init__(self, *, attention: Attention, mlp: SwiGLU, attention_norm: RMSNorm, mlp_norm: RMSNorm):
        self.pre_self_attention_layer_norm = attention_norm
        self.self_attention = attention
        self.post_self_attention_layer_norm = mlp_norm
        self.mlp = mlp

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cosine: Float[Array, "B T 1 h"],
        sine: Float[Array, "B T 1 h"],
        segment_ids: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        x = checkpoint_name(x, "decoder_layer_input")
        x = x + self.self_attention(self.pre_self_attention_layer_norm(x), cosine, sine, segment_ids)
        x = x + self.mlp(self.post_self_attention_layer_norm(x))
        return shard(x, "activation_batch", "activation_length", "activation_embed")


class Decoder(nnx.Module):
    """num_layers decoder layers and a last normalization.

    Args:
        remat_policy: none | minimal | full | custom, see `remat`.
        checkpoint_places: for custom, where each of CHECKPOINT_NAMES goes: remat | device | offload.
    """

    def __init__(
        self,
        make_layer: Callable[[nnx.Rngs], DecoderLayer],
        num_layers: int,
        *,
        norm: RMSNorm,
        head_dim: int,
        rope_max_timescale: float,
        remat_policy: str,
        checkpoint_places: tuple[str, ...],
        rngs: nnx.Rngs,
    ):
        self.layers = parameters.stacked(make_layer, num_layers, rngs)
        self.decoder_norm = norm
        self.head_dim = head_dim
        self.rope_max_timescale = rope_max_timescale
        self.remat_policy = remat_policy
        self.checkpoint_places = checkpoint_places

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        cosine, sine = rope.tables(positions, self.head_dim, self.rope_max_timescale)
        structure, weights = nnx.split(self.layers)

        def layer(x, layer_weights):
            return nnx.merge(structure, layer_weights)(x, cosine, sine, segment_ids), None

        x, _ = jax.lax.scan(remat(layer, self.remat_policy, self.checkpoint_places), x, weights)
        return self.decoder_norm(x)


def remat(layer: Callable, policy: str, places: tuple[str, ...]) -> Callable:
    """The layer, with the backward pass told what of it to keep and what to recompute."""
    policies = jax.checkpoint_policies
    if policy == "none":
        return layer
    if policy == "minimal":
        # All but what the next layer's input gives: by name, so that a fused kernel counts as its result and no more.
        keep = policies.save_only_these_names(*CHECKPOINT_NAMES[1:-1])
    elif policy == "full":
        keep = policies.nothing_saveable
    elif policy == "custom":
        kept = {
            where: [n for n, p in zip(CHECKPOINT_NAMES, places, strict=True) if p == where]
            for where in ("device", "offload")
        }
        keep = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=kept["device"],
            names_which_can_be_offloaded=kept["offload"],
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        raise ValueError(f"remat_policy={policy!r} is none of none, minimal, full, custom")
    return jax.checkpoint(layer, policy=keep, prevent_cse=False)
