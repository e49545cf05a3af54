"""The loader beside a memory map that does the same work: masks, fill in the middle, mixtures; and what must stay flat.

In: random documents of a small tokenizer, prepared in a temporary directory. Out: one JSON line per result: the share
of the memory map's tokens a second, and the highest that ArrayRecord's reads alone allow; microseconds a read by the
number of records in a file; milliseconds to the first batch at step one million; resident memory over an epoch. The two
take turns, and the best round of each counts. A second is one of processor time, so that other work does not count.
"""

import argparse
import copy
import inspect
import json
import random
import resource
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

if __spec__ is None:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

BARS = {"masks": 0.7}
RESUME_STEP, RESUME_BAR_MILLISECONDS = 1_000_000, 50.0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="sequences per batch (default %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (default %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="batches per round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each loader (default %(default)s)")
    parser.add_argument(
        "--records", default="10000,100000,1000000,10000000", help="file sizes to read from (default %(default)s)"
    )
    return parser.parse_args()


def prepare(folder: Path) -> Any:
    """Two directories of about 6 M tokens of real code, and the tokenizer they were made with."""
    from MaxText.input_pipeline import token_block_writer, tokenizer

    texts = [inspect.getsource(module) for module in (argparse, inspect, json, random)]
    tokenizer.train(texts, 4096, folder / "tokenizer")
    loaded = tokenizer.load(str(folder / "tokenizer"))
    encoded = loaded.encode([text[i : i + 9000] for text in texts for i in range(0, len(text), 9000)])
    rng = random.Random(0)
    for name in ("a", "b"):
        writer = token_block_writer.TokenBlockWriter(folder / name, loaded)
        for _ in range(2500):
            writer.add([rng.choice(encoded)], 1)
        writer.finish(name, "none", {})
    return loaded


def memmap_twin(dataset: Any, folder: Path) -> Any:
    """The same dataset over memory maps of the same tokens: same windows, order, permuting and packing."""
    import numpy as np

    twin = copy.copy(dataset)
    twin._windows = []
    for number, source in enumerate(dataset._windows):
        maps = []
        for shard, entry in enumerate(source.manifest.shards):
            path = folder / f"tokens{number}-{shard}.bin"
            path.write_bytes(source._reader.read(shard, 0, entry.tokens))
            maps.append(np.memmap(path, dtype=source._reader.dtype, mode="r"))
        windows = copy.copy(source)
        windows._reader = types.SimpleNamespace(
            read_many=lambda shards, starts, sizes, maps=maps: [
                maps[shard][start : start + size].tobytes()
                for shard, start, size in zip(shards.tolist(), starts.tolist(), sizes.tolist(), strict=True)
            ],
            dtype=source._reader.dtype,
        )
        twin._windows.append(windows)
    batches = (data.batch(7, 8, slice(None)) for data in (dataset, twin))
    assert all(
        np.array_equal(ours, theirs) for ours, theirs in zip(*(batch.values() for batch in batches), strict=True)
    )
    return twin


def read_seconds(dataset: Any, batch: int, steps: int, rounds: int) -> float:
    """Processor seconds a batch of nothing but ArrayRecord's reads of one record, those that the batches take."""
    calls: list[tuple[Any, int]] = []
    (windows,) = dataset._windows
    real = windows._reader

    def note(shards: Any, starts: Any, sizes: Any) -> list[bytes]:
        firsts, lasts = starts // real._block_tokens, (starts + sizes - 1) // real._block_tokens
        for shard, first, last in zip(shards.tolist(), firsts.tolist(), lasts.tolist(), strict=True):
            calls.extend((real._readers[shard].read, record) for record in range(first, last + 1))
        return real.read_many(shards, starts, sizes)

    windows._reader = types.SimpleNamespace(read_many=note, dtype=real.dtype)
    for step in range(steps):
        dataset.batch(step, batch, slice(None))
    windows._reader = real
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        for read, record in calls:
            read(record, record + 1)
        seconds.append((time.process_time() - started) / steps)
    return min(seconds)


def compare(arguments: argparse.Namespace, folder: Path, loaded: Any) -> None:
    """The loader's share of a memory map's speed for each kind of work."""
    from MaxText.input_pipeline.fim import Fim
    from MaxText.input_pipeline.token_dataset import TokenDataset

    fim = Fim(loaded, 0.5, 0.5, 0)
    work = {"masks": ("a", None), "mixture": ("a,7;b,3", None), "fim": ("a", fim), "fim and mixture": ("a,7;b,3", fim)}
    for name, (files, permute) in work.items():
        files = ";".join(f"{folder}/{part}" for part in files.split(";"))
        dataset = TokenDataset(files, 4096, arguments.length, 0, True, permute)
        twin = memmap_twin(dataset, folder)

        def run(data: Any, steps: int) -> int:
            return sum(data.batch(s, arguments.batch, slice(None))["inputs"].size for s in range(steps))

        steps = arguments.steps // (10 if permute else 1)
        rates: dict[str, list[float]] = {"loader": [], "memmap": []}
        for _ in range(arguments.rounds):
            for label, data in (("loader", dataset), ("memmap", twin)):
                run(data, 2)
                started = time.process_time()
                tokens = run(data, steps)
                rates[label].append(tokens / (time.process_time() - started))
        best = {label: max(values) for label, values in rates.items()}
        share = best["loader"] / best["memmap"]
        result = {"benchmark": "loader_work", "work": name, "share_of_memmap": round(share, 3)}
        result |= {f"{label}_tokens_per_core_second": round(rate) for label, rate in best.items()}
        if name in BARS:
            reads = read_seconds(dataset, arguments.batch, steps, arguments.rounds)
            twin_seconds = arguments.batch * arguments.length / best["memmap"]
            highest = twin_seconds / (twin_seconds + reads)  # were all the rest free that the memory map does not do
            result |= {"reads_alone_microseconds": round(1e6 * reads), "highest_share": round(highest, 3)}
            result |= {"bar": BARS[name], "passed": share >= BARS[name]}
        print(json.dumps(result | {"batch": arguments.batch, "length": arguments.length}), flush=True)


def read_times(sizes: list[int], folder: Path, loaded: Any) -> None:
    """Microseconds to read one window of a file of so many records."""
    import numpy as np

    from MaxText.input_pipeline.token_block_writer import TokenBlockWriter
    from MaxText.input_pipeline.token_blocks import TokenBlockReader

    for records in sizes:
        writer = TokenBlockWriter(folder / f"records{records}", loaded, 16, 2**62)
        for first in range(0, records, 100_000):
            writer.add([np.ones(16 * min(100_000, records - first) - 1, np.int64)], 0)
        writer.finish("x", "none", {})
        started = time.perf_counter()
        reader = TokenBlockReader(folder / f"records{records}", 4096)
        opened = time.perf_counter() - started
        starts = 16 * np.random.default_rng(0).integers(0, records, 10_000)
        shards, widths = np.zeros_like(starts), np.full_like(starts, 16)
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            reader.read_many(shards, starts, widths)
            seconds.append(time.perf_counter() - started)
        result = {"benchmark": "records_in_a_file", "records": records}
        result |= {"read_microseconds": round(min(seconds) / starts.size * 1e6, 2), "open_seconds": round(opened, 3)}
        print(json.dumps(result), flush=True)


def resume(arguments: argparse.Namespace, folder: Path) -> None:
    """Milliseconds from nothing to the batch of step one million: opened, checked, read."""
    from MaxText.input_pipeline.token_dataset import TokenDataset

    milliseconds = []
    for _ in range(arguments.rounds):
        started = time.perf_counter()
        TokenDataset(folder / "a", 4096, arguments.length, 0, True).batch(RESUME_STEP, arguments.batch, slice(None))
        milliseconds.append((time.perf_counter() - started) * 1e3)
    result = {"benchmark": "resume", "step": RESUME_STEP, "milliseconds": round(min(milliseconds), 1)}
    print(json.dumps(result | {"bar": RESUME_BAR_MILLISECONDS, "passed": min(milliseconds) < RESUME_BAR_MILLISECONDS}))


def memory(arguments: argparse.Namespace, folder: Path) -> None:
    """Resident memory at four points of two epochs."""
    from MaxText.input_pipeline.token_dataset import TokenDataset

    dataset = TokenDataset(f"{folder}/a,7;{folder}/b,3", 4096, arguments.length, 0, True)
    steps = 2 * dataset.num_batches(arguments.batch)
    seen = []
    for step in range(steps):
        dataset.batch(step, arguments.batch, slice(None))
        if step % (steps // 4) == steps // 4 - 1:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append(round(pages * resource.getpagesize() / 2**20, 1))
    print(json.dumps({"benchmark": "memory", "steps": steps, "resident_mebibytes_by_half_epoch": seen}))


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loaded = prepare(folder)
        compare(arguments, folder, loaded)
        resume(arguments, folder)
        memory(arguments, folder)
        read_times([int(word) for word in arguments.records.split(",")], folder, loaded)


if __name__ == "__main__":
    main()
