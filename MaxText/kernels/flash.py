"""Causal attention in Pallas kernels for TPUs, with one map or with two whose difference differential attention takes.

Scores are kept as [keys, queries], so that maxima and sums run down the sublanes and what belongs to a query is a row.
A program takes one block of queries and loops over the keys up to its end, which lie whole in VMEM; blocks above the
diagonal are never visited, and both maps meet the values together. Exponentials are powers of two.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from MaxText.kernels.attention_reference import RESIDUALS

LANES = 128
_MASKED = -1e30  # finite: the difference of two of them is 0, not NaN
_LN2 = math.log(2.0)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How many positions one step takes: multiples of 128; key and diagonal divide query.

    Attributes:
        query: queries of one program.
        key: keys of one step below the diagonal.
        diagonal: keys of one step on the diagonal.
    """

    query: int
    key: int
    diagonal: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernels are built for; the length is a multiple of both query blocks.

    Attributes:
        vmem_limit: bytes.
    """

    forward: Blocks
    backward: Blocks
    vmem_limit: int
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def flash(
    q: Float[Array, "B N M T H"],
    k: Float[Array, "B K C T H"],
    v: Float[Array, "B K T W"],
    weight: Float[Array, "B N 1 T"] | None,
    segment_ids: Int[Array, "B 1 T"],
    plan: Plan,
) -> Float[Array, "B N T W"]:
    """softmax2(Q1 K1) V, or with two maps (M = 2) (softmax2(Q1 K1) - weight * softmax2(Q2 K2)) V.

    Args:
        q: scaled by log2(e) / sqrt(H), because softmax2 is of powers of two.
        k: one for each map, or one for both (C = 1).
        weight: lambda of every query, float32; None with one map.

    Source: Dao 2023, arXiv:2307.08691, algorithms 1 and 2; the difference: Ye et al. 2024, arXiv:2410.05258, (1).
    """
    return _forward_call(q, k, v, weight, segment_ids, plan, with_residuals=False)[0]


def _forward(q, k, v, weight, segment_ids, plan):
    results = _forward_call(q, k, v, weight, segment_ids, plan, with_residuals=True)
    results = [checkpoint_name(x, RESIDUALS) for x in results]
    return results[0], (q, k, v, weight, segment_ids, *results)


def _backward(plan, residuals, d_context):
    q, k, v, weight, segment_ids, context, log_sums, *others = residuals

    def along(x):
        return jnp.sum(d_context.astype(jnp.float32) * x.astype(jnp.float32), axis=-1)[:, :, None]

    sums, d_weight = along(context), None
    if others:
        of_other = along(others[0])
        sums, d_weight = jnp.concatenate([sums + weight * of_other, of_other], axis=2), -of_other
    *d_q, d_k, d_v = _backward_call(q, k, v, weight, segment_ids, d_context, log_sums, sums, plan)
    return jnp.stack(d_q, axis=2), d_k, d_v, d_weight, None


flash.defvjp(_forward, _backward)


def _product(left: Array, right: Array, contract: tuple[int, int]) -> Array:
    """The matrix product over these dimensions, in float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(left, right, dims, precision=precision, preferred_element_type=jnp.float32)


def _for_each_step(blocks: Blocks, index: Array, step: Callable[[Any, int, int, bool], None]) -> None:
    """Calls step(first key, keys, first query, on the diagonal) for all keys that block `index` of queries sees."""
    for first in range(0, blocks.query, blocks.diagonal):
        step(pl.multiple_of(index * blocks.query + first, LANES), blocks.diagonal, first, True)

    def below(j, carry):
        step(pl.multiple_of(j * blocks.key, LANES), blocks.key, 0, False)
        return carry

    jax.lax.fori_loop(0, index * (blocks.query // blocks.key), below, 0)


def _spread_segments(segments_ref, columns_ref) -> None:
    """Once for each row of the batch: its segment ids [1, T] as columns [T, 128]."""

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0) & (pl.program_id(3) == 0))
    def _():
        for first in range(0, columns_ref.shape[0], LANES):
            row = jnp.broadcast_to(segments_ref[0, :, first : first + LANES], (LANES, LANES))
            columns_ref[first : first + LANES, :] = row.T


def _masked(scores, columns_ref, segments, first_key, on_diagonal):
    """The scores [keys, queries] that are seen; the others very low. On the diagonal both begin at one position."""
    keys, queries = scores.shape
    seen = jnp.tile(columns_ref[pl.ds(first_key, keys), :], (1, queries // LANES)) == segments
    if on_diagonal:
        rows, columns = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
        seen &= rows <= columns
    return jnp.where(seen, scores, _MASKED)


def _forward_kernel(*refs, blocks: Blocks, num_maps: int, num_keys: int):
    q_refs, k_refs, refs = refs[:num_maps], refs[num_maps:][:num_keys], refs[num_maps + num_keys :]
    weight_ref, refs = (refs[0], refs[1:]) if num_maps == 2 else (None, refs)
    v_ref, row_ref, segments_ref, context_ref = refs[:4]
    *residual_refs, maxima_ref, sums_ref, parts_ref, columns_ref = refs[4:]
    _spread_segments(row_ref, columns_ref)

    def step(first_key, keys, first_query, on_diagonal):
        begins = on_diagonal and first_query == 0
        at, these = slice(first_query, None), pl.ds(first_key, keys)
        values = v_ref[0, 0, these, :]
        for map_ in range(num_maps):
            scores = _product(k_refs[map_ % num_keys][0, 0, 0, these, :], q_refs[map_][0, 0, 0, at, :], (1, 1))
            scores = _masked(scores, columns_ref, segments_ref[0, :, at], first_key, on_diagonal)
            highest = jnp.max(scores, axis=0, keepdims=True)
            if not begins:
                before = maxima_ref[map_, :, at]
                highest = jnp.maximum(highest, before)
            weights = jnp.exp2(scores - highest)
            total = jnp.sum(weights, axis=0, keepdims=True)
            part = _product(values, weights.astype(values.dtype), (0, 0))
            if not begins:
                shrink = jnp.exp2(before - highest)
                total += sums_ref[map_, :, at] * shrink
                part += parts_ref[map_, :, at] * shrink
            maxima_ref[map_, :, at], sums_ref[map_, :, at], parts_ref[map_, :, at] = highest, total, part

    _for_each_step(blocks, pl.program_id(3), step)
    context, *others = (parts_ref[map_] / sums_ref[map_] for map_ in range(num_maps))
    if weight_ref is not None:
        context -= weight_ref[0, 0] * others[0]
    context_ref[0, 0] = context.T.astype(context_ref.dtype)
    if residual_refs:
        for map_ in range(num_maps):
            residual_refs[0][0, 0, map_ : map_ + 1, :] = maxima_ref[map_] + jnp.log2(sums_ref[map_])
        for other_ref, other in zip(residual_refs[1:], others, strict=True):
            other_ref[0, 0] = other.T.astype(other_ref.dtype)


def _forward_call(q, k, v, weight, segment_ids, plan, *, with_residuals):
    """The context; with residuals also the log2 of the sums [B N M T], and the second map's context."""
    batch, num_heads, num_maps, length, head_dim = q.shape
    num_keys, width, block = k.shape[2], v.shape[-1], plan.forward.query
    specs = _Specs.of(q, k, block)
    context = jax.ShapeDtypeStruct((batch, num_heads, length, width), q.dtype)
    log_sums = jax.ShapeDtypeStruct((batch, num_heads, num_maps, length), jnp.float32)
    outs = [(context, specs.rows(width)), (log_sums, specs.vectors(num_maps)), (context, specs.rows(width))]
    outs = outs[: 1 + num_maps] if with_residuals else outs[:1]
    return pl.pallas_call(
        functools.partial(_forward_kernel, blocks=plan.forward, num_maps=num_maps, num_keys=num_keys),
        name=f"flash_{num_maps}_forward",
        grid=specs.grid,
        in_specs=specs.inputs(head_dim, width, num_maps, num_keys),
        out_specs=[spec for _, spec in outs],
        out_shape=[shape for shape, _ in outs],
        scratch_shapes=[
            pltpu.VMEM((num_maps, 1, block), jnp.float32),
            pltpu.VMEM((num_maps, 1, block), jnp.float32),
            pltpu.VMEM((num_maps, width, block), jnp.float32),
            pltpu.VMEM((length, LANES), jnp.int32),
        ],
        compiler_params=_params(plan),
        interpret=plan.interpret,
    )(*_inputs(q, k, v, weight, segment_ids))


def _backward_kernel(*refs, blocks: Blocks, num_maps: int, num_keys: int):
    q_refs, k_refs, refs = refs[:num_maps], refs[num_maps:][:num_keys], refs[num_maps + num_keys :]
    weight_ref, refs = (refs[0], refs[1:]) if num_maps == 2 else (None, refs)
    v_ref, row_ref, segments_ref, d_ref, log_sums_ref, sums_ref = refs[:6]
    *d_q_refs, d_k_ref, d_v_ref, q_sum_ref, k_sum_ref, v_sum_ref, columns_ref = refs[6:]
    group, index = pl.program_id(2), pl.program_id(3)
    _spread_segments(row_ref, columns_ref)

    @pl.when((group == 0) & (index == 0))
    def _():
        k_sum_ref[...] = jnp.zeros_like(k_sum_ref)
        v_sum_ref[...] = jnp.zeros_like(v_sum_ref)

    def step(first_key, keys, first_query, on_diagonal):
        at, these = slice(first_query, None), pl.ds(first_key, keys)
        d = d_ref[0, 0, at, :]
        queries = [ref[0, 0, 0, at, :] for ref in q_refs]
        seen_keys = [k_refs[map_ % num_keys][0, 0, 0, these, :] for map_ in range(num_maps)]
        weights = []
        for map_ in range(num_maps):
            scores = _product(seen_keys[map_], queries[map_], (1, 1))
            scores = _masked(scores, columns_ref, segments_ref[0, :, at], first_key, on_diagonal)
            weights.append(jnp.exp2(scores - log_sums_ref[0, 0, map_ : map_ + 1, at]))
        slope = _product(v_ref[0, 0, these, :], d, (1, 1))
        total = weights[0]
        d_scores = [weights[0] * (slope - sums_ref[0, 0, :1, at])]
        if weight_ref is not None:
            other = weights[1] * weight_ref[0, 0, :, at]
            total -= other
            d_scores.append(other * (sums_ref[0, 0, 1:, at] - slope))
        v_sum_ref[these, :] += _product(total.astype(d.dtype), d, (1, 0))
        for map_ in range(num_maps):
            d_score = d_scores[map_].astype(d.dtype)
            k_sum_ref[map_ % num_keys, these, :] += _product(d_score, queries[map_], (1, 0))
            d_query = _product(seen_keys[map_], d_score, (0, 0))
            if not (on_diagonal and first_query == 0):
                d_query += q_sum_ref[map_, :, at]
            q_sum_ref[map_, :, at] = d_query

    _for_each_step(blocks, index, step)
    for map_ in range(num_maps):
        d_q_refs[map_][0, 0] = (q_sum_ref[map_] * _LN2).T.astype(d_q_refs[map_].dtype)

    @pl.when((group == pl.num_programs(2) - 1) & (index == pl.num_programs(3) - 1))
    def _():
        d_k_ref[0, 0] = (k_sum_ref[...] * _LN2).astype(d_k_ref.dtype)
        d_v_ref[0, 0] = v_sum_ref[...].astype(d_v_ref.dtype)


def _backward_call(q, k, v, weight, segment_ids, d_context, log_sums, sums, plan):
    """The gradients of each map's queries [B N T H], of k and of v."""
    num_maps, length, head_dim = q.shape[2:]
    num_keys, width, block = k.shape[2], v.shape[-1], plan.backward.query
    specs = _Specs.of(q, k, block)
    return pl.pallas_call(
        functools.partial(_backward_kernel, blocks=plan.backward, num_maps=num_maps, num_keys=num_keys),
        name=f"flash_{num_maps}_backward",
        grid=specs.grid,
        in_specs=[
            *specs.inputs(head_dim, width, num_maps, num_keys),
            specs.rows(width),
            *[specs.vectors(num_maps)] * 2,
        ],
        out_specs=[
            *[specs.rows(head_dim)] * num_maps,
            pl.BlockSpec((1, 1, num_keys, length, head_dim), lambda b, k, g, i: (b, k, 0, 0, 0)),
            specs.values(width),
        ],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*[q[:, :, 0]] * num_maps, k, v)],
        scratch_shapes=[
            pltpu.VMEM((num_maps, head_dim, block), jnp.float32),
            pltpu.VMEM((num_keys, length, head_dim), jnp.float32),
            pltpu.VMEM((length, width), jnp.float32),
            pltpu.VMEM((length, LANES), jnp.int32),
        ],
        compiler_params=_params(plan),
        interpret=plan.interpret,
    )(*_inputs(q, k, v, weight, segment_ids), d_context, log_sums, sums)


def _inputs(q, k, v, weight, segment_ids):
    """What both kernels read: an array once for each of its maps, since a block of both would be a strided copy."""
    weights = () if weight is None else (weight,)
    return *[q] * q.shape[2], *[k] * k.shape[2], *weights, v, segment_ids, segment_ids


@dataclasses.dataclass(frozen=True)
class _Specs:
    """How the arrays are cut for the programs (row of the batch, key/value head, head of its group, block)."""

    grid: tuple[int, int, int, int]
    block: int

    @classmethod
    def of(cls, q, k, block: int) -> "_Specs":
        (batch, num_heads, _, length, _), num_kv_heads = q.shape, k.shape[1]
        return cls((batch, num_kv_heads, num_heads // num_kv_heads, length // block), block)

    def inputs(self, head_dim: int, width: int, num_maps: int, num_keys: int) -> list[pl.BlockSpec]:
        """Of `_inputs`."""
        length, group = self.grid[3] * self.block, self.grid[2]

        def queries(map_):
            shape = (1, 1, 1, self.block, head_dim)
            return pl.BlockSpec(shape, lambda b, k, g, i: (b, k * group + g, map_, i, 0))

        def keys(map_):
            return pl.BlockSpec((1, 1, 1, length, head_dim), lambda b, k, g, i: (b, k, map_, 0, 0))

        return [
            *map(queries, range(num_maps)),
            *map(keys, range(num_keys)),
            *[self.vectors(1)] * (num_maps - 1),
            self.values(width),
            pl.BlockSpec((1, 1, length), lambda b, k, g, i: (b, 0, 0)),
            pl.BlockSpec((1, 1, self.block), lambda b, k, g, i: (b, 0, i)),
        ]

    def values(self, width: int) -> pl.BlockSpec:
        """All of a key/value head."""
        return pl.BlockSpec((1, 1, self.grid[3] * self.block, width), lambda b, k, g, i: (b, k, 0, 0))

    def rows(self, width: int) -> pl.BlockSpec:
        """A block of a head's positions."""
        group = self.grid[2]
        return pl.BlockSpec((1, 1, self.block, width), lambda b, k, g, i: (b, k * group + g, i, 0))

    def vectors(self, count: int) -> pl.BlockSpec:
        """So many numbers for each query of a block."""
        group = self.grid[2]
        return pl.BlockSpec((1, 1, count, self.block), lambda b, k, g, i: (b, k * group + g, 0, i))


def _params(plan: Plan) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 4, vmem_limit_bytes=plan.vmem_limit)
