"""The records of a unit, one after the other: text or token ids, and what is known of where they come from.

In: a unit. Out: Records, and a Bad for everything that is none, with its place; a broken file ends with a Bad after the
records before the break, and never ends the work. Errors of a disk or a network are raised: trying again helps.
Which column is the text is known for the usual data sets.
"""

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from MaxText.input_pipeline import hub, sources
from MaxText.input_pipeline.inputs import Piece, Unit, file_system, is_broken_data

# The-stack, codeparrot-clean, starcoderdata, the-stack-v2 and what people call their own columns.
TEXT_COLUMNS = ("content", "text", "code", "input_ids", "tokens")
REPOSITORY_COLUMNS = ("max_stars_repo_name", "repo_name", "repository_name", "repository", "repo")
PATH_COLUMNS = ("max_stars_repo_path", "file_path", "path", "filename")
LICENSE_COLUMNS = ("max_stars_repo_licenses", "licenses", "license", "detected_licenses")
MAX_LINE_BYTES = 2**28
BATCH_ROWS = 256
READ_BYTES = 2**17
PACKED_EVIDENCE_ROWS = 16  # if so many rows of token ids are of one length, they are pieces of a stream
BROKEN = (EOFError, zlib.error, gzip.BadGzipFile)  # of the data; errors of a disk or network fail the unit instead


@dataclass(frozen=True)
class Record:
    """One document: either `text` or `ids`; unknown things are empty."""

    location: str
    text: str | None = None
    ids: np.ndarray | None = None
    repository: str = ""
    path: str = ""
    licenses: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Bad:
    """Something that is not a document, and why."""

    location: str
    reason: str
    detail: str = ""


def read(unit: Unit, text_column: str, eos_id: int) -> Iterator[Record | Bad]:
    """The records of the unit, in the order of the source.

    Args:
        text_column: empty takes the first of TEXT_COLUMNS there is.
        eos_id: where rows of token ids are cut into documents.
    """
    for piece in unit.pieces:
        if unit.kind in ("dir", "embedded"):
            yield from _read_file(piece, unit)
        elif unit.kind.startswith("jsonl"):
            yield from _records(_jsonl_rows(piece), text_column, eos_id)
        elif unit.kind == "parquet":
            yield from _records(_parquet_rows(piece, text_column), text_column, eos_id)
        elif unit.kind == "hf":
            yield from _records(hub_rows(piece), text_column, eos_id)
        else:
            yield from _records(_tfds_rows(piece), text_column, eos_id)


def _read_file(piece: Piece, unit: Unit) -> Iterator[Record | Bad]:
    system, path = file_system(piece.path)
    try:
        text = system.cat_file(path).decode()
    except UnicodeDecodeError:
        yield Bad(piece.path, "not_utf8")
        return
    except PermissionError as error:
        yield Bad(piece.path, "unreadable", str(error))
        return
    roots = [file_system(unit.place)[1]] if unit.place else list(map(str, sources.python_roots()))
    inside = [PurePosixPath(path).relative_to(root) for root in roots if path.startswith(root.rstrip("/") + "/")]
    relative = min(inside, key=lambda p: len(p.parts), default=PurePosixPath(path))
    repository = relative.parts[0] if len(relative.parts) > 1 else ""
    name = PurePosixPath(*relative.parts[1:]) if repository else relative
    record = Record(piece.path, text=text, repository=repository, path=str(name))
    yield record if _is_utf8(repository, record.path) else Bad(piece.path, "not_utf8", "the name of the file")


Row = tuple[str, Mapping[str, Any]]


def _jsonl_rows(piece: Piece) -> Iterator[Row | Bad]:
    """The lines that begin in the piece: after the first line end from `start - 1` on, before `stop`."""
    system, path = file_system(piece.path)
    position, number = piece.start, 0
    place = piece.path
    try:
        with system.open(path, "rb") as raw:
            lines: Any = raw
            if path.endswith(".gz"):
                lines = gzip.GzipFile(fileobj=raw)
            elif path.endswith(".zst"):
                lines = io.BufferedReader(_ZstdFrames(raw), READ_BYTES)
            elif piece.start:
                raw.seek(piece.start - 1)
                position += len(raw.readline()) - 1
            while piece.stop == -1 or position < piece.stop or path.endswith((".gz", ".zst")):
                line = lines.readline(MAX_LINE_BYTES)
                if not line:
                    break
                place = f"{piece.path}:byte {position}"
                position += len(line)
                number += 1
                if not line.strip():
                    continue
                yield _parse_line(line, place)
    except Exception as error:  # zstandard's error is no other's child, and cannot be named without importing it
        if not isinstance(error, BROKEN) and type(error).__name__ != "ZstdError":
            raise
        yield Bad(piece.path, "truncated_file", f"broken after line {number} ({error})")


class _ZstdFrames(io.RawIOBase):
    """The content of a zstd file; unlike the library's own reader it complains when the file was cut off."""

    def __init__(self, raw: Any):
        import zstandard

        self._raw, self._decompressor = raw, zstandard.ZstdDecompressor()
        self._frame, self._rest, self._ready = self._decompressor.decompressobj(), b"", b""
        self._is_begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._rest or self._raw.read(READ_BYTES)
            if not data and self._is_begun:
                raise EOFError("the file ends inside a zstd frame")
            if not data:
                return 0
            self._ready, self._is_begun = self._frame.decompress(data), True
            self._rest = b""
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame, self._is_begun = self._decompressor.decompressobj(), False
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def _parse_line(line: bytes, place: str) -> Row | Bad:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return Bad(place, "not_utf8")
    except (ValueError, RecursionError) as error:
        return Bad(place, "bad_json", str(error)[:200])
    return (place, row) if isinstance(row, dict) else Bad(place, "bad_json", "not an object")


def _parquet_rows(piece: Piece, text_column: str) -> Iterator[Row | Bad]:
    import pyarrow
    import pyarrow.parquet

    system, path = file_system(piece.path)
    wanted = {text_column or name for name in TEXT_COLUMNS}
    wanted |= {*REPOSITORY_COLUMNS, *PATH_COLUMNS, *LICENSE_COLUMNS}
    group = piece.start
    try:
        with system.open(path, "rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
            columns = [name for name in file.schema_arrow.names if name in wanted]
            stop = file.num_row_groups if piece.stop == -1 else piece.stop
            for group in range(piece.start, stop):
                row = 0
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                    for values in _batch_rows(batch):
                        yield f"{piece.path}:row group {group}, row {row}", values
                        row += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if not is_broken_data(error):
            raise
        yield Bad(piece.path, "broken_parquet", f"row group {group}: {str(error).splitlines()[0][:200]}")


def _batch_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """Rows of an Arrow batch; numbers in lists stay arrays, which is many times faster than Python's integers."""
    import pyarrow.types

    lists = {}
    for name in batch.schema.names:
        kind = batch.schema.field(name).type
        if (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)) and pyarrow.types.is_integer(
            kind.value_type
        ):
            lists[name] = batch.column(name)
    plain = batch.drop_columns(list(lists)).to_pylist() if len(lists) < batch.num_columns else [{}] * batch.num_rows
    for index, row in enumerate(plain):
        arrays = {name: column[index].values for name, column in lists.items()}
        yield {**row, **{name: None if a is None else a.to_numpy(zero_copy_only=False) for name, a in arrays.items()}}


def hub_rows(piece: Piece) -> Iterator[Row | Bad]:
    """The rows of one shard of a hub data set."""
    rows = hub.open_stream(piece.path).rows
    place = f"{piece.path}:shard {piece.start}"
    index = 0
    try:
        for index, row in enumerate(rows.shard(rows.num_shards, piece.start)):
            yield f"{place}, row {index}", row
    except (ValueError, EOFError, hub.broken_data()) as error:
        yield Bad(place, "broken_stream", f"after row {index}: {str(error)[:200]}")


def _tfds_rows(piece: Piece) -> Iterator[Row | Bad]:
    source = hub.open_tfds(piece.path)
    for index in range(piece.start, piece.stop):
        place = f"{piece.path}:example {index}"
        try:
            example = source[index]
        except (RuntimeError, ValueError, OSError) as error:
            if not is_broken_data(error):
                raise
            yield Bad(place, "broken_record", str(error)[:200])
            continue
        yield place, {key: _decoded(value) for key, value in example.items()}


def _decoded(value: Any) -> Any:
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value


def _records(rows: Iterable[Row | Bad], text_column: str, eos_id: int) -> Iterator[Record | Bad]:
    rows = iter(rows)
    head = list(itertools.islice(rows, PACKED_EVIDENCE_ROWS + 1))
    is_packed = _is_packed(head, text_column)
    packed: list[np.ndarray] = []  # the beginning of a document that goes on in the next row
    packed_place = ""
    for row in itertools.chain(head, rows):
        if isinstance(row, Bad):
            yield row
            continue
        place, values = row
        name = text_column or next((name for name in TEXT_COLUMNS if values.get(name) is not None), "")
        content = values.get(name)
        if isinstance(content, str):
            yield _text_record(place, content, values)
            continue
        ids = _token_ids(content)
        if ids is None:
            there = ", ".join(list(values)[:20])
            yield Bad(place, "no_text", f"no {text_column or ', '.join(TEXT_COLUMNS)} among the columns {there}")
            continue
        *whole, rest = np.split(ids, np.flatnonzero(ids == eos_id) + 1)
        for document in whole:
            yield Record(packed_place or place, ids=np.concatenate([*packed, document[:-1]]))
            packed, packed_place = [], ""
        if rest.size and is_packed:
            packed_place = packed_place or place
            packed.append(rest)
        elif rest.size:
            yield Record(place, ids=rest)
    if packed:
        yield Record(packed_place, ids=np.concatenate(packed))


def _is_packed(rows: Sequence[Row | Bad], text_column: str) -> bool:
    """Whether rows of token ids are a stream cut at one length, its end maybe shorter, and not a document each."""
    names = (text_column,) if text_column else TEXT_COLUMNS
    columns = [_token_ids(_first(row[1], names)) for row in rows if not isinstance(row, Bad)]
    sizes = [0 if ids is None else ids.size for ids in columns]
    if len(set(sizes[:-1])) != 1:
        return False
    is_last_alike = sizes[-1] == sizes[0] or (len(sizes) > 2 and sizes[-1] < sizes[0])
    return len(sizes) > PACKED_EVIDENCE_ROWS or is_last_alike


def _text_record(place: str, text: str, values: Mapping[str, Any]) -> Record | Bad:
    repository, path = (str(_first(values, names) or "") for names in (REPOSITORY_COLUMNS, PATH_COLUMNS))
    licenses = _first(values, LICENSE_COLUMNS)
    if not _is_utf8(text, repository, path):
        return Bad(place, "not_utf8", "the text" if not _is_utf8(text) else "the repository or the path")
    if isinstance(licenses, str):
        licenses = [licenses]
    if not isinstance(licenses, list | tuple | np.ndarray | None):
        return Bad(place, "no_licenses", f"{str(licenses)[:100]} where a licence or a list of them belongs")
    licenses = None if licenses is None else tuple(map(str, licenses))
    return Record(place, text=text, repository=repository, path=path, licenses=licenses)


def _is_utf8(*texts: str) -> bool:
    """Whether these can be written as UTF-8: no halves of characters, as JSON and names of files may hold."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _first(values: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)


def _token_ids(content: Any) -> np.ndarray | None:
    if isinstance(content, list | np.ndarray):
        try:
            ids = np.asarray(content)
        except ValueError:  # rows of different lengths
            return None
        if ids.ndim == 1 and ids.size and np.issubdtype(ids.dtype, np.integer):
            return ids.astype(np.int64)
    return None
