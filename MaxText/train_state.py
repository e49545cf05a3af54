"""What a training step carries: step, parameters, optimizer state; made sharded, never first on one device.

No random key is in it: randomness is a function of the seed and the step, so there is nothing to save and nothing to
lose.
"""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from MaxText import compiler_options, models, optimizers, sharding, spikes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The whole training state, a pytree."""

    step: Any  # int32 scalar: optimizer steps taken
    params: Any  # nested dict
    opt_state: Any  # Optax's
    spikes: Any = None  # a spikes.Window, if the run looks for spikes


def abstract_train_state(config: FrozenConfigDict, model: models.AbstractModel, mesh: Mesh) -> TrainState:
    """The state's shapes, dtypes and shardings; nothing is allocated.

    Raises:
        ValueError: the mesh does not fit the model, or leaves more than sharding_tolerance of it replicated.
    """
    params = sharding.named_sharding(mesh, model.logical_axes, model.params)
    _check_replication(model.params, params, mesh, config.sharding_tolerance)
    everywhere = sharding.replicated(mesh)
    optimizer = optimizers.make_optimizer(config)
    opt_state = jax.eval_shape(optimizer.init, model.params)
    # By tree path, not by shape: two weights of one shape may lie differently.
    # Muon and AdamW each have a MaskedNode where the other's parameters would be.
    opt_shardings = optax.tree_map_params(
        optimizer,
        lambda leaf, where: leaf if isinstance(leaf, optax.MaskedNode) else where,
        opt_state,
        params,
        transform_non_params=lambda _: everywhere,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32)
    window = jax.eval_shape(lambda: spikes.initial(config))
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        TrainState(step, model.params, opt_state, window),
        TrainState(everywhere, params, opt_shardings, jax.tree.map(lambda _: everywhere, window)),
    )


def shardings(state: TrainState) -> TrainState:
    """Where each leaf of an abstract or real state lies."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def initial_train_state(config: FrozenConfigDict, abstract: TrainState) -> TrainState:
    """A fresh state; every device computes only its own share of it."""

    def make(key: jax.Array) -> TrainState:
        params = models.initial_params(config, key)
        opt_state = optimizers.make_optimizer(config).init(params)
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state, spikes.initial(config))

    key = jax.random.key(config.init_weights_seed)
    options = compiler_options.of_one_run(jax.default_backend(), os.environ)
    return jax.jit(make, out_shardings=shardings(abstract), compiler_options=options)(key)


def _check_replication(shapes: Any, placed: Any, mesh: Mesh, tolerance: float) -> None:
    """Raises where an axis meant to split the weights leaves too many of them whole."""
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return
    share = sharding.replicated_share(shapes, placed)
    if share > tolerance:
        raise ValueError(
            f"{share:.1%} of the parameters would be replicated on every device, more than "
            f"sharding_tolerance={tolerance}; change the mesh, or raise sharding_tolerance if that is meant"
        )
