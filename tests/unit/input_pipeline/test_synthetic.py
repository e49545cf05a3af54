import numpy as np

from MaxText.input_pipeline.synthetic import FRESH_ONE_IN, STRIDE, SyntheticDataset


def dataset(seed=0, vocab_size=1000):
    return SyntheticDataset(vocab_size, 64, seed, num_windows=100)


def test_depends_on_seed_and_row_only():
    whole = dataset().batch(5, 8, slice(None))
    again = dataset().batch(0, 48, np.array([42, 40]))
    for key, array in whole.items():
        np.testing.assert_array_equal(array[[2, 0]], again[key])
    assert (dataset(seed=1).batch(5, 8, slice(None))["inputs"] != whole["inputs"]).mean() > 0.5
    assert (whole["inputs"][0] != whole["inputs"][1]).mean() > 0.5


def test_ids_are_valid_and_documents_end():
    batch = dataset(vocab_size=50).batch(0, 512, slice(None))
    assert batch["inputs"].dtype == np.int32 and batch["inputs"].shape == (512, 64)
    assert batch["inputs"].min() == 0 and batch["inputs"].max() == 49
    assert batch["inputs_segmentation"].max() > 1 and batch["targets_segmentation"].min() == 0
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])


def test_the_next_token_is_mostly_predictable():
    batch = dataset().batch(0, 256, slice(None))
    predicted = 1 + (batch["inputs"] - 1 + STRIDE) % 999
    assert abs((predicted == batch["targets"]).mean() - (1 - 1 / FRESH_ONE_IN)) < 0.03


def test_num_batches():
    assert [dataset().num_batches(size) for size in (1, 50, 99, 100, 101)] == [100, 2, 2, 1, 1]
