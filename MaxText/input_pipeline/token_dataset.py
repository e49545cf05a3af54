"""Batches from token blocks: windows of one directory, or of several in exact shares, as a function of the step.

In: directories of prepared tokens with weights. Out: the rows of any batch. The weights are turned into whole numbers
with a sum P, the period; of every P samples each directory gives exactly its number, in an order drawn anew for each
period. So which window a sample is can be computed from its number alone, for mixtures as for one directory.
"""

import hashlib
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np

from MaxText.input_pipeline import packing
from MaxText.input_pipeline.fim import Fim
from MaxText.input_pipeline.permutation import mix, permute
from MaxText.input_pipeline.token_blocks import Manifest, TokenBlockReader

MAX_PERIOD = 10**6


def parse_mixture(files: str) -> list[tuple[str, Fraction]]:
    """The directories of `dir` or of `dir,weight;dir,weight;...`, with their shares, which sum to 1.

    Raises:
        ValueError: a weight is missing or is not a positive number.
    """
    if ";" not in files and "," not in files:
        return [(files, Fraction(1))]
    parts = []
    for word in filter(None, map(str.strip, files.split(";"))):
        directory, _, weight = word.rpartition(",")
        try:
            share = Fraction(weight.strip())
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if share <= 0 or not directory.strip():
            raise ValueError(
                f"{word}: a mixture is written dir,weight;dir,weight with weights above 0, such as a,7;b,3"
            )
        parts.append((directory.strip(), share))
    total = sum(share for _, share in parts)
    return [(directory, share / total) for directory, share in parts]


class TokenDataset:
    """Windows of `sequence_length` + 1 tokens over one directory of token blocks or more.

    Neighbouring windows share one token, the last target of one being the first input of the next, so that every token
    of a shard but its first is a target once per epoch; the first of a document is one without weight.
    A shard's last window is padded, never dropped.

    Attributes:
        manifest: of the first directory; manifests: of all.
        vocab_size: the model's.
        num_windows: samples in one epoch; of a mixture, until one directory is through for the first time.
    """

    def __init__(
        self,
        files: str | Path,
        vocab_size: int,
        sequence_length: int,
        shuffle_seed: int | None,
        repeat: bool,
        fim: Fim | None = None,
        document_masking: bool = True,
    ):
        """Args:
        files: see `parse_mixture`.
        shuffle_seed: None leaves the windows in the order of the files; else each epoch has an order of its own.
        repeat: after the last window begin again (training), or give padding only (evaluation).
        """
        parts = parse_mixture(str(files))
        shares = [share for _, share in parts]
        self._period = math.lcm(*(share.denominator for share in shares))
        if self._period > MAX_PERIOD:
            raise ValueError(f"{files}: the weights have too many digits; use whole numbers below 1000")
        self._counts = [int(share * self._period) for share in shares]
        self._windows = [_Windows(directory, vocab_size, sequence_length) for directory, _ in parts]
        self.manifests = tuple(windows.manifest for windows in self._windows)
        self.manifest = self.manifests[0]
        for directory, manifest in zip((directory for directory, _ in parts), self.manifests, strict=True):
            check_same_tokenizer(f"{parts[0][0]} and {directory}", self.manifest, manifest)
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.eos_id = self.manifest.eos_id
        self._shuffle_seed, self._repeat = shuffle_seed, repeat
        self._fim, self._document_masking = fim, document_masking
        sizes = [windows.num_windows for windows in self._windows]
        self.num_windows = min(size * self._period // n for size, n in zip(sizes, self._counts, strict=True))

    @property
    def identity(self) -> str:
        """A hash of all that decides the windows, apart from the seed and the length."""
        hashes = [manifest.sha256 for manifest in self.manifests]
        if self._fim is None and self._document_masking and len(hashes) == 1:
            return hashes[0]
        fim = None if self._fim is None else self._fim.identity
        content = [hashes, self._counts, fim, self._document_masking]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def num_batches(self, global_batch_size: int) -> int:
        """Batches in one pass over the data, the last one perhaps not full."""
        return -(-self.num_windows // global_batch_size)

    def batch(self, step: int, global_batch_size: int, rows: slice | np.ndarray) -> dict[str, np.ndarray]:
        """The rows `rows` of the global batch of step `step`: int32 [rows, sequence_length] under packing.KEYS."""
        samples = step * global_batch_size + np.arange(global_batch_size)[rows]
        if len(self._windows) == 1:
            windows, lengths, origins, starts = self._read(0, samples)
        else:
            parts, indices = self._assign(samples)
            windows, lengths = np.empty((samples.size, self.sequence_length + 1), np.int32), np.empty_like(samples)
            origins, starts = np.empty(samples.size, np.uint64), np.empty_like(samples)
            for part in range(len(self._windows)):
                mine = np.flatnonzero(parts == part)
                if mine.size:
                    windows[mine], lengths[mine], origins[mine], starts[mine] = self._read(part, indices[mine])
        if self._fim is not None:
            windows, lengths = self._fim(windows, lengths, origins, starts)
        return packing.pack(windows, lengths, self.eos_id, self._document_masking)

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes per token id; 0 for special tokens and for ids the tokenizer has not."""
        sizes = self._windows[0].token_bytes()
        padded = np.zeros(self.vocab_size, np.int32)
        padded[: sizes.size] = sizes[: self.vocab_size]
        return padded

    def _read(self, part: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(windows, lengths, origins, starts) of these samples of one directory; see Fim for the last two."""
        source = self._windows[part]
        epochs, positions = np.zeros_like(indices), indices
        if self._repeat:
            epochs, positions = np.divmod(indices, source.num_windows)
            if self._shuffle_seed is not None:
                positions = permute(positions, source.num_windows, self._shuffle_seed, epochs)
        windows, lengths, shards, starts = source.read(positions)
        origins = starts.astype(np.uint64)
        if self._fim is not None:  # only it asks
            origins = mix(mix(mix(epochs.astype(np.uint64)) ^ np.uint64(part)) ^ shards.astype(np.uint64))
        return windows, lengths, origins, starts

    def _assign(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The directory of each sample, and which of that directory's samples it is."""
        periods, places = np.divmod(samples, self._period)
        places = permute(places, self._period, self._shuffle_seed or 0, periods)
        ends = np.cumsum(self._counts)
        parts = np.searchsorted(ends, places, side="right")
        counts = np.array(self._counts)[parts]
        return parts, periods * counts + places - (ends[parts] - counts)


class _Windows:
    """The windows of one directory, by number."""

    def __init__(self, directory: str | Path, vocab_size: int, sequence_length: int):
        self._reader = TokenBlockReader(directory, vocab_size)
        self.manifest = self._reader.manifest
        self.token_bytes = self._reader.token_bytes
        self._length = sequence_length
        self._padding = np.array(self.manifest.eos_id, self._reader.dtype).tobytes()
        self._shard_tokens = np.array([shard.tokens for shard in self.manifest.shards])
        windows = -(-(self._shard_tokens - 1) // sequence_length)
        self._ends = np.cumsum(windows)
        self._starts = self._ends - windows
        self.num_windows = int(self._ends[-1])

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(windows [B, L + 1], true lengths, shards, starts within them); a position past the end is empty."""
        width = self._length + 1
        inside = positions < self.num_windows
        shards = np.searchsorted(self._ends[:-1], positions, side="right")
        starts = (positions - self._starts[shards]) * self._length
        lengths = np.where(inside, np.minimum(width, self._shard_tokens[shards] - starts), 0)
        pieces = self._reader.read_many(shards[inside], starts[inside], lengths[inside])
        if (short := np.flatnonzero(lengths < width)).size:  # any valid id serves as padding: its segment is 0
            found = iter(pieces)
            pieces = [next(found) if is_inside else b"" for is_inside in inside]
            for row in short.tolist():
                pieces[row] += self._padding * (width - int(lengths[row]))
        windows = np.frombuffer(b"".join(pieces), self._reader.dtype).reshape(positions.size, width)
        return windows.astype(np.int32), lengths, shards, starts


def check_same_tokenizer(what: str, one: Manifest, other: Manifest) -> None:
    """Refuse data of two tokenizers.

    Raises:
        ValueError: they differ.
    """
    ours, theirs = one.tokenizer, other.tokenizer
    if ours["sha256"] != theirs["sha256"]:
        raise ValueError(
            f"{what} were made with different tokenizers: {ours['name']} ({ours['sha256'][:16]}) and {theirs['name']} "
            f"({theirs['sha256'][:16]}); prepare both with one"
        )
