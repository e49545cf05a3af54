import itertools

import numpy as np

from MaxText.input_pipeline import packing


def reference(window, length, eos_id):
    """One row, token by token, straight from the definition."""
    width = len(window)
    segment, position, segments, positions = 1, 0, [], []
    for column in range(width):
        segments.append(segment if column < length else 0)
        positions.append(position if column < length else 0)
        position += 1
        if window[column] == eos_id:
            segment, position = segment + 1, 0
    loss = [after if after == before else 0 for before, after in itertools.pairwise(segments)]
    return {
        "inputs": window[:-1],
        "inputs_position": positions[:-1],
        "inputs_segmentation": segments[:-1],
        "targets": window[1:],
        "targets_position": positions[1:],
        "targets_segmentation": loss,
    }


def test_a_row_by_hand():
    window = np.array(
        [[5, 6, 0, 7, 0, 0, 8, 9, 0]], np.int32
    )  # documents 5 6, 7, an empty one, 8; 9 and EOS are padding
    batch = packing.pack(window, np.array([7]), eos_id=0)
    assert batch["inputs"].tolist() == [[5, 6, 0, 7, 0, 0, 8, 9]]
    assert batch["targets"].tolist() == [[6, 0, 7, 0, 0, 8, 9, 0]]
    assert batch["inputs_segmentation"].tolist() == [[1, 1, 1, 2, 2, 3, 4, 0]]
    assert batch["targets_segmentation"].tolist() == [[1, 1, 0, 2, 0, 0, 0, 0]]
    assert batch["inputs_position"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]
    assert batch["targets_position"].tolist() == [[1, 2, 0, 1, 0, 0, 0, 0]]


def test_equals_the_definition_on_random_rows():
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows, width = rng.integers(1, 9), rng.integers(2, 40)
        windows = rng.integers(0, rng.integers(2, 30), (rows, width)).astype(np.int32)
        lengths = np.where(rng.random(rows) < 0.5, width, rng.integers(0, width + 1, rows))
        batch = packing.pack(windows, lengths, eos_id=0)
        assert tuple(batch) == packing.KEYS
        for row in range(rows):
            for key, expected in reference(windows[row], lengths[row], 0).items():
                assert batch[key].dtype == np.int32
                np.testing.assert_array_equal(batch[key][row], expected, err_msg=key)


def test_every_true_eos_target_is_kept_and_cross_document_targets_are_masked():
    rng = np.random.default_rng(1)
    windows = np.where(rng.random((50, 65)) < 0.1, 0, rng.integers(1, 9, (50, 65))).astype(np.int32)
    windows[windows[:, :-1].nonzero()[0], 0] = 3  # no row begins with an EOS
    batch = packing.pack(windows, np.full(50, 65), eos_id=0)
    after_eos = batch["inputs"] == 0
    assert after_eos.sum() > 100
    assert not batch["targets_segmentation"][after_eos].any()
    assert batch["targets_segmentation"][(batch["targets"] == 0) & ~after_eos].all()


def test_padding_is_told_by_length_even_where_it_looks_like_text():
    batch = packing.pack(np.full((2, 9), 4, np.int32), np.array([4, 0]), eos_id=0)
    assert batch["inputs_segmentation"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [0] * 8]
    assert batch["targets_segmentation"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [0] * 8]
