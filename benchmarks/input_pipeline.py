"""How fast the loader makes batches, as a ratio to a bare np.memmap loader on the same tokens in the same run.

In: a directory of prepared token blocks, or synthetic text prepared in a temporary directory. Out: one JSON line per
result. The two take turns, and the best round of each counts: on a shared machine the best is the least disturbed.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import typing
from collections.abc import Callable
from pathlib import Path

if __spec__ is None:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

BAR = 0.30


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", help="prepared token blocks, one shard or more; default: 12 M random tokens")
    parser.add_argument("--batch", type=int, default=64, help="sequences per batch (default %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (default %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="batches per round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each loader (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads that read ahead (default %(default)s)")
    parser.add_argument("--buffer", type=int, default=4, help="batches kept ready (default %(default)s)")
    return parser.parse_args()


def write_random_blocks(directory: Path) -> None:
    """12 M tokens in documents of about 2,500, as the embedded corpus has."""
    import numpy as np

    from MaxText.input_pipeline import token_block_writer

    class RandomTokenizer:
        name, vocab_size, eos_id, fingerprint = "random", 49152, 0, "random"
        special_ids: typing.ClassVar[dict[str, int]] = {}

        def token_bytes(self) -> np.ndarray:
            return np.ones(self.vocab_size, np.int32)

    rng = np.random.default_rng(0)
    writer = token_block_writer.TokenBlockWriter(directory, RandomTokenizer())
    for size in rng.geometric(1 / 2500, 4800):
        writer.add([rng.integers(1, 49152, size).tolist()], 0)
    writer.finish("random tokens", "none", {})


def memmap_loader(path: Path, batch: int, length: int) -> Callable[[int], int]:
    """Runs `steps` batches the way nanoGPT does: random offsets into one file of ids, inputs and targets only."""
    import numpy as np

    def run(steps: int) -> int:
        rng = np.random.default_rng(0)
        for _ in range(steps):
            data = np.memmap(path, dtype=np.uint16, mode="r")
            starts = rng.integers(0, len(data) - length, batch)
            inputs = np.stack([data[start : start + length].astype(np.int64) for start in starts])
            targets = np.stack([data[start + 1 : start + 1 + length].astype(np.int64) for start in starts])
            assert inputs.shape == targets.shape
        return steps * batch * length

    return run


def bare_memmap_loader(path: Path, batch: int, length: int) -> Callable[[int], int]:
    """The least a memmap loader can do: one array of length + 1 tokens in int32, file opened once."""
    import numpy as np

    data = np.memmap(path, dtype=np.uint16, mode="r")

    def run(steps: int) -> int:
        rng = np.random.default_rng(0)
        for _ in range(steps):
            starts = rng.integers(0, len(data) - length, batch).tolist()
            windows = np.stack([data[start : start + length + 1] for start in starts]).astype(np.int32)
            assert windows.shape == (batch, length + 1)
        return steps * batch * length

    return run


def main() -> None:
    """Time the loaders in turns and print the results."""
    arguments = parse_arguments()
    import numpy as np

    from MaxText.input_pipeline.loader import TokenDataset, read_ahead

    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(arguments.directory or Path(scratch) / "blocks")
        if not arguments.directory:
            write_random_blocks(directory)
        dataset = TokenDataset(directory, 2**31, arguments.length, shuffle_seed=0, repeat=True)
        tokens_path = Path(scratch) / "tokens.bin"
        batch, length = arguments.batch, arguments.length
        with tokens_path.open("wb") as file:
            for first in range(0, dataset.num_windows, 1024):
                numbers = np.arange(first, min(first + 1024, dataset.num_windows))
                windows, lengths, _, _ = dataset._windows[0].read(numbers)
                for window, size in zip(windows, lengths, strict=True):
                    file.write(window[: min(size, length)].astype(np.uint16).tobytes())

        def make_batch(step: int) -> dict[str, np.ndarray]:
            return dataset.batch(step, batch, slice(None))

        def run_ahead(steps: int) -> int:
            return (
                batch * length * sum(1 for _ in read_ahead(make_batch, 0, steps, arguments.threads, arguments.buffer))
            )

        def run_direct(steps: int) -> int:
            return batch * length * sum(make_batch(step)["inputs"].shape[1] == length for step in range(steps))

        loaders = {
            "memmap_nanogpt": memmap_loader(tokens_path, batch, length),
            "memmap_bare": bare_memmap_loader(tokens_path, batch, length),
            "loader_direct": run_direct,
            "loader_read_ahead": run_ahead,
        }
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(arguments.rounds):
            for name, run in loaders.items():
                run(2)
                started = time.perf_counter()
                tokens = run(arguments.steps)
                rates[name].append(tokens / (time.perf_counter() - started))
    settings = {key: value for key, value in vars(arguments).items() if key != "directory"}
    for name, values in rates.items():
        result = {"benchmark": "input_pipeline", "loader": name, "tokens_per_second_best": round(max(values))}
        print(json.dumps(result | {"tokens_per_second_median": round(statistics.median(values))} | settings))
    for peer in ("memmap_nanogpt", "memmap_bare"):
        ratio = max(rates["loader_read_ahead"]) / max(rates[peer])
        summary = {"benchmark": "input_pipeline", "ratio_to": peer, "ratio": round(ratio, 3), "bar": BAR}
        print(json.dumps(summary | {"passed": ratio >= BAR}))


if __name__ == "__main__":
    main()
