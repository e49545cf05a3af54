"""The block sizes of the flash kernels for each chip and shape, the VMEM they take, and their estimated cycles.

`flash_blocks.json` is measured in the compiler's static schedule and written by `benchmarks/flash_blocks.py`; a
shape that it does not have gets the blocks of _DEFAULT.
"""

import json
from pathlib import Path

import jax.numpy as jnp

from MaxText.kernels.flash import LANES, Blocks, Plan

PATH = Path(__file__).with_suffix(".json")
_BYTES = 4  # of float32
_VMEM_BYTES = 100 * 2**20  # of 128 MiB: the rest of the program keeps some
_DEFAULT = Blocks(512, 512, 256)

Shape = tuple[str, str, int, int, int]  # chip as JAX calls it, dtype, maps, head dim, value width


def _read() -> dict[Shape, dict[int, dict[str, tuple[Blocks, int]]]]:
    table: dict[Shape, dict[int, dict[str, tuple[Blocks, int]]]] = {}
    for row in json.loads(PATH.read_text()):
        shape = (row["chip"], row["dtype"], row["maps"], row["head_dim"], row["width"])
        table.setdefault(shape, {})[row["length"]] = {
            which: (Blocks(*row[which]["blocks"]), row[which]["cycles"]) for which in ("forward", "backward")
        }
    return table


# shape -> length from which the row holds -> forward and backward -> blocks, and estimated cycles of one query head
TABLE = _read()


def plan(
    chip: str, length: int, num_maps: int, num_keys: int, head_dim: int, width: int, dtype: str, interpret: bool
) -> Plan:
    """What to build the kernels with.

    Args:
        chip: the devices' kind, as JAX calls it.
        length: positions of a row.
        dtype: of q, k and v.

    Raises:
        ValueError: keys and values of that length do not fit into VMEM.
    """
    row = _row((chip, dtype, num_maps, head_dim, width), length)
    preferred = [row[1][which][0] if row else _DEFAULT for which in ("forward", "backward")]
    forward, backward = (_fitted(blocks, length) for blocks in preferred)
    longest = max(forward.query, backward.query)
    padded = -(-length // longest) * longest
    shape = (padded, num_maps, num_keys, head_dim, width, jnp.dtype(dtype).itemsize)
    limit = max(vmem_bytes(blocks, *shape) for blocks in (forward, backward))
    if limit > _VMEM_BYTES:
        raise ValueError(
            f"attention=flash cannot serve max_target_length={length}: with heads of {head_dim} its keys and values "
            f"and their gradients need {limit / 2**20:.0f} MiB of a chip's VMEM, and {_VMEM_BYTES / 2**20:.0f} can be "
            "had; use attention=splash"
        )
    return Plan(forward, backward, max(limit, 16 * 2**20), interpret)


def cycles(which: str, shape: Shape, length: int) -> float | None:
    """Estimated cycles of one query head of one row of the batch; None for a shape that the table does not have.

    Args:
        which: forward or backward.
    """
    row = _row(shape, length)
    return row[1][which][1] * (length / row[0]) ** 2 if row else None


def _row(shape: Shape, length: int) -> tuple[int, dict[str, tuple[Blocks, int]]] | None:
    """The row of the largest length that is not larger, or else of the smallest."""
    rows = TABLE.get(shape)
    if not rows:
        return None
    begins = max((first for first in rows if first <= length), default=min(rows))
    return begins, rows[begins]


def _fitted(blocks: Blocks, length: int) -> Blocks:
    """The blocks, made smaller until padding costs at most an eighth."""
    query = blocks.query
    while query > LANES and -length % query > length // 8:
        query //= 2
    return Blocks(query, min(blocks.key, query), min(blocks.diagonal, query))


def vmem_bytes(
    blocks: Blocks, length: int, num_maps: int, num_keys: int, head_dim: int, width: int, itemsize: int
) -> int:
    """An upper bound of the VMEM of the backward kernel, the larger one: buffers, sums, and the scores of a step."""
    head_dim, width = max(head_dim, LANES), max(width, LANES)
    keys_and_values = length * (num_keys * head_dim + width)
    buffers = 4 * keys_and_values + 2 * blocks.query * (2 * num_maps * head_dim + width)
    sums = keys_and_values + num_maps * head_dim * blocks.query + length * LANES
    scores = 4 * num_maps * blocks.query * max(blocks.key, blocks.diagonal)
    return buffers * itemsize + (sums + scores) * _BYTES
