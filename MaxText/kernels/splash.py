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
    interpret: bool,
) -> Float[Array, "B T N W"]:
    """As `attention_reference`, on the current mesh.

    Args:
        block: queries and keys that one step of the kernel takes; a multiple of 128.
        interpret: run the kernel's logic without a TPU; slow.
    """
    rows = PartitionSpec(batch_axes)
    heads = PartitionSpec(batch_axes, None, head_axis)
    kv_heads = rows if key.shape[2] == 1 else heads
    local = functools.partial(_local, soft_cap=soft_cap, block=block, interpret=interpret)
    mapped = jax.shard_map(local, in_specs=(heads, kv_heads, kv_heads, rows), out_specs=heads, check_vma=False)
    return mapped(query, key, value, segment_ids)


def _local(query, key, value, segment_ids, *, soft_cap, block, interpret):
    length, num_heads, head_dim = query.shape[1:]
    padded = -(-length // LANES) * LANES
    block = min(block, padded)
    padded = -(-padded // block) * block
    kernel = _kernel(padded, num_heads, key.shape[2] == 1, soft_cap, block, interpret)

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


def _kernel(length: int, num_heads: int, is_mqa: bool, soft_cap: float | None, block: int, interpret: bool):
    mask = splash_attention_mask.CausalMask((length, length))
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    make = splash_attention_kernel.make_splash_mqa if is_mqa else splash_attention_kernel.make_splash_mha
    return make(
        splash_attention_mask.MultiHeadMask([mask] * num_heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
