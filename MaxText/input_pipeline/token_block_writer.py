"""Writes documents as token blocks, and the manifest that vouches for them; the format is of `token_blocks`.

In: documents as token ids. Out: a directory, prepared once its manifest is there. Whatever is half written lies under a
temporary name.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from MaxText.input_pipeline.token_blocks import (
    FORMAT_VERSION,
    TOKEN_BYTES,
    Manifest,
    Shard,
    disk_errors,
    file_sha256,
    open_array_record,
)
from MaxText.input_pipeline.tokenizer import Tokenizer

BLOCK_TOKENS = 2048
SHARD_TOKENS = 2**27
CODECS = {"uint16": "uncompressed", "uint32": "zstd:3"}  # compressing half-width ids costs more time than it saves


class ShardWriter:
    """Writes documents as one shard, under a temporary name until it is whole."""

    def __init__(self, path: Path, eos_id: int, vocab_size: int, block_tokens: int):
        self.tokens = 0
        self.max_token_id = 0
        self._path = path
        self._temporary = path.with_suffix(f".{os.getpid()}.tmp")
        self._eos_id, self._vocab_size, self._block_tokens = eos_id, vocab_size, block_tokens
        self._dtype = id_dtype(vocab_size)
        self._writer: Any = None
        self._pending: list[np.ndarray] = []  # tokens that do not yet fill a block
        self._pending_tokens = self._documents = self._records = 0

    def add(self, document: Sequence[int] | np.ndarray) -> int:
        """Append a document and EOS; returns the number of tokens written.

        Raises:
            ValueError: an id is not the tokenizer's, or is EOS.
        """
        ids = np.append(np.asarray(document, np.int64), self._eos_id)
        if not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise ValueError(
                f"token ids {ids.min()}..{ids.max()} are outside the tokenizer's 0..{self._vocab_size - 1}"
            )
        if (ids[:-1] == self._eos_id).any():
            raise ValueError(f"a document contains the end-of-text id {self._eos_id}; encode special tokens as text")
        if self._writer is None:
            from array_record.python.array_record_module import ArrayRecordWriter

            self._writer = ArrayRecordWriter(str(self._temporary), f"group_size:1,{CODECS[self._dtype.name]}")
        self.max_token_id = max(self.max_token_id, int(ids.max()))
        self._pending.append(ids.astype(self._dtype))
        self._pending_tokens += ids.size
        self.tokens += ids.size
        self._documents += 1
        if self._pending_tokens >= self._block_tokens:
            self._write_blocks(whole_blocks_only=True)
        return ids.size

    def close(self) -> Shard | None:
        """The shard, on the disk under its name; None if no document came."""
        if self._writer is None:
            return None
        if self._pending_tokens:
            self._write_blocks(whole_blocks_only=False)
        with disk_errors():
            self._writer.close()
        with self._temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if (records := open_array_record(self._temporary).num_records()) != self._records:
            raise OSError(f"{self._temporary}: {records} of {self._records} records arrived on the disk; is it full?")
        self._temporary.rename(self._path)
        size, digest = self._path.stat().st_size, file_sha256(self._path)
        return Shard(self._path.name, size, self._records, self.tokens, self._documents, digest)

    def _write_blocks(self, whole_blocks_only: bool) -> None:
        tokens = np.concatenate(self._pending)
        end = tokens.size // self._block_tokens * self._block_tokens if whole_blocks_only else tokens.size
        with disk_errors():
            for start in range(0, end, self._block_tokens):
                self._writer.write(tokens[start : min(start + self._block_tokens, end)].tobytes())
                self._records += 1
        self._pending = [tokens[end:]]
        self._pending_tokens = tokens.size - end


class TokenBlockWriter:
    """Writes documents as token blocks; the directory counts as prepared only once `finish` has returned."""

    def __init__(
        self,
        directory: Path,
        tokenizer: Tokenizer,
        block_tokens: int = BLOCK_TOKENS,
        shard_tokens: int = SHARD_TOKENS,
    ):
        """Args:
        shard_tokens: a new shard is begun with the first document after this many tokens; none is ever split.
        """
        self._directory = directory
        self._tokenizer = tokenizer
        self._block_tokens = block_tokens
        self._shard_tokens = shard_tokens
        self._shards: list[Shard] = []
        self._max_token_id = self._source_bytes = 0
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = self._open_shard()

    def add(self, documents: Iterable[Sequence[int]], source_bytes: int) -> int:
        """Append the documents, each followed by EOS; returns the number of tokens written."""
        written = 0
        for document in documents:
            if self._writer.tokens >= self._shard_tokens:
                self._close_shard()
                self._writer = self._open_shard()
            written += self._writer.add(document)
        self._source_bytes += source_bytes
        return written

    def finish(self, source: str, split_rule: str, dropped: dict[str, int]) -> Manifest:
        """Close the last shard and write the manifest.

        Args:
            source: where the texts came from, in words.
            split_rule: how held-out documents were told from the others, in words.
            dropped: the number of documents left out, by reason.
        """
        self._close_shard()
        return write_manifest(
            self._directory,
            self._tokenizer,
            self._block_tokens,
            self._shards,
            max_token_id=self._max_token_id,
            source_bytes=self._source_bytes,
            dropped=dropped,
            split_rule=split_rule,
            source=source,
            preparation={},
        )

    def _open_shard(self) -> ShardWriter:
        path = self._directory / f"tokens-{len(self._shards):05d}.array_record"
        return ShardWriter(path, self._tokenizer.eos_id, self._tokenizer.vocab_size, self._block_tokens)

    def _close_shard(self) -> None:
        shard = self._writer.close()
        self._max_token_id = max(self._max_token_id, self._writer.max_token_id)
        self._shards += [] if shard is None else [shard]


def id_dtype(vocab_size: int) -> np.dtype:
    """The narrowest type of ids below `vocab_size` that shards are written in."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def write_manifest(
    directory: Path,
    tokenizer: Tokenizer,
    block_tokens: int,
    shards: Sequence[Shard],
    *,
    max_token_id: int,
    source_bytes: int,
    dropped: dict[str, int],
    split_rule: str,
    source: str,
    preparation: dict[str, Any],
) -> Manifest:
    """Vouch for the shards that lie in `directory`: from here on it counts as prepared data.

    Raises:
        ValueError: there is no shard.
    """
    if not shards:
        raise ValueError(f"{directory}: there is not one document to write")
    sizes_path = directory / TOKEN_BYTES
    np.save(sizes_path, tokenizer.token_bytes())
    dtype = id_dtype(tokenizer.vocab_size).name
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        block_tokens=block_tokens,
        dtype=dtype,
        codec=CODECS[dtype],
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        max_token_id=max_token_id,
        tokenizer={"name": tokenizer.name, "sha256": tokenizer.fingerprint},
        token_bytes_sha256=file_sha256(sizes_path),
        shards=tuple(shards),
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        source_bytes=source_bytes,
        dropped=dropped,
        split_rule=split_rule,
        source=source,
        special_ids=tokenizer.special_ids,
        preparation=preparation,
    )
    manifest.save(directory)
    return manifest
