"""What there is to read: a source's name turned into units of work, which depend on the source alone.

In: `kind:place`, or several as a fallback chain. Out: units, each a list of pieces of about UNIT_BYTES together, small
enough to be done again after a kill. Files are found and read through fsspec, so a place may be gs:// as well as a
path. A file that is broken becomes a piece too: it is counted and named where it is read.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from MaxText.input_pipeline import sources

UNIT_BYTES = 256 * 10**6
COMPRESSION = 4  # text shrinks about so much: a unit of compressed files is that much smaller
COMPRESSED = (".gz", ".zst", ".parquet")
TFDS_BYTES = 4_000  # assumed of an example, to cut a data set into units
KINDS = ("hf", "parquet", "jsonl", "jsonl.gz", "jsonl.zst", "dir", "tfds", "embedded")
EXAMPLES = "hf:codeparrot/codeparrot-clean, parquet:DIR, jsonl:FILES, dir:DIR, tfds:DIR or embedded"


@dataclass(frozen=True)
class Piece:
    """A part of a source that is read in order.

    Attributes:
        path: a file or data set; what a record's location begins with.
        start: byte (plain jsonl), row group (parquet), example (tfds) or shard (hf) to begin with.
        stop: the first one not to read; -1 reads to the end.
        size: bytes, or an estimate.
        version: what changes when the content does, such as a time of modification.
    """

    path: str
    start: int
    stop: int
    size: int
    version: str

    @property
    def text_size(self) -> int:
        """Bytes of text in it, roughly."""
        return self.size * (COMPRESSION if self.path.endswith(COMPRESSED) else 1)


@dataclass(frozen=True)
class Unit:
    """The work of one task: the number-th part of the source."""

    number: int
    kind: str
    place: str
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return sum(piece.text_size for piece in self.pieces)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Unit":
        pieces = tuple(Piece(**piece) for piece in content["pieces"])
        return cls(content["number"], content["kind"], content["place"], pieces)


def split_chain(source: str) -> list[tuple[str, str]]:
    """The (kind, place) of each source of a comma-separated fallback chain.

    Raises:
        ValueError: a kind is unknown, or a place is missing.
    """
    chain = []
    for word in source.split(","):
        kind, _, place = word.strip().partition(":")
        if kind not in KINDS or (not place and kind != "embedded"):
            raise ValueError(f"source={word.strip()}: must be one of {', '.join(KINDS)}, such as {EXAMPLES}")
        chain.append((kind, place))
    return chain


def find_units(source: str, unit_bytes: int, log: Callable[[str], None]) -> list[Unit]:
    """The units of the first source of the chain that there is; says which, and why not those before it.

    Raises:
        ValueError: there is none.
    """
    chain = split_chain(source)
    failures = []
    for kind, place in chain:
        try:
            pieces = list(_LISTINGS[kind](place, unit_bytes))
            if not pieces:
                raise FileNotFoundError("nothing to read there")
        except ImportError as error:
            raise ValueError(f"source={kind}:{place} needs a package: {error}; run bash setup.sh --data") from error
        except Exception as error:  # whatever a hub, a file system or a format finds to say
            failures.append(f"{kind}:{place}: {type(error).__name__}: {str(error).strip().splitlines()[0][:300]}")
            log(f"SOURCE NOT USED: {failures[-1]}")
            continue
        if kind == "hf":
            place = pieces[0].path  # with the commit that was chosen
        units = [Unit(i, kind, place, pieces) for i, pieces in enumerate(_group(pieces, unit_bytes))]
        size = sum(unit.size for unit in units)
        chosen = f"{kind}:{place}" if place else kind
        note = f" (number {len(failures) + 1} of the {len(chain)} given)" if len(chain) > 1 else ""
        amount = f"{len(pieces):,} pieces, about {size / 1e6:,.1f} MB of text, {len(units):,} units of work"
        log(f"SOURCE: {chosen}{note}: {amount}")
        return units
    raise ValueError("no source can be read:" + "".join(f"\n  - {failure}" for failure in failures))


def embedded_files() -> Iterator[Path]:
    """The Python files of this machine, in an order that is the same for the same files."""
    yield from sorted(sources.find_python_files(sources.python_roots()))


def file_system(place: str) -> tuple[Any, str]:
    """The fsspec file system of a place, and its path there."""
    import fsspec.core

    return fsspec.core.url_to_fs(os.path.expanduser(place))


def is_broken_data(error: Exception) -> bool:
    """Whether an error is of the data's form; those of a disk, a network or memory are not: trying again helps.

    Arrow and ArrayRecord, too, raise OSError where data is broken: that class itself, without a number.
    """
    if isinstance(error, OSError):
        return type(error) is OSError and error.errno is None
    return not isinstance(error, MemoryError)


def _group(pieces: Iterable[Piece], unit_bytes: int) -> Iterator[tuple[Piece, ...]]:
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.text_size > unit_bytes:
            yield tuple(group)
            group, size = [], 0
        group.append(piece)
        size += piece.text_size
    yield tuple(group)


def _find_files(place: str, endings: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """Every file that a path, a pattern or a folder stands for, sorted, with what its file system says of it."""
    system, path = file_system(place)
    if system.isdir(path):
        found = system.find(path, detail=True)
        found = {name: info for name, info in found.items() if name.endswith(endings)}
    elif any(letter in path for letter in "*?["):
        found = system.glob(path, detail=True)
    else:
        found = {path: system.info(path)}
    return [(system.unstrip_protocol(name), info) for name, info in sorted(found.items()) if info["type"] == "file"]


def _version(info: dict[str, Any]) -> str:
    return str(next((info[key] for key in ("etag", "md5Hash", "mtime", "created") if info.get(key)), ""))


def _list_jsonl(place: str, unit_bytes: int) -> Iterator[Piece]:
    for path, info in _find_files(place, (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")):
        step = info["size"] if path.endswith(COMPRESSED) else unit_bytes
        for start in range(0, max(info["size"], 1), max(step, 1)):
            stop = min(start + step, info["size"])
            whole = start == 0 and stop == info["size"]
            yield Piece(path, start, -1 if whole else stop, stop - start, _version(info))


def _list_parquet(place: str, unit_bytes: int) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    for path, info in _find_files(place, (".parquet",)):
        try:
            with file_system(path)[0].open(path) as file:
                footer = pyarrow.parquet.read_metadata(file)
                sizes = [footer.row_group(i).total_byte_size for i in range(footer.num_row_groups)]
        except (pyarrow.ArrowException, OSError, ValueError) as error:  # named again, and counted, when it is read
            if not is_broken_data(error):
                raise
            yield Piece(path, 0, -1, info["size"], _version(info))
            continue
        start = 0
        for group in range(1, len(sizes) + 1):
            size = sum(sizes[start:group])
            if group == len(sizes) or size + sizes[group] > unit_bytes:
                yield Piece(path, start, group, size // COMPRESSION, _version(info))
                start = group


def _list_dir(place: str, unit_bytes: int) -> Iterator[Piece]:
    if not file_system(place)[0].isdir(file_system(place)[1]):
        raise FileNotFoundError("there is no such folder")
    for path, info in _find_files(place, (".py",)):
        yield Piece(path, 0, -1, info["size"], _version(info))


def _list_embedded(place: str, unit_bytes: int) -> Iterator[Piece]:
    for path in embedded_files():
        info = path.stat()
        yield Piece(f"file://{path}", 0, -1, info.st_size, str(info.st_mtime))


def _list_hf(place: str, unit_bytes: int) -> Iterator[Piece]:
    from MaxText.input_pipeline import hub

    stream = hub.open_stream(place)
    for shard in range(stream.rows.num_shards):
        yield Piece(stream.place, shard, shard + 1, unit_bytes, stream.version)


def _list_tfds(place: str, unit_bytes: int) -> Iterator[Piece]:
    from MaxText.input_pipeline import hub

    examples = len(hub.open_tfds(place))
    step = max(unit_bytes // TFDS_BYTES, 1)
    for start in range(0, examples, step):
        stop = min(start + step, examples)
        yield Piece(place, start, stop, (stop - start) * TFDS_BYTES, "")


_LISTINGS: dict[str, Callable[[str, int], Iterator[Piece]]] = {
    "hf": _list_hf,
    "parquet": _list_parquet,
    "jsonl": _list_jsonl,
    "jsonl.gz": _list_jsonl,
    "jsonl.zst": _list_jsonl,
    "dir": _list_dir,
    "tfds": _list_tfds,
    "embedded": _list_embedded,
}
