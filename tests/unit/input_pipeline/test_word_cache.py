"""Words from the dictionary have the ids that the tokenizer gives; what may differ is left to it."""

import argparse
import inspect
import random
import re
import string

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from MaxText.input_pipeline import tokenizer, word_cache
from MaxText.input_pipeline.word_cache import WordCache


@pytest.fixture(scope="module")
def texts():
    return [inspect.getsource(module) for module in (argparse, inspect, re, random, string)]


@pytest.fixture(params=["code", "qwen"])
def backend(request, texts, tmp_path):
    tokenizer.train(texts, 1500, tmp_path, request.param)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.encode_special_tokens = True
    return backend


def test_the_same_ids_for_every_ascii_text(backend, texts, monkeypatch):
    monkeypatch.setattr(word_cache, "MAX_WORDS", 300)  # so that the dictionary begins anew in between
    words = WordCache(backend)
    rng = random.Random(0)
    characters = [*map(chr, range(128)), *" \n\t'\r" * 8, "<|endoftext|>", "def ", "'S", "://", "\r\n"]
    made = ["".join(rng.choices(characters, k=rng.randrange(60))) for _ in range(3000)]
    samples = [*made, *texts, "", " ", "\n", "it's IT'S we'll", *tokenizer.SPECIAL_TOKENS]
    for sample in samples:
        if sample.isascii():
            assert words.encode(sample) == backend.encode(sample, add_special_tokens=False).ids, repr(sample)


def test_other_text_is_left_to_the_tokenizer(backend):
    words = WordCache(backend)
    assert words.encode("plain") is not None and words.encode("naïve") is None
    backend.add_tokens([AddedToken("<tool>", special=False)])
    words = WordCache(backend)
    assert words.encode("a <tool> b") is None and words.encode("a tool b") is not None


def test_other_tokenizers_are_left_alone(texts, tmp_path):
    tokenizer.train(texts, 600, tmp_path, "starcoder2")
    starcoder = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert WordCache(starcoder).encode("plain") is None
    words = tokenizers.Tokenizer(models.WordLevel({"plain": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert WordCache(words).encode("plain") is None


@pytest.mark.parametrize("pattern", [r"(a)|b+", r"\p{Lu}+|\p{L}+|\s+", r"[a-z]+", r"\p{Greek}+"])
def test_patterns_that_are_not_understood_are_not_used(pattern, texts):
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    assert WordCache(backend).encode("Plain 1") is None
