"""Cut windows of a token stream into model inputs: shifted targets, positions, segment numbers, loss mask.

In: windows of L + 1 tokens and how many of them are real. Out: the batch, int32 [B, L] under each of KEYS. Documents
are told apart by the EOS that ends each, and the mask comes from segments alone: comparing targets with a pad id would
also drop every true EOS wherever pad == eos, and the model would never learn to stop.
"""

import numpy as np

KEYS = (
    "inputs", "inputs_position", "inputs_segmentation", "targets", "targets_position", "targets_segmentation",
)  # fmt: skip


def pack(windows: np.ndarray, lengths: np.ndarray, eos_id: int, document_masking: bool = True) -> dict[str, np.ndarray]:
    """The batch made from int32 windows [B, L + 1] of which row r has `lengths[r]` real tokens.

    Segments count the documents of a row from 1, and padding is 0. `targets_segmentation` is 0, that is without loss,
    also where the target belongs to another document than its input. Positions restart with each document.
    Without `document_masking` a row is one segment, whatever it holds.
    """
    width = windows.shape[1]
    is_end = (windows == eos_id) & document_masking
    is_end[:, -1] = False  # nothing follows it in this row
    second_starts = np.flatnonzero(is_end) + 1  # where a document begins inside a row, counted through all rows
    row_starts = np.arange(0, windows.size, width)
    starts = np.sort(np.concatenate([row_starts, second_starts]))
    numbers = np.arange(1, starts.size + 1) - np.searchsorted(starts, starts // width * width)
    sizes = np.diff(starts, append=windows.size)
    segments = np.repeat(numbers.astype(np.int32), sizes)
    positions = np.arange(windows.size, dtype=np.int32) - np.repeat(starts.astype(np.int32), sizes)
    target_segments = segments.copy()
    target_segments[second_starts] = 0  # the input before it is of another document
    segments, positions, target_segments = (a.reshape(windows.shape) for a in (segments, positions, target_segments))
    if lengths.min(initial=width) < width:
        padding = np.arange(width) >= lengths[:, None]
        for array in (segments, positions, target_segments):
            array[padding] = 0
    return {
        "inputs": windows[:, :-1],
        "inputs_position": positions[:, :-1],
        "inputs_segmentation": segments[:, :-1],
        "targets": windows[:, 1:],
        "targets_position": positions[:, 1:],
        "targets_segmentation": target_segments[:, 1:],
    }
