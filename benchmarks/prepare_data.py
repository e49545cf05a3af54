"""How many megabytes of source a second one core prepares: each stage on its own, then prepare_data.py whole.

In: Python files of this machine. Out: one JSON line per result. A stage is timed in rounds, and the best counts. A
second is one of processor time, of all threads, so that other work on the machine does not count; wall time stands
beside it. Run it on one core: `taskset -c 0 python benchmarks/prepare_data.py`.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __spec__ is None:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

BARS = {"whole, with syntax check": 2.0, "whole, without": 3.5}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=20, help="of source text (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each stage (default %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=49152, help="of the tokenizer (default %(default)s)")
    return parser.parse_args()


def draw_texts(megabytes: float) -> list[str]:
    """Unique files that pass the length rule, drawn by hash."""
    from MaxText.input_pipeline import sources

    corpus = sources.read_corpus(sources.python_roots(), int(megabytes * 1e6), print)
    return corpus.train + corpus.heldout


def stages(texts: list[str], tokenizer_path: str, scratch: Path) -> dict[str, Callable[[], Any]]:
    """What is done to the texts, one thing each."""
    from array_record.python.array_record_module import ArrayRecordWriter

    from MaxText.input_pipeline import filters, token_block_writer, token_blocks, tokenizer
    from MaxText.preparation import credentials, decontamination, near_duplicates, preparing

    contents = [text.encode() for text in texts]
    words = [near_duplicates.words(content) for content in contents]
    benchmarks = decontamination.Benchmarks(preparing.read_benchmarks("humaneval"))
    loaded = tokenizer.load(tokenizer_path)
    encoded = loaded.encode(texts)

    def spool() -> None:
        writer = ArrayRecordWriter(str(scratch / "spool"), "group_size:1,zstd:1")
        for content in contents:
            writer.write(content)
        writer.close()
        reader = token_blocks.open_array_record(scratch / "spool")
        assert sum(len(reader.read(i, i + 1)[0]) for i in range(len(contents))) > 0

    def blocks() -> None:
        shutil.rmtree(scratch / "blocks", ignore_errors=True)
        writer = token_block_writer.TokenBlockWriter(scratch / "blocks", loaded)
        writer.add(encoded, 0)
        writer.finish("benchmark", "none", {})

    def encode() -> None:
        for first in range(0, len(texts), 100):
            loaded.encode(texts[first : first + 100])

    return {
        "sha256": lambda: [hashlib.sha256(content).digest() for content in contents],
        "lines and letters": lambda: [filters.line_reason(content) for content in contents],
        "generated, vendored": lambda: [filters.generated_reason(text, "a/b.py") for text in texts],
        "secrets": lambda: [credentials.find(text) for text in texts],
        "words": lambda: [near_duplicates.words(content) for content in contents],
        "near-duplicate signature": lambda: [near_duplicates.signature(hashes) for hashes, _ in words],
        "benchmarks": lambda: [benchmarks.hits(text, *found) for text, found in zip(contents, words, strict=True)],
        "syntax check": lambda: [filters.parses(text) for text in texts],
        "keep and read again": spool,
        "encode": encode,
        "token blocks": blocks,
    }


def whole(folder: Path, out: Path, tokenizer_path: str, vocab_size: int, syntax_check: str) -> None:
    """prepare_data.py on one process."""
    from MaxText import pyconfig
    from MaxText.preparation import preparing

    shutil.rmtree(out, ignore_errors=True)
    base = str(Path(pyconfig.__file__).parent.parent / "configs/base.yml")
    settings = {"run_name": "x", "source": f"dir:{folder}", "out": out, "tokenizer_path": tokenizer_path}
    settings |= {"vocab_size": vocab_size, "syntax_check": syntax_check, "prepare_workers": 1}
    config = pyconfig.initialize([base, *(f"{key}={value}" for key, value in settings.items())], {})
    assert preparing.prepare(config, lambda line: None) == 0


def main() -> None:
    """Time everything and print the results."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    arguments = parse_arguments()
    from MaxText.input_pipeline import tokenizer

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        texts = draw_texts(arguments.megabytes)
        tokenizer.train(texts, arguments.vocab_size, scratch / "tokenizer")
        path = str(scratch / "tokenizer")
        for number, text in enumerate(texts):
            (scratch / "source" / str(number // 500)).mkdir(parents=True, exist_ok=True)
            (scratch / "source" / str(number // 500) / f"{number}.py").write_text(text, newline="")
        size = sum(len(text.encode()) for text in texts)
        work = stages(texts, path, scratch)
        for label, check in zip(BARS, ("tag", "off"), strict=True):
            work[label] = lambda check=check: whole(
                scratch / "source", scratch / "out", path, arguments.vocab_size, check
            )
        for stage, run in work.items():
            seconds, wall = [], []
            for _ in range(arguments.rounds):
                started = time.process_time(), time.perf_counter()
                run()
                seconds.append(time.process_time() - started[0])
                wall.append(time.perf_counter() - started[1])
            rate = size / 1e6 / min(seconds)
            result = {"benchmark": "prepare_data", "stage": stage, "megabytes_per_core_second": round(rate, 2)}
            result |= {"megabytes_per_wall_second": round(size / 1e6 / min(wall), 2)}
            if stage in BARS:
                result |= {"bar": BARS[stage], "passed": rate >= BARS[stage]}
            print(json.dumps(result | {"megabytes": round(size / 1e6, 1), "files": len(texts)}), flush=True)


if __name__ == "__main__":
    main()
