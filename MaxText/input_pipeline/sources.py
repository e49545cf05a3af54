"""Find the Python files of this machine and make of them a deduplicated corpus with a held-out part.

In: the folders to search and a limit in bytes. Out: texts for training and held-out texts, and what was dropped and
why. The order is that of the content hashes: it depends neither on paths nor on the order of a directory listing, and
it makes the limit in bytes a random sample.
"""

import hashlib
import os
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from MaxText.input_pipeline import filters

HELD_OUT_ONE_IN = 100  # share of the files held out, but more of a small corpus: see heldout_modulus
MIN_HELD_OUT_FILES = 32
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages"})  # of others: ours are roots themselves
PROJECT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Corpus:
    """Texts in the order of their hashes; `content_hash` names exactly this choice of texts and this split."""

    train: list[str]
    heldout: list[str]
    content_hash: str
    source_bytes: int
    dropped: dict[str, int]
    split_rule: str
    description: str


def python_roots() -> list[Path]:
    """The folders of the running interpreter's standard library and of its installed packages."""
    paths = (sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    return list(dict.fromkeys(Path(path).resolve() for path in paths if os.path.isdir(path)))


def find_python_files(roots: Sequence[Path]) -> Iterator[Path]:
    """Every .py file below the roots, each once, without the project's own."""
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            here = Path(folder)
            subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and here / name != PROJECT]
            yield from (here / name for name in names if name.endswith(".py"))


def heldout_modulus(num_files: int) -> int:
    """N of the rule "held out if hash mod N == 0": one file in 100, more when that would be fewer than 32 files."""
    return max(2, min(HELD_OUT_ONE_IN, num_files // MIN_HELD_OUT_FILES))


def read_corpus(roots: Sequence[Path], max_bytes: int, log: Callable[[str], None]) -> Corpus:
    """The unique texts below `roots` that pass the filters, at most `max_bytes` of them, split into two parts.

    Raises:
        ValueError: there are too few files to train on and to hold out.
    """
    started = time.monotonic()
    texts, dropped = _read_unique(roots)
    chosen = _cut(sorted(texts), texts, max_bytes)
    dropped["over_byte_limit"] = len(texts) - len(chosen)
    modulus = heldout_modulus(len(chosen))
    is_heldout = [int.from_bytes(digest[:8], "big") % modulus == 0 for digest in chosen]
    train = [texts[digest].decode() for digest, out in zip(chosen, is_heldout, strict=True) if not out]
    heldout = [texts[digest].decode() for digest, out in zip(chosen, is_heldout, strict=True) if out]
    if not train or not heldout:
        raise ValueError(
            f"embedded corpus: only {len(chosen)} usable Python files within embedded_corpus_bytes={max_bytes:,} below "
            f"{', '.join(map(str, roots))}, too few to train on and to hold some out; raise embedded_corpus_bytes, or "
            "prepare data of your own and use dataset_type=grain"
        )
    source_bytes = sum(len(texts[digest]) for digest in chosen)
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(dropped.items()))
    log(
        f"embedded corpus: kept {len(chosen):,} files, {source_bytes / 1e6:.1f} MB; dropped: {reasons} "
        f"({time.monotonic() - started:.1f} s)"
    )
    return Corpus(
        train=train,
        heldout=heldout,
        content_hash=hashlib.sha256(b"".join(chosen) + modulus.to_bytes(8, "big")).hexdigest(),
        source_bytes=source_bytes,
        dropped=dict(dropped),
        split_rule=f"held out if the first 8 bytes of sha256(text), big-endian, mod {modulus} == 0",
        description=f"the Python files of this machine ({len(chosen):,} files, {source_bytes / 1e6:.1f} MB from "
        f"{', '.join(map(str, roots))}; not a curated corpus)",
    )


def _read_unique(roots: Sequence[Path]) -> tuple[dict[bytes, bytes], Counter[str]]:
    """Contents that pass the filters by sha256, and how many files were dropped for which reason."""
    texts: dict[bytes, bytes] = {}
    dropped: Counter[str] = Counter()
    for path in find_python_files(roots):
        try:
            content = path.read_bytes()
            reason = filters.drop_reason(content.decode())
        except UnicodeDecodeError:
            reason = "not_utf8"
        except OSError:
            reason = "unreadable"
        if reason is None:
            digest = hashlib.sha256(content).digest()
            if digest in texts:
                reason = "duplicate"
            else:
                texts[digest] = content
        if reason is not None:
            dropped[reason] += 1
    return texts, dropped


def _cut(digests: list[bytes], texts: dict[bytes, bytes], max_bytes: int) -> list[bytes]:
    """The first digests whose texts are together at most `max_bytes` long."""
    total = 0
    for count, digest in enumerate(digests):
        total += len(texts[digest])
        if total > max_bytes:
            return digests[:count]
    return digests
