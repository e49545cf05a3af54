"""The embedded corpus: token blocks made from the Python files of this machine, kept between runs.

In: where to keep it, its size, the tokenizer. Out: the directories of its two parts. It is a snapshot: a pointer file
names it, and while that exists no file is searched for again, whatever is installed since; to take a new one delete
the pointer. It is built in a temporary directory and renamed when complete, so neither a kill nor a second process
can leave half of it.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from MaxText.input_pipeline import sources, token_block_writer, token_blocks, tokenizer

VERSION = 1  # of everything here that decides what ends up on the disk
ENCODE_BYTES = 2_000_000  # text encoded between two looks at the clock
REPORT_SECONDS = 5
ABANDONED_SECONDS = 24 * 3600
Log = Callable[[str], None]


@dataclass(frozen=True)
class EmbeddedCorpus:
    """Where a snapshot lies. `tokenizer_path` is for tokenizer.load; `note` says how to take another snapshot."""

    train: Path
    heldout: Path
    tokenizer_path: str
    note: str


def prepare(
    cache_directory: Path,
    corpus_bytes: int,
    vocab_size: int,
    tokenizer_path: str,
    log: Log,
    roots: Sequence[Path] | None = None,
) -> EmbeddedCorpus:
    """The snapshot for these settings; built first, with progress, when there is none.

    Args:
        corpus_bytes: use at most this much text.
        tokenizer_path: empty trains a tokenizer of `vocab_size` on the training part.
        roots: folders to search; None means the standard library and the installed packages of this interpreter.
    Raises:
        ValueError: too few files, or a tokenizer that does not fit `vocab_size`.
        OSError: the cache directory cannot be written.
    """
    roots = sources.python_roots() if roots is None else list(roots)
    key = _key(roots, corpus_bytes, vocab_size, tokenizer_path)
    pointer = _pointer(cache_directory, key)
    if (corpus := _follow(pointer)) is not None:
        return corpus
    given = _load_given(tokenizer_path, vocab_size)
    try:
        cache_directory.mkdir(parents=True, exist_ok=True)
        name = _build(cache_directory, roots, corpus_bytes, vocab_size, given, log)
        _write_pointer(pointer, {"directory": name, "taken": time.strftime("%Y-%m-%d %H:%M:%S")} | key)
    except OSError as error:
        raise OSError(
            f"cannot prepare the embedded corpus in data_cache_directory={cache_directory}: {error}"
        ) from error
    corpus = _follow(pointer)
    assert corpus is not None, pointer
    return corpus


def is_prepared(cache_directory: Path, corpus_bytes: int, vocab_size: int, tokenizer_path: str) -> bool:
    """Whether `prepare` would find a snapshot for these settings."""
    key = _key(sources.python_roots(), corpus_bytes, vocab_size, tokenizer_path)
    return _follow(_pointer(cache_directory, key)) is not None


def _key(roots: Sequence[Path], corpus_bytes: int, vocab_size: int, tokenizer_path: str) -> dict[str, object]:
    """Everything that a snapshot is chosen by."""
    return {
        "version": [VERSION, token_blocks.FORMAT_VERSION],
        "python": [sys.prefix, sys.version],
        "roots": [str(root) for root in roots],
        "corpus_bytes": corpus_bytes,
        "vocab_size": vocab_size,
        "tokenizer_path": tokenizer_path,
        "tokenizer_sha256": _tokenizer_sha256(tokenizer_path),
    }


def _pointer(cache_directory: Path, key: dict[str, object]) -> Path:
    return cache_directory / f"embedded-{_digest(key)}.json"


def _follow(pointer: Path) -> EmbeddedCorpus | None:
    """The snapshot a pointer names, or None when the pointer or the snapshot is not there or not whole."""
    try:
        content = json.loads(pointer.read_text())
        directory, taken = pointer.parent / content["directory"], content["taken"]
        tokenizer_path = content["tokenizer_path"] or str(directory / "tokenizer")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not _is_complete(directory):
        return None
    note = f"snapshot of {taken}, kept in {directory}; to take a new one, for new runs, delete {pointer}"
    return EmbeddedCorpus(directory / "train", directory / "heldout", tokenizer_path, note)


def _is_complete(directory: Path) -> bool:
    return all((directory / part / token_blocks.MANIFEST).is_file() for part in ("train", "heldout"))


def _build(
    cache_directory: Path,
    roots: Sequence[Path],
    corpus_bytes: int,
    vocab_size: int,
    given: tokenizer.Tokenizer | None,
    log: Log,
) -> str:
    """Build the snapshot unless it is there already; returns the name of its directory."""
    started = time.monotonic()
    log(
        f"embedded corpus: no snapshot for these settings in {cache_directory}, so one is made now (once); searching "
        f"{', '.join(map(str, roots))}"
    )
    corpus = sources.read_corpus(roots, corpus_bytes, log)
    settings = given.fingerprint if given else [vocab_size, tokenizer.CODE_PATTERN, tokenizer.SPECIAL_TOKENS]
    name = f"embedded-{_digest([VERSION, token_blocks.FORMAT_VERSION, corpus.content_hash, settings])}"
    final = cache_directory / name
    if _is_complete(final):
        log(f"embedded corpus: these very files are prepared already in {final}")
        return name
    _delete_abandoned(cache_directory)
    building = Path(tempfile.mkdtemp(prefix="building-", dir=cache_directory))
    try:
        encoder = given or _train_tokenizer(corpus.train, vocab_size, building / "tokenizer", log)
        for part, texts in (("heldout", corpus.heldout), ("train", corpus.train)):
            _write_part(building / part, texts, encoder, corpus, part, log)
        _move(building, final)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    log(f"embedded corpus: ready in {final} after {time.monotonic() - started:.0f} s")
    return name


def _tokenizer_sha256(tokenizer_path: str) -> str:
    """The hash of a local tokenizer's file, so that another tokenizer at the same path is noticed; empty for a name."""
    path = Path(tokenizer_path).expanduser()
    candidates = [path, path / "tokenizer.json"] if tokenizer_path else []
    return next((token_blocks.file_sha256(file) for file in candidates if file.is_file()), "")


def _load_given(tokenizer_path: str, vocab_size: int) -> tokenizer.Tokenizer | None:
    if not tokenizer_path:
        return None
    given = tokenizer.load(tokenizer_path)
    tokenizer.check_fits(given, tokenizer_path, vocab_size)
    return given


def _train_tokenizer(texts: list[str], vocab_size: int, directory: Path, log: Log) -> tokenizer.Tokenizer:
    megabytes = sum(map(len, texts)) / 1e6
    seconds = 2 + megabytes / 6
    log(f"tokenizer: training a byte-level BPE of {vocab_size:,} on {megabytes:.1f} MB, about {seconds:.0f} s")
    started = time.monotonic()
    tokenizer.train(texts, vocab_size, directory)
    trained = tokenizer.load(str(directory))
    trained.name = "byte-level BPE trained on this corpus"
    log(f"tokenizer: trained, {trained.vocab_size:,} entries ({time.monotonic() - started:.1f} s)")
    return trained


def _write_part(
    directory: Path, texts: list[str], encoder: tokenizer.Tokenizer, corpus: sources.Corpus, part: str, log: Log
) -> None:
    """Encode and write one part of the corpus, telling rate and time left every few seconds."""
    writer = token_block_writer.TokenBlockWriter(directory, encoder)
    total = sum(len(text.encode()) for text in texts)
    started = reported = time.monotonic()
    done = tokens = first = 0
    while first < len(texts):
        last, size = first, 0
        while last < len(texts) and size < ENCODE_BYTES:
            size += len(texts[last].encode())
            last += 1
        tokens += writer.add(encoder.encode(texts[first:last]), size)
        first, done = last, done + size
        now = time.monotonic()
        if now - reported > REPORT_SECONDS and first < len(texts):
            reported, rate = now, done / (now - started)
            log(
                f"encoding {part}: {done / 1e6:.1f} of {total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s, "
                f"{(total - done) / rate:.0f} s left"
            )
    writer.finish(corpus.description, corpus.split_rule, corpus.dropped)
    log(f"encoding {part}: {len(texts):,} files, {tokens:,} tokens ({time.monotonic() - started:.1f} s)")


def _move(building: Path, final: Path) -> None:
    """Give the finished directory its name, unless another process was faster: its content is the same."""
    building.chmod(0o755)  # mkdtemp makes it private
    if final.exists() and not _is_complete(final):
        shutil.rmtree(final)
    try:
        building.rename(final)
    except OSError:
        if not _is_complete(final):
            raise


def _delete_abandoned(cache_directory: Path) -> None:
    """Delete what killed builds left behind."""
    for leftover in cache_directory.glob("building-*"):
        if time.time() - leftover.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


def _write_pointer(pointer: Path, content: dict) -> None:
    temporary = pointer.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.rename(pointer)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
