"""The global batch as sharded JAX arrays, of which each process builds only the rows its own devices hold.

In: a dataset, a step and a sharding. Out: one jax.Array per key. The rows come from the sharding and never from the
process number, which would be wrong as soon as a model axis of the mesh crosses processes.
"""

from typing import Any

import jax
import numpy as np

from MaxText.input_pipeline.loader import Dataset


def global_batch(
    dataset: Dataset, step: int, global_batch_size: int, sharding: jax.sharding.Sharding
) -> dict[str, jax.Array]:
    """The batch of step `step`, int32 [global_batch_size, sequence_length] under each of packing.KEYS."""
    shape = (global_batch_size, dataset.sequence_length)
    indices = sharding.addressable_devices_indices_map(shape).values()
    ranges = sorted({index[0].indices(global_batch_size)[:2] for index in indices if index is not None})
    local = dataset.batch(step, global_batch_size, np.concatenate([np.arange(*rows) for rows in ranges]))
    offsets = dict(zip(ranges, np.cumsum([0] + [stop - start for start, stop in ranges[:-1]]).tolist(), strict=True))

    def piece(array: np.ndarray, index: Any) -> np.ndarray:
        start, stop = index[0].indices(global_batch_size)[:2]
        offset = offsets[start, stop]
        return array[offset : offset + stop - start, index[1]]

    return {
        key: jax.make_array_from_callback(shape, sharding, lambda index, array=array: piece(array, index))
        for key, array in local.items()
    }
