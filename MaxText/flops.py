"""Parameter and FLOP counts by arithmetic from the model's shape; nothing is traced.

A multiply-add is two FLOPs and the backward pass twice the forward. Attention is counted causally: half the square, as
the useful work is; rematerialization is not counted. So an MFU made from these is model FLOPs utilization, not
hardware's.
"""

import dataclasses
import math
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has, and where."""

    total: int
    embedding: int  # token embedding, and the output projection where it is separate

    @property
    def other(self) -> int:
        """All that is not embedding."""
        return self.total - self.embedding

    def __str__(self) -> str:
        return f"{self.total:,} ({self.embedding:,} embedding, {self.other:,} other)"


def count_parameters(params: Any) -> ParameterCount:
    """The parameters of a nested dict with the Transformer's names."""
    size = {name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
    return ParameterCount(sum(size.values()), size["token_embedder"] + size.get("logits_dense", 0))


def flops_per_token(
    *,
    dim: int,
    num_layers: int,
    num_query_heads: int,
    num_kv_heads: int,
    head_dim: int,
    mlp_dim: int,
    vocab_size: int,
    length: int,
    attention_type: str,
    mtp_num_layers: int,
    mtp_transformer_block: bool,
) -> int:
    """Training FLOPs of one token in a causal sequence of `length` tokens, forward and backward.

    Differential attention counts each map's scores, and the product with the values once: the maps can be subtracted
    before it, whatever a kernel does. A multi-token prediction head counts its projection, its block if it has one, and
    its share of the unembedding.
    Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B, with the attention term halved for causality.
    """
    num_maps = num_query_heads
    gates = 0
    if attention_type == "differential_v2":
        num_maps = 2 * num_query_heads
        gates = dim * num_query_heads
    projections = dim * head_dim * (num_maps + num_query_heads + 2 * num_kv_heads) + gates
    heads_ahead = mtp_num_layers * dim * (2 * dim + vocab_size)
    num_layers += mtp_num_layers * mtp_transformer_block
    matmul_weights = num_layers * (projections + 3 * dim * mlp_dim) + dim * vocab_size + heads_ahead
    attention = num_layers * (num_maps + num_query_heads) * head_dim * (length + 1) // 2
    return 6 * (matmul_weights + attention)
