"""The SwiGLU feed-forward layer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from MaxText.kernels.projection import project
from MaxText.layers import parameters
from MaxText.sharding import shard


class SwiGLU(nnx.Module):
    """(silu(x wi_0) * (x wi_1)) wo: three matrices, no biases.

    Source: Shazeer 2020, arXiv:2002.05202, equation 6.
    """

    def __init__(
        self, dim: int, mlp_dim: int, *, stddev: float, out_stddev: float, dtype: str, weight_dtype: str, rngs: nnx.Rngs
    ):
        self.dtype = dtype
        self.wi_0 = parameters.weight(rngs, (dim, mlp_dim), ("embed", "mlp"), stddev=stddev, dtype=weight_dtype)
        self.wi_1 = parameters.weight(rngs, (dim, mlp_dim), ("embed", "mlp"), stddev=stddev, dtype=weight_dtype)
        self.wo = parameters.weight(rngs, (mlp_dim, dim), ("mlp", "embed"), stddev=out_stddev, dtype=weight_dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = checkpoint_name(project("btd,df->btf", x, self.wi_0[...]), "mlpwi_0")
        up = checkpoint_name(project("btd,df->btf", x, self.wi_1[...]), "mlpwi_1")
        inner = shard(_gated(gate, up), "activation_batch", "activation_length", "activation_mlp")
        return checkpoint_name(project("btf,fd->btd", inner, self.wo[...]), "mlpwo")


def _product(gate: Array, up: Array) -> Array:
    # In float32, rounded once: more exact, and processors without bfloat16 arithmetic would round each operation apart.
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


@jax.custom_vjp
def _gated(gate: Float[Array, "B T F"], up: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """silu(gate) * up, made once: fused into the products that read it, a TPU would make it again for each tile."""
    return jax.lax.optimization_barrier(_product(gate, up))


def _backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    return jax.lax.optimization_barrier(jax.vjp(_product, *residuals)[1](cotangent))


_gated.defvjp(lambda gate, up: (_gated(gate, up), (gate, up)), _backward)
