"""Which of the scanned records become documents, in which shard, and on which side of the split.

In: the indices of all scans. Out: for each shard the references of its records. Of equal or nearly equal documents the
first in the order of units is kept, so the result depends neither on time nor on the number of workers. This is the
one place where all units meet: 544 bytes a document with near-duplicate search, 32 without.
"""

import json
from collections import Counter
from collections.abc import Sequence

import numpy as np

from MaxText.input_pipeline import token_blocks
from MaxText.preparation import near_duplicates
from MaxText.preparation.tasks import Workplace

SAMPLE_BYTES = 50 * 10**6  # text that a tokenizer is trained on, if none is given


def choose(
    workplace: Workplace, units: Sequence[int], threshold: float, held_out_one_in: int, repositories: bool
) -> Counter[str]:
    """Write the references of every shard; returns the documents dropped, by reason."""
    index, places = _read_index(workplace, units)
    is_kept = np.zeros(len(index), bool)
    order = np.lexsort((np.arange(len(index)), index[:, 1], index[:, 0]))
    same = np.all(index[order[1:], :2] == index[order[:-1], :2], axis=1)
    is_kept[order[np.append(True, ~same)] if order.size else order] = True
    dropped = Counter({"duplicate": int(len(index) - is_kept.sum())})
    if threshold > 0:
        numbers = np.flatnonzero(is_kept)
        firsts = near_duplicates.clusters(_read_signatures(workplace, units, places[numbers]), threshold)
        is_kept[numbers[firsts != np.arange(numbers.size)]] = False
        dropped["near_duplicate"] = int(numbers.size - is_kept.sum())
    is_heldout = index[:, 2] % np.uint64(held_out_one_in) == 0 if held_out_one_in else np.zeros(len(index), bool)
    references = np.column_stack([places, index[:, 2].view(np.int64), is_heldout])
    buckets = places[:, 0]
    if repositories:  # all files of a repository meet in one shard, side by side
        buckets = (index[:, 2] // np.uint64(2**16) % np.uint64(len(units))).astype(np.int64)
        order = np.lexsort((places[:, 1], places[:, 0], index[:, 2]))
        references, buckets, is_kept = references[order], buckets[order], is_kept[order]
    for position, unit in enumerate(units):
        bucket = position if repositories else unit
        path = workplace.file("chosen", unit, "npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, references[is_kept & (buckets == bucket)])
    return +dropped


def sample_texts(workplace: Workplace, units: Sequence[int]) -> list[str]:
    """Training texts, at most SAMPLE_BYTES of them, drawn by hash: the same ones for the same texts."""
    index, places = _read_index(workplace, units)
    references = np.concatenate([np.load(workplace.file("chosen", unit, "npy")) for unit in units])
    is_chosen = np.zeros(len(index), bool)
    starts = np.searchsorted(places[:, 0], references[:, 0])
    is_chosen[(starts + references[:, 1])[references[:, 3] == 0]] = True
    rows = np.flatnonzero(is_chosen)
    rows = rows[np.argsort(index[rows, 0], kind="stable")]
    rows = np.sort(rows[np.cumsum(index[rows, 3]) <= SAMPLE_BYTES])
    texts = []
    for unit in units:
        reader = token_blocks.open_array_record(workplace.file("scan", unit, "texts"))
        for record in places[rows, 1][places[rows, 0] == unit].tolist():
            header, _, content = reader.read(record, record + 1)[0].partition(b"\n")
            texts += [content.decode()] if json.loads(header)[0] == "text" else []
    return texts


def _read_signatures(workplace: Workplace, units: Sequence[int], places: np.ndarray) -> np.ndarray:
    """uint32 [places, near_duplicates.SIZE]: the signatures of these records, which are in the order of units."""
    parts = []
    for unit in units:
        signatures = np.load(workplace.file("scan", unit, "signatures.npy"), mmap_mode="r")
        parts.append(signatures[places[places[:, 0] == unit, 1]])
    return np.concatenate(parts)


def _read_index(workplace: Workplace, units: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The index of all units in one, uint64 [records, len(tasks.INDEX)], and int64 [records, (unit, record)]."""
    parts = [np.load(workplace.file("scan", unit, "index.npy")) for unit in units]
    places = [np.column_stack([np.full(len(p), unit), np.arange(len(p))]) for unit, p in zip(units, parts, strict=True)]
    return np.concatenate(parts), np.concatenate(places).astype(np.int64)
