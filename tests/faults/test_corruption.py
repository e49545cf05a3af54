"""Bits that flip by themselves, put in on purpose: found, and the device named."""

import jax
import numpy as np
import pytest

from MaxText import corruption, sharding
from tests import support
from tests.faults import training


def with_a_flipped_bit(array: jax.Array, device: jax.Device) -> jax.Array:
    """The array with one mantissa bit of one element changed, on one device only."""
    pieces = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device == device:
            data.view(np.uint32).reshape(-1)[data.size // 2] ^= 1 << 7
        pieces.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, pieces)


@pytest.fixture(scope="module")
def trainer():
    return support.Trainer(support.small_config(skip_step_on_spikes=True), support.mesh_of(2, 2, 2))


@pytest.mark.parametrize("call", [None, 1, 2])
def test_a_bit_that_flips_in_either_taking_of_the_step(trainer, call):
    checker = corruption.Checker(trainer.mesh, trainer.abstract)
    device = jax.devices()[5]
    calls = []

    def step(state, batch):
        state, metrics = trainer.step(state, batch)
        calls.append(1)
        if len(calls) == call:
            leaves, structure = jax.tree.flatten(state)
            leaves[3] = with_a_flipped_bit(leaves[3], device)
            state = jax.tree.unflatten(structure, leaves)
        return state, metrics

    batch = jax.device_put(support.packed_batch(support.small_config(), 8, 0), sharding.batch_sharding(trainer.mesh))
    with jax.set_mesh(trainer.mesh):
        state = jax.tree.map(jax.numpy.copy, trainer.state)
        if call is None:
            expected, _ = trainer.step(jax.tree.map(jax.numpy.copy, state), batch)
            state, metrics = checker.step(step, state, batch)
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(expected))
            assert np.isfinite(metrics["learning/loss"])
        else:
            with pytest.raises(corruption.Corrupted, match=r"^on \S*5\S* 1 arrays differ when the step is taken twice"):
                checker.step(step, state, batch)


def test_a_copy_that_has_drifted_before_the_check(trainer):
    """The step then gives the same twice; only the copies of the weights tell."""
    checker = corruption.Checker(trainer.mesh, trainer.abstract)
    device = jax.devices()[6]
    leaves, structure = jax.tree.flatten(jax.tree.map(jax.numpy.copy, trainer.state))
    leaves[4] = with_a_flipped_bit(leaves[4], device)
    with jax.set_mesh(trainer.mesh), pytest.raises(corruption.Corrupted, match="differ from their copies"):
        checker.step(lambda state, _: (state, {}), jax.tree.unflatten(structure, leaves), None)


def test_a_run_says_what_it_costs(tmp_path):
    console = training.Lines()
    assert training.train(tmp_path, console, sdc_check_interval=5) == 0
    assert "step 5: taken twice in " in console and "step 10: taken twice in " in console
    assert not any("step 6: taken" in line for line in console.lines)
