"""The batches of a run's steps to come: the first made at once and used while reading ahead starts."""

from collections.abc import Iterator

import jax

from MaxText import sharding
from MaxText.input_pipeline import device, loader
from MaxText.job import Job

_BATCHES_AHEAD = 4  # kept ready


class BatchFeed:
    """An iterator over the batches of the steps after `first`, sharded over the job's mesh.

    Attributes:
        made: batches made so far, by the threads that read ahead.
        taken: batches given out.
    """

    def __init__(self, job: Job, dataset: loader.Dataset, first: int):
        self._job, self._dataset = job, dataset
        self._where = sharding.batch_sharding(job.mesh)
        self.made = self.taken = 0
        self._batches = self._generate(first)

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        batch = next(self._batches)
        self.taken += 1
        return batch

    def _make(self, step: int) -> dict[str, jax.Array]:
        batch = device.global_batch(self._dataset, step, self._job.global_batch_size, self._where)
        self.made += 1
        return batch

    def _generate(self, first: int) -> Iterator[dict[str, jax.Array]]:
        config = self._job.config
        yield self._make(first)
        yield from loader.read_ahead(
            self._make,
            first + 1,
            config.steps - first - 1,
            num_threads=config.grain_worker_count,
            buffer_size=_BATCHES_AHEAD,
        )
