"""Parameters as generation wants them: one array a layer, matrices in the dtype of the arithmetic.

A stack of layers is right for training, where one layer is compiled once; a step of generation reads every weight once,
and cutting layers out of a stack would read and write them once more.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from MaxText import models, sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's parameters.

    Attributes:
        rest: all that belongs to no layer, nested as in a checkpoint.
        layers: for each decoder layer a nested dict.
        heads: the same for each multi-token prediction head.
    """

    rest: Any
    layers: tuple[Any, ...]
    heads: tuple[Any, ...]


def abstract_params(config: FrozenConfigDict, model: models.AbstractModel, mesh: jax.sharding.Mesh) -> Any:
    """Shapes, dtypes and shardings of the parameters as they are to be loaded: matrices in `config.dtype`."""

    def one(leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...], where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        vector = leaf.ndim - axes.count("layers") < 2
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if vector else jnp.dtype(config.dtype), sharding=where)

    places = sharding.named_sharding(mesh, model.logical_axes, model.params)
    return jax.tree.map(one, model.params, model.logical_axes, places)


def unstacked(params: Any) -> Weights:
    """The same parameters, layer by layer. The stacked ones are freed."""
    cut = jax.block_until_ready(jax.jit(layer_by_layer)(params))
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    return cut


def layer_by_layer(params: Any) -> Weights:
    """The parameters, cut; in a jitted function."""
    rest = dict(params)
    decoder = dict(rest["decoder"])
    layers = _cut(decoder.pop("layers"))
    rest["decoder"] = decoder
    heads = _cut(rest.pop("mtp")["layers"]) if "mtp" in rest else ()
    return Weights(rest, layers, heads)


def _cut(stacked: Any) -> tuple[Any, ...]:
    count = jax.tree.leaves(stacked)[0].shape[0]
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count))
