"""Tokens of a fixed random process, for benchmarks and tests: no files, the same interface as the loader's dataset.

In: a seed and the number of a sample. Out: its tokens, a pure function of both. A token is followed by itself plus
STRIDE most of the time, and else by a fresh draw in which small ids are the more frequent: there is something to learn.
"""

import numpy as np

from MaxText.input_pipeline import packing
from MaxText.input_pipeline.permutation import mix

EOS_ID = 0
STRIDE = 17
FRESH_ONE_IN = 8
EOS_ONE_IN = 512


class SyntheticDataset:
    """Batches of the random process; `num_windows` samples, after which evaluation ends and training goes on."""

    def __init__(self, vocab_size: int, sequence_length: int, seed: int, num_windows: int):
        self.identity = "synthetic"
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.eos_id = EOS_ID
        self.num_windows = num_windows
        self._key = mix(np.full(1, seed, np.uint64))

    def num_batches(self, global_batch_size: int) -> int:
        """Batches in one pass over the data."""
        return -(-self.num_windows // global_batch_size)

    def batch(self, step: int, global_batch_size: int, rows: slice | np.ndarray) -> dict[str, np.ndarray]:
        """The rows `rows` of the global batch of step `step`: int32 [rows, sequence_length] under packing.KEYS."""
        samples = step * global_batch_size + np.arange(global_batch_size)[rows]
        windows = self._windows(samples)
        return packing.pack(windows, np.full(samples.size, windows.shape[1]), EOS_ID)

    def _windows(self, samples: np.ndarray) -> np.ndarray:
        width = self.sequence_length + 1
        columns = np.arange(width)
        noise = mix(mix(self._key ^ samples.astype(np.uint64))[:, None] + columns.astype(np.uint64))
        choice = (noise & np.uint64(0xFFFF)).astype(np.int64)
        uniform = (noise >> np.uint64(16)).astype(np.float64) / 2.0**48
        fresh = 1 + np.minimum(np.power(float(self.vocab_size - 1), uniform).astype(np.int64) - 1, self.vocab_size - 2)
        is_eos = choice % EOS_ONE_IN == 1
        is_fresh = (choice % FRESH_ONE_IN == 0) | is_eos
        is_fresh[:, 0] = True
        is_fresh[:, 1:] |= is_eos[:, :-1]
        last_fresh = np.maximum.accumulate(np.where(is_fresh, columns, 0), axis=1)
        drawn = np.take_along_axis(fresh, last_fresh, axis=1)
        tokens = 1 + (drawn - 1 + STRIDE * (columns - last_fresh)) % (self.vocab_size - 1)
        return np.where(is_eos, EOS_ID, tokens).astype(np.int32)
