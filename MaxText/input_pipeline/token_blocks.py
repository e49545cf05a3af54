"""The on-disk format of tokens: ArrayRecord shards of fixed-size blocks, and a manifest that vouches for them.

In: a directory that `token_block_writer` made. Out: its tokens, windows of any length. A block is K consecutive tokens
of the stream "document EOS document EOS ...", so the files do not depend on the training length. Records are read by
range, `read(i, i + 1)`: the index form `read([i])` costs time in proportion to the records in the file.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TOKEN_BYTES = "token_bytes.npy"
CHECKSUM_AT_OPEN_BYTES = 256 * 10**6  # shards that are together smaller than this are hashed at every open


@dataclass(frozen=True)
class Shard:
    """One ArrayRecord file."""

    name: str
    bytes: int
    records: int
    tokens: int
    documents: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a directory of token blocks holds, where it came from and how to check it."""

    format_version: int
    block_tokens: int
    dtype: str
    codec: str
    eos_id: int
    vocab_size: int
    max_token_id: int
    tokenizer: dict[str, str]
    token_bytes_sha256: str
    shards: tuple[Shard, ...]
    documents: int
    tokens: int
    source_bytes: int
    dropped: dict[str, int]
    split_rule: str
    source: str
    special_ids: dict[str, int]
    preparation: dict[str, Any]

    @property
    def sha256(self) -> str:
        """The hash of everything above: the identity of the data, for checkpoints and for comparing hosts."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write manifest.json whole or not at all."""
        content = dataclasses.asdict(self) | {"sha256": self.sha256}
        temporary = directory / f"{MANIFEST}.tmp"
        with temporary.open("w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(directory / MANIFEST)

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """The manifest of a directory.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, edited or of another format.
        """
        path = directory / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{directory} holds no prepared data: there is no {MANIFEST} in it")
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(f"its format is {content['format_version']}, this program reads {FORMAT_VERSION}")
            claimed = content.pop("sha256")
            content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
            manifest = cls(**content)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is refused: {error!r}; prepare the data again") from error
        if manifest.sha256 != claimed:
            raise ValueError(f"{path} is refused: it was edited after it was written; prepare the data again")
        return manifest


class TokenBlockReader:
    """Reads any stretch of tokens of a shard. Safe to use from several threads at once."""

    def __init__(self, directory: str | Path, vocab_size: int):
        """Open and check every shard: present, of the right size and record count; hashed too if all are small.

        Args:
            vocab_size: the model's, without what is padding of it; every token id has to be below it.
        Raises:
            FileNotFoundError: the manifest or a shard is missing.
            ValueError: something is damaged or edited, or a token id does not fit the model.
        """
        self.directory = Path(directory).expanduser()
        self.manifest = Manifest.load(self.directory)
        if self.manifest.max_token_id >= vocab_size:
            raise ValueError(
                f"{self.directory}: its largest token id, {self.manifest.max_token_id}, is not below "
                f"vocab_size - vocab_padding = {vocab_size}; it was made with the tokenizer "
                f"{self.manifest.tokenizer['name']} of {self.manifest.vocab_size} entries; set vocab_size so that "
                "they fit"
            )
        self.dtype = np.dtype(self.manifest.dtype)
        self._itemsize = self.dtype.itemsize
        self._block_tokens = self.manifest.block_tokens
        self._paths = [self.directory / shard.name for shard in self.manifest.shards]
        for path, shard in zip(self._paths, self.manifest.shards, strict=True):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; {MANIFEST} lists it; prepare the data again")
            if (size := path.stat().st_size) != shard.bytes:
                raise ValueError(f"{path} is refused: {size:,} bytes where {MANIFEST} says {shard.bytes:,}")
        if sum(shard.bytes for shard in self.manifest.shards) < CHECKSUM_AT_OPEN_BYTES:
            self.verify()
        self._readers = [open_array_record(path) for path in self._paths]
        for path, shard, reader in zip(self._paths, self.manifest.shards, self._readers, strict=True):
            if (records := reader.num_records()) != shard.records:
                raise ValueError(f"{path} is refused: {records:,} records where {MANIFEST} says {shard.records:,}")

    def verify(self) -> None:
        """Hash every shard and compare with the manifest.

        Raises:
            ValueError: a shard is not what was written.
        """
        for path, shard in zip(self._paths, self.manifest.shards, strict=True):
            if file_sha256(path) != shard.sha256:
                raise ValueError(f"{path} is refused: its content is not what was written (sha256); prepare it again")

    def read(self, shard: int, start: int, size: int) -> bytes:
        """`size` tokens of a shard from position `start` on, as the raw bytes of `dtype`: cheap to join for a batch.

        Raises:
            ValueError: a record is damaged.
        """
        return self.read_many(np.array([shard]), np.array([start]), np.array([size]))[0]

    def read_many(self, shards: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> list[bytes]:
        """As `read`, for each of several stretches; none may be empty."""
        firsts = starts // self._block_tokens
        lasts = (starts + sizes - 1) // self._block_tokens
        begins = (starts - firsts * self._block_tokens) * self._itemsize
        columns = (shards, firsts, lasts, begins, begins + sizes * self._itemsize)
        pieces = []
        for shard, first, last, begin, end in zip(*(column.tolist() for column in columns), strict=True):
            read = self._readers[shard].read
            try:  # one record a call: a longer range starts threads, which costs more than it saves
                data = read(first, first + 1)[0]
                for record in range(first + 1, last + 1):
                    data += read(record, record + 1)[0]
            except Exception as error:
                raise ValueError(f"{self._paths[shard]}: records {first} to {last} are damaged ({error})") from error
            pieces.append(data[begin:end])
        return pieces

    def token_bytes(self) -> np.ndarray:
        """int32 [tokenizer's vocabulary]: the UTF-8 bytes of each token.

        Raises:
            ValueError: the file is missing or edited.
        """
        path = self.directory / TOKEN_BYTES
        if not path.is_file() or file_sha256(path) != self.manifest.token_bytes_sha256:
            raise ValueError(f"{path} is missing or not what was written (sha256); prepare the data again")
        return np.load(path)


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turn ArrayRecord's RuntimeError into the OSError it is: its text names the file and the reason."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error


def open_array_record(path: Path) -> Any:
    """A reader of the file's records, to be used as `read(i, i + 1)`: see the module's first lines.

    Raises:
        OSError: it cannot be opened, of which ArrayRecord itself makes a file without records.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
    if not reader.num_records():
        try:
            path.open("rb").close()
        except OSError as error:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            raise OSError(f"{error}; if too many are open, raise the limit of {limit:,} by ulimit -n") from error
    return reader
