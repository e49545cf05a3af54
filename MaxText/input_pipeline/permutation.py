"""A seeded permutation of 0..n-1 that is computed per element, never stored.

In: positions and their epochs, in arrays. Out: where each position goes. A generalized Feistel network over a grid of
rows x columns cells (rows * columns is at least n and less than n + rows, so walking off the end is rare). Ours, and
not Grain's index_shuffle, because importing that costs seconds, and because the order of the data must not change
when a library does.
Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), section 5.
"""

import math

import numpy as np

ROUNDS = 4


def mix(values: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each uint64. Source: splitmix64, Steele et al. (2014), figure 17."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(positions: np.ndarray, size: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """The image of each position under the permutation of 0..size-1 that belongs to (seed, its epoch)."""
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    key = mix(mix(np.full(1, seed, np.uint64)) ^ epochs.astype(np.uint64))
    keys = mix(key + np.arange(ROUNDS, dtype=np.uint64)[:, None])

    def encrypt(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        row, column = np.divmod(values, np.uint64(columns))
        for round_ in range(0, ROUNDS, 2):
            row = (row + mix(column ^ keys[round_]) % np.uint64(rows)) % np.uint64(rows)
            column = (column + mix(row ^ keys[round_ + 1]) % np.uint64(columns)) % np.uint64(columns)
        return row * np.uint64(columns) + column

    images = encrypt(positions.astype(np.uint64), keys)
    outside = np.flatnonzero(images >= size)
    while outside.size:  # cells past the end are walked on until they land inside, which keeps it one to one
        images[outside] = encrypt(images[outside], keys[:, outside])
        outside = outside[images[outside] >= size]
    return images.astype(np.int64)
