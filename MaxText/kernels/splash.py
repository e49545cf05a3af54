"""Causal attention by JAX's splash kernel for TPUs, run on each device's own rows and heads.

Blocks of scores above the diagonal are skipped and no [T, S] array exists. Lengths that the blocks do not divide are
padded here. Rows are split over the batch axes, heads over the head axis; a single key/value head is on every device.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from MaxText.kernels.attention_reference import RESIDUALS
from MaxText.kernels.flash import LANES
from MaxText.kernels.head_spec import head_spec


def attention_splash(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K W"],
    segment_ids: Int[Array, "B T"],
    *,
    batch_axes: tuple[str, ...],
    head_axis: str,
    soft_cap: float | None,
    block: int,
    has_fused_backward: bool,
    interpret: bool,
) -> Float[Array, "B T N W"]:
    """As `attention_reference`, on the current mesh.

    Args:
        block: queries and keys that one step of the kernel takes; a multiple of 128.
        has_fused_backward: one backward kernel, not two: fewer cycles, but the queries' gradient once for each block of
            keys, added up afterwards.
        interpret: run the kernel's logic without a TPU; slow.
    """
    heads, kv_heads = (head_spec(x.shape[2], 2, batch_axes, head_axis) for x in (query, key))
    in_specs = (heads, kv_heads, kv_heads, PartitionSpec(batch_axes))
    options = {"soft_cap": soft_cap, "is_fused": has_fused_backward, "interpret": interpret}
    local = functools.partial(_local, block=block, options=options)
    return jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=False)(query, key, value, segment_ids)


def _local(query, key, value, segment_ids, *, block, options):
    length, num_heads, head_dim = query.shape[1:]
    padded = -(-length // LANES) * LANES
    block = min(block, padded)
    padded = -(-padded // block) * block
    kernel = _kernel(padded, num_heads, key.shape[2] == 1, block, **options)

    def heads_first(x):
        return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))), 1, 2)

    # Padding is a document of its own, so that no row of scores is empty.
    segments = jnp.pad(segment_ids, ((0, 0), (0, padded - length)), constant_values=-1)
    q, k, v = heads_first(query * head_dim**-0.5), heads_first(key), heads_first(value)
    if key.shape[2] == 1:
        k, v = k[:, 0], v[:, 0]
    context: Array = jax.vmap(kernel)(  # pyright: ignore[reportAssignmentType]: residuals are not asked for
        q, k, v, splash_attention_kernel.SegmentIds(segments, segments)
    )
    return jnp.swapaxes(context, 1, 2)[:, :length]


def _kernel(
    length: int, num_heads: int, is_mqa: bool, block: int, *, soft_cap: float | None, is_fused: bool, interpret: bool
):
    mask = splash_attention_mask.CausalMask((length, length))
    make = splash_attention_kernel.make_splash_mqa if is_mqa else splash_attention_kernel.make_splash_mha
    return make(
        splash_attention_mask.MultiHeadMask([mask] * num_heads),
        block_sizes=block_sizes(block, is_fused),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )


def block_sizes(block: int, is_fused: bool) -> splash_attention_kernel.BlockSizes:
    """Square blocks for all kernels."""
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    names = names if is_fused else (*names, "block_q_dq", "block_kv_dq")
    return splash_attention_kernel.BlockSizes(**dict.fromkeys(names, block), use_fused_bwd_kernel=is_fused)
