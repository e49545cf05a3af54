"""Trains a tokenizer on a source, and says how good it is beside others.

In: a config with source, out, vocab_size, tokenizer_rules. Out: a tokenizer in `out` and a table of bytes per
token, exactness and speed, on texts it was trained on and on texts it was not. The texts are drawn by hash, so the
same source gives the same tokenizer, bit for bit.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

from MaxText.input_pipeline import filters, inputs, readers, tokenizer

HELD_OUT_ONE_IN = 20
MEASURED_BYTES = 5 * 10**6  # text of each part that tokenizers are measured on
Log = Callable[[str], None]


def train(config: FrozenConfigDict, log: Log) -> int:
    """Train, save, measure; returns 0.

    Raises:
        ValueError: the source, the vocabulary or a setting will not do.
        OSError: `out` cannot be written.
    """
    if not config.source or not config.out:
        raise ValueError(
            f"source={config.source} out={config.out}: both are needed, such as source=embedded out=my_bpe"
        )
    others = {name: tokenizer.load(name) for name in filter(None, map(str.strip, config.compare_with.split(",")))}
    out = Path(config.out).expanduser()
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"out={out} is not empty; give another directory")
    trained_on, heldout = _draw(config, log)
    started, size = time.monotonic(), tokenizer.num_token_ids(config)
    if config.tokenizer_rules == "sentencepiece":
        path = _train_sentencepiece(trained_on, size, out)
    else:
        tokenizer.train(trained_on, size, out, config.tokenizer_rules)
        path = out
    seconds = time.monotonic() - started
    trained = tokenizer.load(str(path))
    log(f"tokenizer: {trained.vocab_size:,} entries in {seconds:.1f} s, sha256 {trained.fingerprint}: {path}")
    rows = []
    for name, loaded in {str(path): trained, **others}.items():
        row: dict[str, Any] = {"tokenizer": name, "vocab_size": loaded.vocab_size}
        for part, texts in (("train", trained_on), ("heldout", heldout)):
            row |= {f"{part}_{key}": value for key, value in measure(loaded, texts).items()}
        rows.append(row)
    for line in _table(rows):
        log(line)
    report = {
        "seconds": round(seconds, 2),
        "rules": config.tokenizer_rules,
        "sha256": trained.fingerprint,
        "rows": rows,
    }
    (out / "report.json").write_text(json.dumps(report, indent=1))
    log(f"To use it: tokenizer_path={path}")
    return 0


def measure(loaded: tokenizer.Tokenizer, texts: Sequence[str]) -> dict[str, float]:
    """Bytes per token, the share of texts that come back exactly, and megabytes encoded a second."""
    chosen, size = [], 0
    for text in texts:
        chosen.append(text)
        size += len(text.encode())
        if size > MEASURED_BYTES:
            break
    started = time.perf_counter()
    encoded = loaded.encode(chosen)
    seconds = time.perf_counter() - started
    exact = sum(loaded.decode(ids) == text for ids, text in zip(encoded, chosen, strict=True))
    return {
        "bytes_per_token": round(size / max(sum(map(len, encoded)), 1), 3),
        "exact": round(exact / max(len(chosen), 1), 5),
        "megabytes_per_second": round(size / 1e6 / max(seconds, 1e-9), 2),
    }


def _draw(config: FrozenConfigDict, log: Log) -> tuple[list[str], list[str]]:
    """Texts to train on, at most `embedded_corpus_bytes` of them, and held-out ones; those with the least hashes."""
    texts: dict[bytes, str] = {}
    limit, size = config.embedded_corpus_bytes, 0
    for unit in inputs.find_units(config.source, inputs.UNIT_BYTES, log):
        for text in _texts(unit, config.text_column):
            digest = hashlib.sha256(text.encode()).digest()
            size += len(text) if digest not in texts else 0
            texts[digest] = text
            if size > 2 * limit:
                texts, size = _least(texts, limit)
    texts, size = _least(texts, limit)
    parts: tuple[list[str], list[str]] = [], []
    for digest in sorted(texts):
        parts[digest[-1] % HELD_OUT_ONE_IN == 0].append(texts[digest])
    if not all(parts):
        raise ValueError(f"source={config.source}: {len(texts)} texts are too few to train on and to hold some out")
    log(f"tokenizer: training on {sum(map(len, parts[0])) / 1e6:.1f} MB of {len(parts[0]):,} texts")
    return parts


def _texts(unit: inputs.Unit, text_column: str) -> Iterator[str]:
    for record in readers.read(unit, text_column, eos_id=-1):
        if isinstance(record, readers.Record) and record.text is not None and filters.drop_reason(record.text) is None:
            yield record.text


def _least(texts: dict[bytes, str], limit: int) -> tuple[dict[bytes, str], int]:
    kept, size = {}, 0
    for digest in sorted(texts):
        if size + len(texts[digest]) > limit:
            break
        kept[digest] = texts[digest]
        size += len(texts[digest])
    return kept, size


def _train_sentencepiece(texts: Sequence[str], vocab_size: int, out: Path) -> Path:
    """A BPE model that keeps every character it can; texts are fed whole, or a newline would never be in a token."""
    import sentencepiece

    out.mkdir(parents=True, exist_ok=True)
    path = out / "tokenizer.model"
    end, pad, *others = tokenizer.SPECIAL_TOKENS
    try:
        with path.open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=file, model_type="bpe", vocab_size=vocab_size,
                normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True, byte_fallback=True, split_digits=True,
                max_sentence_length=4 * filters.MAX_CHARACTERS, num_threads=1, minloglevel=2,
                eos_id=0, eos_piece=end, pad_id=1, pad_piece=pad, unk_id=2, bos_id=-1, control_symbols=others,
            )  # fmt: skip
    except RuntimeError as error:
        path.unlink()
        raise ValueError(f"vocab_size={vocab_size}: SentencePiece says: {error}") from error
    return path


def _table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"{'entries':>9} | {'trained on':^28} | {'held out':^28} |"
    yield f"{'':>9} | " + " | ".join([f"{'bytes/token':>11} {'exact':>8} {'MB/s':>7}"] * 2) + " | tokenizer"
    for row in rows:
        columns = [
            f"{row[f'{part}_bytes_per_token']:>11.3f} {row[f'{part}_exact']:>8.3%} "
            f"{row[f'{part}_megabytes_per_second']:>7.2f}"
            for part in ("train", "heldout")
        ]
        yield f"{row['vocab_size']:>9,} | " + " | ".join(columns) + f" | {row['tokenizer']}"
