"""The product of activations with a weight, in the activations' dtype, accumulated in float32 both ways."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(equation: str, x: Float[Array, "..."], weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """`jnp.einsum(equation, x, weight)` in x's dtype; the weight's gradient is float32 and never rounded to it.

    Args:
        equation: two operands, such as "btd,df->btf"; the last axes of x contract with the first of the weight.
    """
    if weight.dtype != x.dtype:
        # In a loop over layers: cast a layer's weights there, and not all of them before it, a copy of the whole model.
        weight = jax.lax.optimization_barrier(weight).astype(x.dtype)
    return jnp.einsum(equation, x, weight, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(equation, x, weight):
    return project(equation, x, weight), (x, weight)


def _backward(equation, residuals, cotangent):
    x, weight = residuals
    left, result = equation.split("->")
    left, right = left.split(",")
    d_x = project(f"{result},{right}->{left}", cotangent, weight)
    contracted = "".join(axis for axis in left if axis in right)
    rows = "".join(axis for axis in left if axis not in right)
    transposed = row_major(jnp.einsum(f"{left}->{contracted}{rows}", row_major(x)))
    d_weight = jnp.einsum(
        f"{contracted}{rows},{result}->{right}", transposed, cotangent, preferred_element_type=jnp.float32
    )
    return d_x, d_weight.astype(weight.dtype)


project.defvjp(_forward, _backward)


def row_major(x: Array) -> Array:
    """x, on CPU made before what reads it, and laid out as its shape says.

    The backend's fast products contract the left side's last axis; and a transposition with something fused into it, or
    a pass that exponentiates and rounds, takes longer than two passes.
    """

    def constrained(x: Array) -> Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    return jax.lax.platform_dependent(x, cpu=constrained, default=lambda x: x)
