"""Streaming without preparing: the same batch interface, from local files that `datasets` serves offline."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from MaxText.input_pipeline import packing, token_block_writer, tokenizer
from MaxText.input_pipeline.loader import open_datasets, read_ahead
from MaxText.input_pipeline.token_dataset import TokenDataset


@pytest.fixture(scope="module")
def texts():
    import inspect

    source = inspect.getsource(subprocess)
    return [source[start : start + 1500] for start in range(0, 45_000, 1500)] + ["too short"]


@pytest.fixture(scope="module")
def tokenizer_path(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer.train(texts, 500, folder)
    return str(folder)


@pytest.fixture(params=["hf", "jsonl"])
def source(request, texts, tmp_path):
    """The stack's own columns, in a Parquet file that `datasets` streams, and in a JSONL file."""
    rows = [
        {"content": text, "max_stars_repo_name": "a/b", "max_stars_repo_path": f"{i}.py", "lang": "Python"}
        for i, text in enumerate(texts)
    ]
    if request.param == "hf":
        folder = tmp_path / "the-stack"
        folder.mkdir()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:20]), folder / "train-0.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[20:]), folder / "train-1.parquet")
        return f"hf:{folder}"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{tmp_path / 'a.jsonl'}"


def open_stream(source, tokenizer_path, **changes):
    values = {
        "dataset_type": "hf", "source": source, "text_column": "", "tokenizer_path": tokenizer_path, "vocab_size": 512,
        "vocab_padding": 0, "max_target_length": 64, "fim_rate": 0.0, "fim_spm_rate": 0.5, "document_masking": True,
        "num_epoch": -1, "enable_data_shuffling": True, "data_shuffle_seed": 0, "grain_eval_files": "", "steps": "100",
    }  # fmt: skip
    return open_datasets(SimpleNamespace(**values | changes), lambda line: None)


def test_it_is_what_preparing_gives_without_shuffling(source, texts, tokenizer_path, tmp_path):
    loaded = tokenizer.load(tokenizer_path)
    writer = token_block_writer.TokenBlockWriter(tmp_path / "blocks", loaded, 64, 10**9)
    writer.add(loaded.encode(texts[:-1]), 1)
    writer.finish("x", "none", {})
    prepared = TokenDataset(tmp_path / "blocks", 512, 64, None, repeat=True)
    streamed = open_stream(source, tokenizer_path)
    assert "STREAMED from" in streamed.description and streamed.evaluation is None
    count = prepared.num_windows - 1  # the last one is padded there, and goes on in the next epoch here
    for key in packing.KEYS:
        np.testing.assert_array_equal(
            streamed.train.batch(0, count, slice(None))[key], prepared.batch(0, count, slice(None))[key]
        )
    assert streamed.token_bytes.shape == (512,)


@pytest.mark.parametrize("fim_rate", [0.0, 0.5])
def test_any_step_in_any_order_by_any_share(source, tokenizer_path, fim_rate):
    """A fresh stream at step k, as after a resume, gives what the first one gave; the epoch ends in between."""
    first = open_stream(source, tokenizer_path, fim_rate=fim_rate).train
    batches = [first.batch(step, 8, slice(None)) for step in range(60)]
    resumed = open_stream(source, tokenizer_path, fim_rate=fim_rate).train
    for step in (37, 38, 5, 59):
        parts = [resumed.batch(step, 8, slice(i * 4, i * 4 + 4)) for i in range(2)]
        for key in packing.KEYS:
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), batches[step][key])
    ahead = read_ahead(lambda step: first.batch(step, 8, slice(None)), 40, 15, 2, 4)
    for step, batch in enumerate(ahead, 40):
        np.testing.assert_array_equal(batch["targets"], batches[step]["targets"])


def test_it_ends_after_num_epoch(source, tokenizer_path):
    stream = open_stream(source, tokenizer_path, num_epoch=2).train
    with pytest.raises(ValueError, match=r"has been read num_epoch=2 times.*raise num_epoch"):
        for step in range(1000):
            stream.batch(step, 8, slice(None))


def test_settings_that_will_not_do(source, tokenizer_path):
    with pytest.raises(ValueError, match="dataset_type=hf needs source and tokenizer_path"):
        open_stream(source, "")
    with pytest.raises(ValueError, match="steps=auto needs to know how much data there is"):
        open_stream(source, tokenizer_path, steps="auto")
    with pytest.raises(ValueError, match="has 500 entries, more than vocab_size - vocab_padding = 400"):
        open_stream(source, tokenizer_path, vocab_size=400)
    with pytest.raises(ValueError, match="not one document to train on; name its text_column"):
        open_stream(source, tokenizer_path, text_column="lang").train.batch(0, 1, slice(None))


def test_ids_of_another_tokenizer_are_refused(tokenizer_path, tmp_path):
    table = pyarrow.table({"input_ids": pyarrow.array([[20, 30, 40], [20, 505]], pyarrow.list_(pyarrow.int32()))})
    pyarrow.parquet.write_table(table, tmp_path / "ids.parquet")
    stream = open_stream(f"parquet:{tmp_path / 'ids.parquet'}", tokenizer_path, max_target_length=2).train
    with pytest.raises(ValueError, match=r"row 1: token ids 20 to 505 are not all of the tokenizer's 0 to 499"):
        stream.batch(0, 4, slice(None))


def test_training_on_prepared_data_imports_no_heavy_library():
    program = (
        "import sys, MaxText.train_loop, MaxText.input_pipeline.loader\n"
        "heavy = {'datasets', 'pyarrow', 'tensorflow_datasets', 'pandas', 'fsspec'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, env={**__import__("os").environ, "JAX_PLATFORMS": "cpu"}
    )
