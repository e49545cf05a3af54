"""A tokenizer that does nothing, and directories of token blocks made with it."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from MaxText.input_pipeline import token_block_writer


class FakeTokenizer:
    """Ids are what the test says they are."""

    eos_id = 0
    special_ids: ClassVar[dict[str, int]] = {}

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.name = self.fingerprint = f"fake of {vocab_size}"

    def encode(self, texts):
        raise NotImplementedError

    def decode(self, ids):
        raise NotImplementedError

    def save(self, directory):
        raise NotImplementedError

    def token_bytes(self) -> np.ndarray:
        return np.arange(self.vocab_size, dtype=np.int32)


@pytest.fixture
def write_blocks(tmp_path):
    """write_blocks(documents, ...) -> directory of token blocks."""

    def write(documents, vocab_size=1000, block_tokens=16, shard_tokens=10**9, name="blocks") -> Path:
        directory = tmp_path / name
        writer = token_block_writer.TokenBlockWriter(directory, FakeTokenizer(vocab_size), block_tokens, shard_tokens)
        writer.add(documents, source_bytes=123)
        writer.finish("a test", "none", {"too_short": 1})
        return directory

    return write


@pytest.fixture
def documents():
    """200 documents of 1 to 60 tokens; ids from 1, so that 0 is EOS only."""
    rng = np.random.default_rng(0)
    return [rng.integers(1, 1000, size).tolist() for size in rng.integers(1, 60, 200)]
