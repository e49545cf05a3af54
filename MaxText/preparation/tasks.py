"""The two tasks of a unit: `scan` reads and judges its records, `encode` writes the chosen ones as token blocks.

In: the folder of the work and the number of a unit. Out: files whose bytes depend on these alone, and last of all a
JSON file that says the task is done: it can be killed at any time, run twice, and run anywhere the folder is seen.
Between the two stands `choosing`, which needs what all scans found.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from MaxText.input_pipeline import filters, readers, token_block_writer, token_blocks, tokenizer
from MaxText.input_pipeline.inputs import Unit
from MaxText.preparation import credentials, decontamination, near_duplicates

VERSION = 3  # of everything here that decides what ends up on the disk
NAMED_BAD_RECORDS = 1000  # of one unit; all are counted
ENCODE_BYTES = 2**20  # text encoded by one call
REPORT_BYTES = 2**20
PARTS = ("train", "heldout")
INDEX = ("hash_high", "hash_low", "group", "size")  # columns of the index, one row for each record that was kept
Report = Callable[[int], None]


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the result, besides the source; the keys of base.yml have the same names."""

    text_column: str
    line_rules: bool
    drop_generated: bool
    syntax_check: str
    licenses: tuple[str, ...]
    secrets: str
    near_duplicate_threshold: float
    held_out_one_in: int
    repositories: bool
    eos_id: int  # of rows that are token ids already; -1 where there is no tokenizer yet
    vocab_size: int  # their ids are below it; -1 likewise


@dataclass(frozen=True)
class Workplace:
    """The files of one preparation; `out` receives the shards."""

    folder: Path
    out: Path

    def done(self, task: str, number: int) -> Path:
        return self.folder / task / f"{number:05d}.json"

    def file(self, task: str, number: int, name: str) -> Path:
        return self.folder / task / f"{number:05d}.{name}"

    def read_json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def write_json(self, path: Path, content: Any) -> None:
        """Write a file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with temporary.open("w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)


@dataclass(frozen=True)
class _Shared:
    """What every task of a process needs, loaded once."""

    settings: Settings
    units: list[Unit]
    benchmarks: decontamination.Benchmarks


@functools.lru_cache(maxsize=2)
def _shared(folder: Path, _version: int) -> _Shared:
    content = json.loads((folder / "work.json").read_text())
    settings = content["settings"] | {"licenses": tuple(content["settings"]["licenses"])}
    units = [Unit.from_json(unit) for unit in content["units"]]
    return _Shared(Settings(**settings), units, decontamination.Benchmarks(content["benchmarks"]))


@functools.lru_cache(maxsize=2)
def _tokenizer(path: str, _version: int) -> tokenizer.Tokenizer:
    return tokenizer.load(path)


def _load(workplace: Workplace) -> _Shared:
    return _shared(workplace.folder, (workplace.folder / "work.json").stat().st_mtime_ns)


class _Kept:
    """Writes the records that a scan keeps: their contents, an index of numbers, and signatures."""

    def __init__(self, workplace: Workplace, number: int):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._paths = [workplace.file("scan", number, name) for name in ("texts", "index.npy", "signatures.npy")]
        self._paths[0].parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self._paths[0].with_name(f"{self._paths[0].name}.{os.getpid()}.tmp")
        self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1,zstd:1")
        self._index: list[tuple[int, ...]] = []
        self._signatures: list[np.ndarray] = []

    def add(self, header: list[str], content: bytes, index: tuple[int, ...], signature: np.ndarray | None) -> None:
        with token_blocks.disk_errors():
            self._writer.write(json.dumps(header).encode() + b"\n" + content)
        self._index.append(index)
        if signature is not None:
            self._signatures.append(signature)

    def close(self) -> None:
        with token_blocks.disk_errors():
            self._writer.close()
        self._temporary.rename(self._paths[0])
        np.save(self._paths[1], np.array(self._index, np.uint64).reshape(-1, len(INDEX)))
        np.save(self._paths[2], np.array(self._signatures, np.uint32).reshape(-1, near_duplicates.SIZE))


def scan(workplace: Workplace, number: int, report: Report) -> None:
    """Read the unit, judge every record, keep what is good."""
    shared = _load(workplace)
    settings, unit = shared.settings, shared.units[number]
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("dropped", "tagged", "bad", "totals")}
    bad: list[list[str]] = []
    hits: list[dict[str, str]] = []
    kept, seen, unreported = _Kept(workplace, number), set(), 0
    for record in readers.read(unit, settings.text_column, settings.eos_id):
        if fault := _bad(record, settings):
            counts["bad"][fault.reason] += 1
            if len(bad) < NAMED_BAD_RECORDS:
                bad.append([fault.location, fault.reason, fault.detail])
            continue
        assert isinstance(record, readers.Record)
        text, content, counted = record.text, _content(record), counts["totals"]
        counted["records"] += 1
        counted["bytes"] += len(content)
        unreported += len(content)
        if unreported >= REPORT_BYTES:
            report(unreported)
            unreported = 0
        if text is not None and (reason := _plain_reason(record, text, content, settings)):
            counts["dropped"][reason] += 1
            continue
        if text is not None and settings.secrets != "keep" and (secrets := credentials.find(text)):
            if settings.secrets == "drop":
                counts["dropped"]["secret"] += 1
                continue
            counts["tagged"]["secrets_redacted"] += len(secrets)
            text = credentials.redact(text, secrets)
            content = text.encode()
        digest = hashlib.sha256(content).digest()[:16]
        if digest in seen:
            counts["dropped"]["duplicate"] += 1
            continue
        seen.add(digest)
        signature, found = _compare(text, content, record, shared)
        if found:
            counts["dropped"]["contaminated"] += 1
            hits += [{"location": record.location, **dataclasses.asdict(hit)} for hit in found]
            continue
        if text is not None and settings.syntax_check != "off" and not filters.parses(text):
            if settings.syntax_check == "drop":
                counts["dropped"]["syntax_error"] += 1
                continue
            counts["tagged"]["syntax_error"] += 1
        high, low = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
        group = high
        if settings.repositories and record.repository:
            group = int.from_bytes(hashlib.sha256(record.repository.encode()).digest()[:8], "big")
        header = ["text" if text is not None else "ids", record.repository, record.path]
        kept.add(header, content, (high, low, group, len(content)), signature)
    report(unreported)
    kept.close()
    result = {name: dict(sorted(counter.items())) for name, counter in counts.items()}
    workplace.write_json(workplace.done("scan", number), result | {"bad_records": bad, "hits": hits})


def _bad(record: readers.Record | readers.Bad, settings: Settings) -> readers.Bad | None:
    """What is wrong with a record before any rule is asked."""
    if isinstance(record, readers.Bad):
        return record
    if record.ids is not None and not record.ids.size:
        return readers.Bad(record.location, "no_ids")
    if record.ids is not None and not 0 <= record.ids.min() <= record.ids.max() < settings.vocab_size:
        given = f"{record.ids.min()} to {record.ids.max()}, of a tokenizer of {settings.vocab_size}"
        return readers.Bad(record.location, "ids_out_of_range", given)
    return None


def _content(record: readers.Record) -> bytes:
    if record.text is not None:
        return record.text.encode()
    assert record.ids is not None
    return record.ids.astype("<u4").tobytes()


def _plain_reason(record: readers.Record, text: str, content: bytes, settings: Settings) -> str | None:
    """The rules that need nothing but the record, the cheapest first."""
    reason = filters.drop_reason(text)
    if reason is None and settings.licenses:
        reason = filters.license_reason(record.licenses, settings.licenses)
    if reason is None and settings.drop_generated:
        reason = filters.generated_reason(text, record.path)
    if reason is None and settings.line_rules:
        reason = filters.line_reason(content)
    return reason


def _compare(
    text: str | None, content: bytes, record: readers.Record, shared: _Shared
) -> tuple[np.ndarray | None, list[decontamination.Hit]]:
    """The signature for near duplicates, if asked for, and what the record shares with benchmarks."""
    wanted = shared.settings.near_duplicate_threshold > 0
    if text is None:
        assert record.ids is not None
        return near_duplicates.signature(near_duplicates.id_hashes(record.ids)) if wanted else None, []
    if not wanted and not shared.benchmarks:
        return None, []
    hashes, bounds = near_duplicates.words(content)
    signature = near_duplicates.signature(hashes) if wanted else None
    return signature, shared.benchmarks.hits(content, hashes, bounds)


def encode(workplace: Workplace, number: int, report: Report) -> None:
    """Encode the documents chosen for the number-th shard and write it, training and held-out part."""
    chosen = workplace.read_json("chosen.json")
    encoder = _tokenizer(
        str(workplace.out / chosen["tokenizer"]), (workplace.folder / "chosen.json").stat().st_mtime_ns
    )
    references = np.load(workplace.file("chosen", number, "npy"))  # [documents, (unit, record, group, is held out)]
    writers = {}
    for part in PARTS:
        path = workplace.out / part / f"tokens-{number:05d}.array_record"
        path.parent.mkdir(parents=True, exist_ok=True)
        writers[part] = token_block_writer.ShardWriter(
            path, encoder.eos_id, encoder.vocab_size, token_block_writer.BLOCK_TOKENS
        )
    source_bytes: Counter[str] = Counter()
    for part, document, size in _documents(workplace, references, encoder, report):
        writers[part].add(document)
        source_bytes[part] += size
    shards = {part: writer.close() for part, writer in writers.items()}
    result = {
        part: {
            "shard": dataclasses.asdict(shard),
            "max_token_id": writers[part].max_token_id,
            "source_bytes": source_bytes[part],
        }
        for part, shard in shards.items()
        if shard is not None
    }
    workplace.write_json(workplace.done("encode", number), result)


def _documents(
    workplace: Workplace, references: np.ndarray, encoder: tokenizer.Tokenizer, report: Report
) -> Iterator[tuple[str, np.ndarray, int]]:
    """(part, token ids, bytes of source) of each document; files of one repository are one document."""
    repositories = _load(workplace).settings.repositories
    joined: list[np.ndarray] = []
    joined_size, last = 0, None
    for (part, group), header, ids, size in _encoded(workplace, references, encoder, report):
        if not (repositories and header[1]):
            yield part, ids, size
            continue
        if last is not None and last != (part, group):
            yield last[0], np.concatenate(joined), joined_size
            joined, joined_size = [], 0
        if not joined:
            joined = [np.array([encoder.special_ids["repo_name"], *encoder.encode([header[1]])[0]])]
        last = (part, group)
        joined += [np.array([encoder.special_ids["file_sep"], *encoder.encode([header[2] + "\n"])[0]]), ids]
        joined_size += size
    if last is not None:
        yield last[0], np.concatenate(joined), joined_size


def _encoded(
    workplace: Workplace, references: np.ndarray, encoder: tokenizer.Tokenizer, report: Report
) -> Iterator[tuple[tuple[str, int], list[str], np.ndarray, int]]:
    """The chosen records in order, with their token ids; texts are encoded many at a time."""
    batch: list[tuple[tuple[str, int], list[str], bytes]] = []
    size = 0
    opened: dict[int, Any] = {}
    for position, (unit, record, group, is_heldout) in enumerate(references.tolist()):
        if unit not in opened:
            opened[unit] = token_blocks.open_array_record(workplace.file("scan", unit, "texts"))
        header, _, content = opened[unit].read(record, record + 1)[0].partition(b"\n")
        batch.append(((PARTS[is_heldout], group), json.loads(header), content))
        size += len(content)
        if size < ENCODE_BYTES and position + 1 < len(references):
            continue
        texts = [content.decode() for _, header, content in batch if header[0] == "text"]
        encodings = iter(encoder.encode(texts))
        for key, header, content in batch:
            ids = next(encodings) if header[0] == "text" else np.frombuffer(content, "<u4")
            yield key, header, np.asarray(ids, np.int64), len(content)
        report(size)
        batch, size = [], 0


TASKS: dict[str, Callable[[Workplace, int, Report], None]] = {"scan": scan, "encode": encode}
