import hashlib
import inspect
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from MaxText.input_pipeline import tokenizer

TORTURE = [
    "", " ", "\n", "\t\tx\n", "a\r\nb\r\n", "a\rb", "x\x0cy", "a\x00b", "\ufeffimport os\n",
    "\U0001f468\u200d\U0001f469",
    "e\u0301 \u00e9", "\ufb01 \u2460 \u00bd \u212b", "a\u2028b\u2029c", "x" + " " * 97 + "y", "\n" * 50 + "  \n \t\n",
    "  def f( ):\n\treturn  1\n", "\u2581x \u2581\u2581", "\xa0\u3000\u200b", "0123456789 1e-5 0xFF",
    "日本語 русский عربى",
    '"""' * 3 + "'''", "!!\n\n    ??\r\n\t;;", "<0x0A><unk><s></s>",
]  # fmt: skip
SPOOFS = [*tokenizer.SPECIAL_TOKENS, "x = '<|endoftext|>'\n", "</s>", "<s>", "<|im_end|>"]


@pytest.fixture(scope="module")
def texts():
    return [inspect.getsource(module) for module in (argparse_module(), json, subprocess, socket, inspect)]


def argparse_module():
    import argparse

    return argparse


@pytest.fixture(scope="module")
def directory(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe")
    tokenizer.train(texts, 1000, path)
    return path


@pytest.fixture(scope="module")
def bpe(directory):
    return tokenizer.load(str(directory))


def test_round_trip_is_exact(bpe, texts):
    samples = TORTURE + SPOOFS + texts
    assert [bpe.decode(ids) for ids in bpe.encode(samples)] == samples


def test_special_tokens_in_text_are_ordinary_characters(bpe):
    special = set(range(len(tokenizer.SPECIAL_TOKENS)))
    for ids in bpe.encode(SPOOFS):
        assert ids and not special & set(ids)


def test_ids_and_interface(bpe, directory):
    from transformers import AutoTokenizer

    hugging_face = AutoTokenizer.from_pretrained(directory)
    assert hugging_face.convert_tokens_to_ids(list(tokenizer.SPECIAL_TOKENS)) == list(range(8))
    assert (hugging_face.eos_token_id, hugging_face.bos_token_id, hugging_face.pad_token_id) == (0, 0, 1)
    assert hugging_face("def f(x):\n    return x").input_ids == bpe.encode(["def f(x):\n    return x"])[0]
    assert (bpe.eos_id, bpe.vocab_size, len(hugging_face)) == (0, 1000, 1000)


def edited(directory, folder, change):
    """A copy of a tokenizer whose tokenizer.json was changed."""
    shutil.copytree(directory, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


def test_role_tokens_that_are_not_special_cannot_be_spoken(directory, tmp_path):
    """As Qwen's: the text gives ordinary tokens, by the dictionary of words and without it."""

    def make_plain(content):
        for token in content["added_tokens"][2:]:
            token["special"] = False

    loaded = tokenizer.load(edited(directory, tmp_path / "plain", make_plain))
    samples = [*SPOOFS, "é <|fim_prefix|> x", "a<|repo_name|>b<|file_sep|>"]
    assert not set(range(8)) & {token for ids in loaded.encode(samples) for token in ids}
    assert [loaded.decode(ids) for ids in loaded.encode(samples)] == samples
    assert loaded.encode(samples) == tokenizer.load(str(directory)).encode(samples)
    assert loaded.special_ids["fim_prefix"] == 2 and not loaded.token_bytes()[:8].any()
    loaded.save(tmp_path / "saved")
    assert tokenizer.load(str(tmp_path / "saved")).fingerprint == loaded.fingerprint


def test_truncation_and_padding_are_left_out(directory, texts, bpe, tmp_path):
    def limit(content):
        content["truncation"] = {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
        padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1}
        content["padding"] = padding | {"pad_type_id": 0, "pad_token": "<|pad|>"}

    loaded = tokenizer.load(edited(directory, tmp_path / "short", limit))
    assert loaded.encode([*texts, "é" * 99, "x"]) == bpe.encode([*texts, "é" * 99, "x"])
    loaded.save(tmp_path / "saved")
    assert tokenizer.load(str(tmp_path / "saved")).fingerprint == loaded.fingerprint


def test_the_fingerprint_is_that_of_the_file(directory, bpe):
    """Prepared data holds it: it never changes."""
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert bpe.fingerprint == hashlib.sha256(backend.to_str().encode()).hexdigest()


@pytest.mark.filterwarnings("ignore:builtin type .*Swig:DeprecationWarning", "ignore:.*does not reproduce text exactly")
def test_role_tokens_that_can_be_spoken_are_refused(texts, tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "sp"), vocab_size=600, model_type="bpe",
        byte_fallback=True, user_defined_symbols=["<fim_prefix>"], max_sentence_length=10**6, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="the text of its fim_prefix token is encoded as that token"):
        tokenizer.load(str(tmp_path / "sp.model"))


def test_training_is_deterministic(texts, directory, bpe, tmp_path):
    tokenizer.train(texts, 1000, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert tokenizer.load(str(tmp_path)).fingerprint == bpe.fingerprint


def test_newline_and_indentation_are_one_piece(bpe):
    (ids,) = bpe.encode(["):\n        return"])
    assert len(ids) <= 3


def test_token_bytes_add_up(bpe, texts):
    sizes = bpe.token_bytes()
    assert sizes.dtype == np.int32 and sizes.shape == (1000,) and not sizes[:8].any()
    for text, ids in zip(texts + TORTURE, bpe.encode(texts + TORTURE), strict=True):
        assert sizes[ids].sum() == len(text.encode())


def test_a_tiny_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size=200 is too small.*at least 264"):
        tokenizer.train(["x"], 200, tmp_path)


@pytest.mark.filterwarnings("ignore:builtin type .*Swig:DeprecationWarning")
def test_sentencepiece_model(texts, tmp_path):
    import sentencepiece

    prefix = tmp_path / "sp"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(prefix), vocab_size=600, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, max_sentence_length=10**6, minloglevel=2,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="does not reproduce text exactly"):  # U+2581 becomes a blank
        model = tokenizer.load(f"{prefix}.model")
    assert (model.vocab_size, model.eos_id) == (600, 2)
    samples = [text for text in TORTURE + SPOOFS + texts if "\u2581" not in text and "\0" not in text]
    encoded = model.encode(samples)
    assert [model.decode(ids) for ids in encoded] == samples
    assert not any(model.eos_id in ids for ids in encoded)
    sizes = model.token_bytes()
    assert [sizes[ids].sum() for ids in encoded] == [len(text.encode()) for text in samples]


@pytest.mark.parametrize("name", ["/no/such/tokenizer", "./nowhere", "a/b/c"])
def test_missing_directory(name):
    with pytest.raises(FileNotFoundError, match="there is no such directory"):
        tokenizer.load(name)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such SentencePiece file"):
        tokenizer.load(str(tmp_path / "x.model"))
    with pytest.raises(ValueError, match="no usable Hugging Face tokenizer"):
        tokenizer.load(str(tmp_path))


@pytest.mark.filterwarnings("ignore:builtin type .*Swig:DeprecationWarning")
def test_a_file_that_is_no_sentencepiece_model(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        tokenizer.load(str(tmp_path / "bad.model"))


def test_unreachable_hub_is_told_within_seconds(monkeypatch):
    from huggingface_hub import constants

    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(FileNotFoundError, match="the hub cannot be asked"):
            tokenizer.load("no-such-owner/no-such-tokenizer")
    assert time.monotonic() - started < 10


def test_importing_the_module_imports_no_library():
    code = (
        "import sys, MaxText.input_pipeline.loader\n"
        "assert not {'transformers', 'tokenizers', 'sentencepiece', 'grain', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(tokenizer.__file__).parents[2])
