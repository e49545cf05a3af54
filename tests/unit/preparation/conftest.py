"""A small tokenizer, texts of the standard library, and a preparation of them in this process."""

import email
import hashlib
from pathlib import Path

import pytest

from MaxText import pyconfig
from MaxText.input_pipeline import inputs, tokenizer
from MaxText.preparation import preparing

BASE = str(Path(pyconfig.__file__).parent.parent / "configs/base.yml")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """24 files that pass the rules, of 2 to 40 kB."""
    files = sorted(Path(email.__file__).parent.glob("*.py")) + sorted(Path(email.__file__).parent.glob("mime/*.py"))
    return [text for file in files if 100 < len(text := file.read_text()) < 50_000]


@pytest.fixture(scope="session")
def tokenizer_path(texts, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer.train(texts, 500, folder)
    return str(folder)


@pytest.fixture
def prepare(tmp_path, tokenizer_path, monkeypatch):
    """prepare(source=..., out=..., ...) -> (exit code, lines said)."""

    def run(unit_bytes=10**9, **settings):
        monkeypatch.setattr(inputs, "UNIT_BYTES", unit_bytes)
        keys = {"run_name": "x", "vocab_size": 512, "tokenizer_path": tokenizer_path, "prepare_workers": 1}
        keys |= {"out": tmp_path / "out", "held_out_one_in": 4, "decontaminate": "", "near_duplicate_threshold": 0}
        config = pyconfig.initialize([BASE, *(f"{key}={value}" for key, value in (keys | settings).items())], {})
        lines: list[str] = []
        return preparing.prepare(config, lines.append), lines

    return run


def content_of(folder: Path) -> dict[str, str]:
    """The hash of every file below a folder."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def documents_in(tokenizer_path):
    """documents_in(folder of token blocks) -> the texts in it."""
    import numpy as np

    from MaxText.input_pipeline.token_blocks import TokenBlockReader

    def read(folder) -> list[str]:
        reader, loaded = TokenBlockReader(folder, 512), tokenizer.load(tokenizer_path)
        found = []
        for number, shard in enumerate(reader.manifest.shards):
            ids = np.frombuffer(reader.read(number, 0, shard.tokens), reader.dtype)
            ends = np.flatnonzero(ids == reader.manifest.eos_id)
            found += [loaded.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]]
        return found

    return read
