"""Prepared data for a person to look at: documents, their tokens in colours, how long they are, what it is made of.

In: the directory of a manifest, or a mixture. Out: text on the screen and a picture of histograms. Documents
are drawn at random places, each as likely as it is long, with a seed that is said.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from MaxText.input_pipeline import tokenizer
from MaxText.input_pipeline.token_blocks import TokenBlockReader
from MaxText.input_pipeline.token_dataset import parse_mixture

USAGE = """\
usage: python MaxText/prepare_data.py inspect MANIFEST_DIRECTORY [documents=3] [seed=0] [tokenizer_path=...]
  MANIFEST_DIRECTORY may be a mixture, dir,weight;dir,weight; lengths.png is written to the working directory"""
DEFAULTS = {"documents": "3", "seed": "0", "tokenizer_path": "", "plot": "lengths.png"}
SHOWN_TOKENS = 400
COLOURS = (31, 32, 33, 34, 35, 36)
MAX_COUNTED_TOKENS = 50 * 10**6  # documents of so many tokens are measured for the histogram


def main(argv: Sequence[str]) -> int:
    """The exit code of `inspect`: 0 shown, 1 it cannot be, 2 a wrong command line."""
    settings = DEFAULTS | dict(word.split("=", 1) for word in argv[1:] if "=" in word)
    if not argv or argv[0] in ("-h", "--help") or settings.keys() != DEFAULTS.keys():
        print(USAGE)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    try:
        for line in inspect(argv[0], settings):
            print(line)
    except (ValueError, OSError) as error:
        print(f"error: {error}")
        return 1
    return 0


def inspect(files: str, settings: dict[str, str]) -> Iterator[str]:
    """Everything there is to see, line by line.

    Raises:
        ValueError, FileNotFoundError: the data or its tokenizer cannot be read.
    """
    parts = parse_mixture(files)
    readers = [TokenBlockReader(directory, 2**31) for directory, _ in parts]
    yield from _sources(readers, [float(share) for _, share in parts])
    path = settings["tokenizer_path"] or _beside(readers[0].directory)
    loaded = tokenizer.load(path or readers[0].manifest.tokenizer["name"])
    rng = random.Random(int(settings["seed"]))
    lengths = []
    for reader in readers:
        lengths.append(_document_lengths(reader))
        for _ in range(int(settings["documents"])):
            yield from _document(reader, loaded, rng)
    yield _plot([reader.manifest.source for reader in readers], lengths, settings["plot"])


def _beside(directory: Path) -> str:
    folder = directory.parent / "tokenizer"
    return str(folder / "tokenizer.model") if (folder / "tokenizer.model").is_file() else str(folder) * folder.is_dir()


def _sources(readers: Sequence[TokenBlockReader], shares: Sequence[float]) -> Iterator[str]:
    yield f"{'tokens':>16} {'documents':>12} {'tokens each':>12} {'bytes/token':>12} {'share':>8} {'epochs':>8}  source"
    # epochs when the part that is through first has been read once
    once = min(reader.manifest.tokens / share for reader, share in zip(readers, shares, strict=True))
    for reader, share in zip(readers, shares, strict=True):
        manifest = reader.manifest
        mean, size = manifest.tokens / manifest.documents, manifest.source_bytes / manifest.tokens
        yield (
            f"{manifest.tokens:>16,} {manifest.documents:>12,} {mean:>12,.0f} {size:>12.2f} {share:>8.2%} "
            f"{once * share / manifest.tokens:>8.2f}  {manifest.source} ({reader.directory})"
        )
        counts: dict[str, dict[str, Any]] = {"dropped": manifest.dropped} | {
            key: value for key, value in manifest.preparation.items() if key in ("tagged", "bad", "totals")
        }
        for name, values in counts.items():
            words = ", ".join(f"{key} {value:,}" for key, value in sorted(values.items()))
            yield f"{'':>16}   {name}: {words or 'none'}"


def _document(reader: TokenBlockReader, loaded: tokenizer.Tokenizer, rng: random.Random) -> Iterator[str]:
    """A document at a random token: its text, then its tokens, each in another colour than its neighbours."""
    shards = reader.manifest.shards
    shard = rng.choices(range(len(shards)), [s.tokens for s in shards])[0]
    place = rng.randrange(shards[shard].tokens)
    eos_id = reader.manifest.eos_id
    start = stop = place
    step = reader.manifest.block_tokens
    while start > 0:
        begin = max(start - step, 0)
        ends = np.flatnonzero(_ids(reader, shard, begin, start) == eos_id)
        start = begin + int(ends[-1]) + 1 if ends.size else begin
        if ends.size:
            break
    while True:
        end = min(stop + step, shards[shard].tokens)
        ends = np.flatnonzero(_ids(reader, shard, stop, end) == eos_id)
        if ends.size or end == shards[shard].tokens:
            stop = stop + int(ends[0]) if ends.size else end
            break
        stop = end
    ids = _ids(reader, shard, start, stop).tolist() if stop > start else []
    yield ""
    yield f"==== {shards[shard].name}, tokens {start:,} to {stop:,}: {len(ids):,} tokens"
    shown = ids[:SHOWN_TOKENS]
    coloured = [
        f"\x1b[{COLOURS[number % len(COLOURS)]}m{loaded.decode([token])}\x1b[0m" for number, token in enumerate(shown)
    ]
    yield "".join(coloured) + (f"\n... {len(ids) - len(shown):,} more tokens" if len(ids) > len(shown) else "")


def _ids(reader: TokenBlockReader, shard: int, start: int, stop: int) -> np.ndarray:
    return np.frombuffer(reader.read(shard, start, stop - start), reader.dtype)


def _document_lengths(reader: TokenBlockReader) -> np.ndarray:
    """Tokens of each document, of as many shards as MAX_COUNTED_TOKENS allows."""
    lengths, counted = [], 0
    for number, shard in enumerate(reader.manifest.shards):
        if counted and counted + shard.tokens > MAX_COUNTED_TOKENS:
            break
        ends = np.flatnonzero(_ids(reader, number, 0, shard.tokens) == reader.manifest.eos_id)
        lengths.append(np.diff(ends, prepend=-1) - 1)
        counted += shard.tokens
    return np.concatenate(lengths)


def _plot(names: Sequence[str], lengths: Sequence[np.ndarray], path: str) -> str:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no picture: matplotlib is not installed; run bash setup.sh --data"
    figure, axes = pyplot.subplots(figsize=(8, 4))
    bins = np.geomspace(1, max(int(sizes.max()) for sizes in lengths) + 2, 60).tolist()
    for name, sizes in zip(names, lengths, strict=True):
        label = f"{name[-60:]}: median {int(np.median(sizes)):,}, 90% below {int(np.quantile(sizes, 0.9)):,}"
        axes.hist(np.maximum(sizes, 1), bins=bins, histtype="step", label=label)
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="documents", title="Lengths of documents")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return f"histogram of {sum(map(len, lengths)):,} documents: {path}"
