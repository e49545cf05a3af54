"""One decoder layer, and the stack of them: a scan over layers with a rematerialization policy.

The stack's parameters have a leading axis `layers`, so the compiled program holds one layer whatever the depth is.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from MaxText.layers import parameters
from MaxText.layers.attention import Attention
from MaxText.layers.dropout import dropout
from MaxText.layers.memory import Memory
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
    """x + attention(norm(x)), then that plus mlp(norm(that)); each with dropout before it is added."""

    def __init__(
        self, *, attention: Attention, mlp: SwiGLU, attention_norm: RMSNorm, mlp_norm: RMSNorm, dropout_rate: float
    ):
        self.pre_self_attention_layer_norm = attention_norm
        self.self_attention = attention
        self.post_self_attention_layer_norm = mlp_norm
        self.mlp = mlp
        self.dropout_rate = dropout_rate

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cosine: Float[Array, "B T h"],
        sine: Float[Array, "B T h"],
        segment_ids: Int[Array, "B T"],
        dropout_keys: Key[Array, "B"] | None,
        depth: Int[Array, ""],
    ) -> Float[Array, "B T D"]:
        x = checkpoint_name(x, "decoder_layer_input")
        attended = self.self_attention(self.pre_self_attention_layer_norm(x), cosine, sine, segment_ids, depth)
        x = x + dropout(attended, self.dropout_rate, dropout_keys, 1 + 2 * depth)
        transformed = self.mlp(self.post_self_attention_layer_norm(x))
        x = x + dropout(transformed, self.dropout_rate, dropout_keys, 2 + 2 * depth)
        return shard(x, "activation_batch", "activation_length", "activation_embed")

    def recall(
        self,
        x: Float[Array, "B T D"],
        cosine: Float[Array, "B T h"],
        sine: Float[Array, "B T h"],
        memory: Memory,
        first: Int[Array, "B"],
        depth: Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], Memory]:
        """As a call without dropout, where what is before x comes from a memory; see `Attention.recall`."""
        normalized = self.pre_self_attention_layer_norm(x)
        attended, memory = self.self_attention.recall(normalized, cosine, sine, memory, first, depth)
        x = x + attended
        x = x + self.mlp(self.post_self_attention_layer_norm(x))
        return shard(x, "activation_batch", "activation_length", "activation_embed"), memory


class Decoder(nnx.Module):
    """num_layers decoder layers; `decoder_norm` is for what they give.

    Args:
        remat_policy: none | minimal | attention | full | custom, see `remat`.
        checkpoint_places: for custom, where each of CHECKPOINT_NAMES goes: remat | device | offload.
    """

    def __init__(
        self,
        make_layer: Callable[[nnx.Rngs], DecoderLayer],
        num_layers: int,
        *,
        norm: RMSNorm,
        remat_policy: str,
        checkpoint_places: tuple[str, ...],
        rngs: nnx.Rngs,
    ):
        self.layers = parameters.stacked(make_layer, num_layers, rngs)
        self.num_layers = num_layers
        self.decoder_norm = norm
        self.remat_policy = remat_policy
        self.checkpoint_places = checkpoint_places

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cosine: Float[Array, "B T h"],
        sine: Float[Array, "B T h"],
        segment_ids: Int[Array, "B T"],
        dropout_keys: Key[Array, "B"] | None,
    ) -> Float[Array, "B T D"]:
        """The state after the last layer, not yet normalized."""
        structure, weights = nnx.split(self.layers)

        def layer(x, weights_and_depth):
            layer_weights, depth = weights_and_depth
            return nnx.merge(structure, layer_weights)(x, cosine, sine, segment_ids, dropout_keys, depth), None

        depths = jnp.arange(self.num_layers)
        x, _ = jax.lax.scan(remat(layer, self.remat_policy, self.checkpoint_places), x, (weights, depths))
        return x


def remat(layer: Callable, policy: str, places: tuple[str, ...]) -> Callable:
    """The layer, with the backward pass told what of it to keep and what to recompute."""
    policies = jax.checkpoint_policies
    if policy == "none":
        return layer
    if policy in ("minimal", "attention"):
        # By name, so that a fused kernel counts as its result and no more. Not what the two sums of the residual stream
        # are made of: the next layer's input has one of them, and the other costs one small product to make again. Gate
        # and up are the largest, so `attention` makes them again.
        gate_and_up = ("mlpwi_0", "mlpwi_1") if policy == "minimal" else ()
        keep = policies.save_only_these_names("query_proj", "key_proj", "value_proj", "context", *gate_and_up)
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
        raise ValueError(f"remat_policy={policy!r} is none of none, minimal, attention, full, custom")
    return jax.checkpoint(layer, policy=keep, prevent_cse=False)
