"""How a weight is declared: once, with its shape, its logical axes and its initializer.

Everything else about it (abstract shape, sharding, sharded initialization, checkpoint path) derives from that
declaration.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], logical_axes: tuple[str, ...], *, stddev: float, dtype: str
) -> nnx.Param:
    """A normally distributed parameter, one logical axis for each dimension."""
    value = stddev * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(dtype), logical_axes=logical_axes)


def gain(size: int, *, dtype: str) -> nnx.Param:
    """A normalization's scale: ones."""
    return nnx.Param(jnp.ones((size,), dtype), logical_axes=("norm",))


def stacked(make_layer: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """num_layers independent layers as one module; every parameter gains a leading axis `layers`, for lax.scan."""
    layers = nnx.split_rngs(splits=num_layers)(nnx.vmap(make_layer))(rngs)
    for _, node in nnx.iter_graph(layers):
        if isinstance(node, nnx.Param):
            node.set_metadata(logical_axes=("layers", *node.get_metadata()["logical_axes"]))
    return layers
