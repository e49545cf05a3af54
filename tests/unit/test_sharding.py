"""Every way a sharding can be wrong is an error that names the array."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from MaxText import config_rules, sharding
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


class Chip(types.SimpleNamespace):
    """A TPU chip as the mesh's arithmetic sees it."""

    platform, device_kind = "cpu", "chip"  # "cpu": without wires between chips


def test_only_the_outer_part_of_an_axis_crosses_slices():
    chips = [Chip(id=index, slice_index=index // 8, process_index=index // 4) for index in range(16)]
    assert sharding.num_slices(chips) == 2

    def slices_of(shape, slices):
        return np.vectorize(lambda chip: chip.slice_index)(sharding.hybrid_devices(shape, slices, chips))

    data = slices_of((1, 8, 1), (2, 1, 1))
    assert data.shape == (2, 8, 1) and (data[0] == data[0, 0]).all() and (data[1] != data[0]).all()
    fsdp = slices_of((2, 4, 1), (1, 2, 1))
    assert fsdp.shape == (2, 8, 1) and (fsdp[:, :4] == fsdp[0, 0]).all() and (fsdp[:, 4:] != fsdp[0, 0]).all()
    with pytest.raises(ValueError, match="is 4 slices, but there are 2 slices; use dcn_data_parallelism=2"):
        slices_of((1, 4, 1), (4, 1, 1))


def test_slices_are_part_of_the_mesh_that_must_fit():
    config = support.small_config(dcn_data_parallelism=2, ici_data_parallelism=1, ici_fsdp_parallelism=-1)
    assert config_rules.mesh_problems(config, 16) == []
    assert "slices do not divide the 15 devices" in config_rules.mesh_problems(config, 15)[0]
    config = support.small_config(dcn_fsdp_parallelism=3, ici_data_parallelism=-1)
    assert "does not divide base_emb_dim=32" in config_rules.mesh_problems(config, 6)[0]
