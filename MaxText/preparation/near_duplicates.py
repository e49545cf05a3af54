"""Documents that are nearly the same, found without comparing each with each.

In: texts, as one signature each. Out: for every document the first one of its cluster. A signature has SIZE numbers;
the share in which two signatures agree estimates the Jaccard similarity of the sets of 5 consecutive words. Documents
that agree in all numbers of a band are compared. One permutation gives all numbers, as the least hash in each
of SIZE parts of the range: 1/SIZE of the work. Source: Li, Owen, Zhang (2012); Shrivastava, Li, arXiv:1406.4784.
"""

import numpy as np

from MaxText.input_pipeline.permutation import mix

SIZE = 128
BANDS = 16
SHINGLE_WORDS = 5
_IN_WORD = np.zeros(256, bool)  # ASCII letters, digits, the underscore, and every byte of other scripts
_IN_WORD[[*range(48, 58), *range(65, 91), 95, *range(97, 123), *range(128, 256)]] = True
_LETTERS = mix(np.arange(256, dtype=np.uint64))
_PLACES = mix(np.arange(1000, 1256, dtype=np.uint64)) | np.uint64(1)
_EDGES = np.arange(1, SIZE, dtype=np.uint64) << np.uint64(57)


def words(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The words of a text: uint64 [words], a hash of each, the same on every machine; int64 [words, 2], where it is."""
    data = np.frombuffer(content, np.uint8)
    is_word = np.zeros(data.size + 2, bool)
    is_word[1:-1] = _IN_WORD[data]
    bounds = np.flatnonzero(is_word[1:] != is_word[:-1]).reshape(-1, 2)
    if not len(bounds):
        return np.zeros(0, np.uint64), bounds
    sizes = bounds[:, 1] - bounds[:, 0]
    begins = np.cumsum(sizes) - sizes
    places = np.arange(sizes.sum(), dtype=np.uint32) - np.repeat(begins.astype(np.uint32), sizes)
    letters = _LETTERS[data[is_word[1:-1]]]
    return mix(np.add.reduceat(letters * _PLACES[places.astype(np.uint8)], begins)), bounds


def id_hashes(ids: np.ndarray) -> np.ndarray:
    """uint64 [tokens]: a hash of each token id, which takes the place of a word's."""
    return mix(ids.astype(np.uint64))


def runs(hashes: np.ndarray, size: int) -> np.ndarray:
    """uint64 [words - size + 1]: a hash of every `size` consecutive words; of all of them if there are fewer."""
    size = min(size, hashes.size)
    count = hashes.size - size + 1
    result = np.zeros(count, np.uint64)
    for offset in range(size):
        result = result * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + count]
    return mix(result)


def signature(hashes: np.ndarray) -> np.ndarray:
    """uint32 [SIZE]: the signature of a text whose words have these hashes; an empty part borrows the next one's."""
    if not hashes.size:
        return np.zeros(SIZE, np.uint32)
    shingles = np.sort(runs(hashes, SHINGLE_WORDS))
    starts = np.concatenate([[0], np.searchsorted(shingles, _EDGES)])
    is_empty = starts == np.append(starts[1:], shingles.size)
    numbers = np.arange(SIZE)
    sources = np.where(is_empty, 2 * SIZE, numbers)  # the nearest part that is not empty, walking up and around
    sources = np.minimum.accumulate(np.concatenate([sources, sources + SIZE])[::-1])[::-1][:SIZE]
    least = shingles[np.minimum(starts, shingles.size - 1)][sources % SIZE]
    return mix(least + (sources - numbers).astype(np.uint64)).astype(np.uint32)


def clusters(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """int64 [documents]: the smallest number in the cluster of each document.

    Args:
        signatures: uint32 [documents, SIZE].
        threshold: estimated similarity from which two documents of one band belong together.
    """
    parents = np.arange(len(signatures))
    rows = SIZE // BANDS
    for band in range(BANDS):
        part = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])
        keys = mix(part[:, 0].astype(np.uint64))
        for column in range(1, rows):
            keys = mix(keys ^ part[:, column].astype(np.uint64))
        order = np.argsort(keys, kind="stable")
        same = keys[order[1:]] == keys[order[:-1]]
        starts = np.flatnonzero(np.append(True, ~same))
        firsts = order[starts[np.cumsum(np.append(True, ~same)) - 1]]
        others = np.flatnonzero(firsts != order)
        for begin in range(0, others.size, 2**16):
            chosen = others[begin : begin + 2**16]
            one, other = firsts[chosen], order[chosen]
            alike = (signatures[one] == signatures[other]).mean(axis=1) >= threshold
            for a, b in zip(one[alike].tolist(), other[alike].tolist(), strict=True):
                _join(parents, a, b)
    for index in range(len(parents)):  # a parent is never larger than its child, so it is final already
        parents[index] = parents[parents[index]]
    return parents


def _join(parents: np.ndarray, one: int, other: int) -> None:
    one, other = _root(parents, one), _root(parents, other)
    parents[max(one, other)] = min(one, other)


def _root(parents: np.ndarray, index: int) -> int:
    while parents[index] != index:
        parents[index] = parents[parents[index]]
        index = int(parents[index])
    return index
