from types import SimpleNamespace

import numpy as np
import pytest

from MaxText.input_pipeline import packing
from MaxText.input_pipeline.loader import TokenDataset, check_epochs, open_datasets, read_ahead

LENGTH = 24


def open_train(directory, seed=0, repeat=True):
    return TokenDataset(directory, 1000, LENGTH, seed, repeat)


@pytest.fixture
def shards(write_blocks, documents):
    return write_blocks(documents, shard_tokens=700)


def test_every_token_is_seen_once_an_epoch(shards, documents):
    dataset = open_train(shards)
    manifest = dataset.manifest
    assert len(manifest.shards) > 3
    assert dataset.num_windows == sum(-(-(shard.tokens - 1) // LENGTH) for shard in manifest.shards)
    expected_inputs = np.bincount(np.concatenate(documents), minlength=1000)
    expected_targets = np.bincount(np.concatenate([[*document[1:], 0] for document in documents]), minlength=1000)
    for epoch in (0, 1):
        batch = dataset.batch(epoch, dataset.num_windows, slice(None))
        inputs = np.bincount(batch["inputs"][batch["inputs_segmentation"] > 0], minlength=1000)
        np.testing.assert_array_equal(inputs[1:], expected_inputs[1:])
        assert len(documents) - len(manifest.shards) <= inputs[0] <= len(documents)  # a last EOS may be a target only
        targets = np.bincount(batch["targets"][batch["targets_segmentation"] > 0], minlength=1000)
        np.testing.assert_array_equal(targets, expected_targets)


def test_unshuffled_windows_spell_the_stream(write_blocks, documents):
    dataset = open_train(write_blocks(documents), seed=None)
    stream = np.concatenate([[*document, 0] for document in documents])
    inputs = dataset.batch(0, dataset.num_windows, slice(None))["inputs"].ravel()
    np.testing.assert_array_equal(inputs[: stream.size - 1], stream[:-1])
    assert inputs.size - stream.size < LENGTH


def test_epochs_have_orders_of_their_own(shards):
    dataset = open_train(shards)
    size = dataset.num_windows
    first, second = (dataset.batch(step, size, slice(None))["inputs"] for step in (0, 1))
    assert not np.array_equal(first, second)
    assert sorted(map(bytes, first)) == sorted(map(bytes, second))
    assert not np.array_equal(first, open_train(shards, seed=1).batch(0, size, slice(None))["inputs"])
    plain = open_train(shards, seed=None)
    np.testing.assert_array_equal(*(plain.batch(step, size, slice(None))["inputs"] for step in (0, 1)))


@pytest.mark.parametrize("shares", [1, 2, 4, 8])
def test_shares_assemble_to_the_same_global_batch(shards, shares):
    for step in (0, 3, 1000, 123_456):
        whole = open_train(shards).batch(step, 16, slice(None))
        size = 16 // shares
        parts = [open_train(shards).batch(step, 16, slice(i * size, (i + 1) * size)) for i in range(shares)]
        for key in packing.KEYS:
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), whole[key])
    np.testing.assert_array_equal(
        open_train(shards).batch(7, 16, np.array([9, 2]))["targets"],
        open_train(shards).batch(7, 16, slice(None))["targets"][[9, 2]],
    )


def test_samples_do_not_depend_on_the_batch_size(shards):
    dataset = open_train(shards)
    small = np.concatenate([dataset.batch(step, 4, slice(None))["inputs"] for step in range(4)])
    np.testing.assert_array_equal(small, dataset.batch(0, 16, slice(None))["inputs"])


def test_evaluation_ends_in_padding(shards):
    dataset = open_train(shards, seed=None, repeat=False)
    size = dataset.num_windows // 3 + 1
    assert dataset.num_batches(size) == 3
    batches = [dataset.batch(step, size, slice(None)) for step in range(4)]
    assert all(batch["inputs"].shape == (size, LENGTH) for batch in batches)
    windows = np.concatenate([batch["inputs_segmentation"].any(axis=1) for batch in batches])
    assert windows[: dataset.num_windows].all() and not windows[dataset.num_windows :].any()
    assert not batches[3]["targets_segmentation"].any()


def test_read_ahead_is_in_order(shards):
    dataset = open_train(shards)
    ahead = list(read_ahead(lambda step: (step, dataset.batch(step, 4, slice(None))), 5, 20, 2, 4))
    assert [step for step, _ in ahead] == list(range(5, 25))
    for step, batch in ahead:
        np.testing.assert_array_equal(batch["inputs"], dataset.batch(step, 4, slice(None))["inputs"])


def test_errors_of_the_threads_arrive(shards):
    def fail(step):
        raise ValueError(f"step {step} is broken")

    with pytest.raises(ValueError, match="step 3 is broken"):
        next(read_ahead(fail, 3, 2, 2, 2))


def test_check_epochs():
    check_epochs(steps=100, global_batch_size=8, num_windows=200, num_epoch=4)
    check_epochs(steps=10**9, global_batch_size=8, num_windows=200, num_epoch=-1)
    with pytest.raises(ValueError, match=r"4\.04 epochs of the 200 .*num_epoch=4; use steps=100 at the most"):
        check_epochs(steps=101, global_batch_size=8, num_windows=200, num_epoch=4)


def config(**changes):
    values = {
        "dataset_type": "grain",
        "grain_train_files": "",
        "grain_eval_files": "",
        "tokenizer_path": "",
        "vocab_size": 1000,
        "vocab_padding": 0,
        "max_target_length": LENGTH,
        "enable_data_shuffling": True,
        "data_shuffle_seed": 0,
        "fim_rate": 0.0,
        "fim_spm_rate": 0.5,
        "document_masking": True,
    }
    return SimpleNamespace(**values | changes)


def test_open_prepared_data(shards, write_blocks):
    heldout = write_blocks([[1, 2, 3] * 20], name="heldout")
    datasets = open_datasets(
        config(grain_train_files=str(shards), grain_eval_files=str(heldout), vocab_size=1024), print
    )
    assert datasets.description.startswith("DATA: a test; ") and "held-out files" in datasets.description
    assert datasets.token_bytes.tolist() == [*range(1000), *[0] * 24] and datasets.token_bytes.dtype == np.int32
    assert (datasets.eos_id, datasets.train.vocab_size, datasets.evaluation.num_windows) == (0, 1024, 3)
    assert open_datasets(config(grain_train_files=str(shards)), print).evaluation is None


def test_open_synthetic_data():
    datasets = open_datasets(config(dataset_type="synthetic"), print)
    assert "SYNTHETIC" in datasets.description and datasets.train.identity == "synthetic"
    first, second = (d.batch(0, 2, slice(None))["inputs"] for d in (datasets.train, datasets.evaluation))
    assert first.shape == (2, LENGTH) and not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({}, ValueError, "needs grain_train_files"),
        ({"grain_train_files": "/nowhere"}, FileNotFoundError, "/nowhere holds no prepared data"),
        ({"dataset_type": "tf"}, ValueError, "dataset_type=tf: use embedded, grain, hf or synthetic"),
    ],
)
def test_bad_settings(changes, error, message):
    with pytest.raises(error, match=message):
        open_datasets(config(**changes), print)


@pytest.mark.parametrize("keys", [{"vocab_size": 512}, {"vocab_size": 1000, "vocab_padding": 488}])
def test_a_model_with_too_few_ids_for_the_tokens_is_refused(shards, keys):
    with pytest.raises(ValueError, match="is not below vocab_size - vocab_padding = 512"):
        open_datasets(config(grain_train_files=str(shards), **keys), print)


def test_different_tokenizers_are_refused(shards, write_blocks):
    heldout = write_blocks([[1, 2, 3] * 20], vocab_size=900, name="heldout")
    with pytest.raises(ValueError, match=r"made with different tokenizers: fake of 1000 .* and fake of 900"):
        open_datasets(config(grain_train_files=str(shards), grain_eval_files=str(heldout)), print)
