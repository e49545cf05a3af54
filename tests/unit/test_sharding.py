"""Every way a sharding can be wrong is an error that names the array."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from MaxText import sharding
from tests import support

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


def test_the_rules_give_the_spec():
    assert sharding.partition_spec(("vocab", "embed"), (8, 4), SIZES, "w") == PartitionSpec("tensor", "fsdp")
    batch = sharding.partition_spec(("activation_batch", None), (8, 4), SIZES, "x")
    assert batch == PartitionSpec(("data", "fsdp"), None)


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (("embd", "mlp"), (4, 4), "a.b: unknown logical axis 'embd'"),
        (("mlp", "heads"), (4, 4), "a.b: logical axes 'mlp' and 'heads' both lie on mesh axis 'tensor'"),
        (("embed", "mlp"), (4, 3), r"a.b: dimension 'mlp' of shape \(4, 3\) has size 3, which tensor=2"),
        (("embed",), (4, 4), "a.b: 1 logical axes"),
    ],
)
def test_what_is_wrong_is_said(axes, shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.partition_spec(axes, shape, SIZES, "a.b")


def test_shard_constrains_on_cpu_too():
    with jax.set_mesh(support.mesh_of(2, 2, 2)):
        placed = jax.jit(lambda x: sharding.shard(x, "activation_batch", None, "activation_mlp"))(jnp.ones((8, 4, 6)))
    assert placed.sharding.shard_shape(placed.shape) == (2, 4, 3)


def test_shard_without_a_mesh_is_an_error():
    with pytest.raises(ValueError, match="needs a current mesh"):
        sharding.shard(jnp.ones((2,)), None)


def test_mesh_sizes():
    assert sharding.mesh_shape((-1, 2, 1), 8) == (4, 2, 1)
    with pytest.raises(ValueError, match="ici_fsdp_parallelism=3.* there are 8"):
        sharding.mesh_shape((1, 3, 1), 8)
    with pytest.raises(ValueError, match="there are 8"):
        sharding.mesh_shape((-1, 3, 1), 8)


def test_slices_that_do_not_lie_along_data_are_refused_in_words():
    devices = [types.SimpleNamespace(slice_index=index // 4) for index in range(8)]
    with pytest.raises(ValueError, match="2 slices are joined along data, but ici_data_parallelism=1 is no multiple"):
        sharding.make_mesh((1, 8, 1), devices)
