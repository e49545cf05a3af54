import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from MaxText.input_pipeline import device, packing
from MaxText.input_pipeline.synthetic import SyntheticDataset


class CountingDataset(SyntheticDataset):
    """Remembers which rows were asked for."""

    def __init__(self):
        super().__init__(vocab_size=500, sequence_length=16, seed=0, num_windows=1000)
        self.asked = []

    def batch(self, step, global_batch_size, rows):
        self.asked.append(np.arange(global_batch_size)[rows].tolist())
        return super().batch(step, global_batch_size, rows)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)])
@pytest.mark.parametrize("spec", [PartitionSpec(("data", "fsdp")), PartitionSpec(("data", "fsdp"), "tensor")])
def test_equals_the_batch_on_every_mesh(shape, spec):
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    dataset = CountingDataset()
    sharding = NamedSharding(mesh, spec)
    arrays = device.global_batch(dataset, 7, 16, sharding)
    assert dataset.asked == [list(range(16))]  # all keys and devices from one reading
    expected = SyntheticDataset(500, 16, 0, 1000).batch(7, 16, slice(None))
    assert tuple(arrays) == packing.KEYS
    for key, array in arrays.items():
        assert array.sharding == sharding and array.dtype == np.int32
        np.testing.assert_array_equal(np.asarray(array), expected[key])


def test_only_the_rows_of_own_devices_are_built(monkeypatch):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    whole = sharding.addressable_devices_indices_map

    def own(shape):
        return dict(list(whole(shape).items())[5:])

    def assemble(shape, _, piece):
        return jnp.concatenate([piece(index) for index in own(shape).values()])

    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", lambda self, shape: own(shape))
    monkeypatch.setattr(jax, "make_array_from_callback", assemble)
    dataset = CountingDataset()
    pieces = device.global_batch(dataset, 0, 16, sharding)
    assert dataset.asked == [[10, 11, 12, 13, 14, 15]]
    expected = SyntheticDataset(500, 16, 0, 1000).batch(0, 16, slice(10, 16))
    for key, array in pieces.items():
        np.testing.assert_array_equal(np.asarray(array), expected[key])
