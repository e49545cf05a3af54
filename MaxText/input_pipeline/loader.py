"""Batches as a pure function of (data, seed, step), and the choice of the data a config asks for.

In: prepared token blocks or a random process. Out: int32 arrays under packing.KEYS. There is no iterator state: the
global batch of step k is computed from k alone, so resuming needs the step number only, and any number of processes
assembles the same batch from its shares.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from MaxText.input_pipeline import embedded, packing
from MaxText.input_pipeline.permutation import permute
from MaxText.input_pipeline.synthetic import SyntheticDataset
from MaxText.input_pipeline.token_blocks import Manifest, TokenBlockReader

SYNTHETIC_TRAIN_WINDOWS = 2**40  # never repeats in practice
SYNTHETIC_EVAL_WINDOWS = 256


@runtime_checkable  # so that the tests can check signatures
class Dataset(Protocol):
    """What training and evaluation need of data; see TokenDataset for the meaning of each member."""

    vocab_size: int
    sequence_length: int
    eos_id: int
    num_windows: int

    @property
    def manifest(self) -> Manifest | None: ...

    def num_batches(self, global_batch_size: int) -> int: ...

    def batch(self, step: int, global_batch_size: int, rows: slice | np.ndarray) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class Datasets:
    """The data of a run.

    Attributes:
        evaluation: None when no held-out data is given.
        token_bytes: int32 [vocab_size], UTF-8 bytes per token id, 0 for special tokens; None if there is no text.
        tokenizer_path: what tokenizer.load takes; empty if there is no text.
        description: where the data came from, in words.
    """

    train: Dataset
    evaluation: Dataset | None
    token_bytes: np.ndarray | None
    eos_id: int
    tokenizer_path: str
    description: str


class TokenDataset:
    """Windows of `sequence_length` + 1 tokens over a directory of token blocks.

    Neighbouring windows share one token, the last target of one being the first input of the next, so that every token
    of a shard but its first is a target once per epoch; the first of a document is one without weight.
    A shard's last window is padded, never dropped.

    Attributes:
        manifest: of the directory.
        vocab_size: the model's.
        num_windows: samples in one epoch.
    """

    def __init__(
        self, directory: str | Path, vocab_size: int, sequence_length: int, shuffle_seed: int | None, repeat: bool
    ):
        """Args:
        shuffle_seed: None leaves the windows in the order of the files; else each epoch has an order of its own.
        repeat: after the last window begin again (training), or give padding only (evaluation).
        """
        self._reader = TokenBlockReader(directory, vocab_size)
        self.manifest = self._reader.manifest
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.eos_id = self.manifest.eos_id
        self._padding = np.array(self.eos_id, self._reader.dtype).tobytes()
        self._shuffle_seed = shuffle_seed
        self._repeat = repeat
        self._shard_tokens = np.array([shard.tokens for shard in self.manifest.shards])
        windows = -(-(self._shard_tokens - 1) // sequence_length)
        self._window_ends = np.cumsum(windows)
        self._window_starts = self._window_ends - windows
        self.num_windows = int(self._window_ends[-1])

    def num_batches(self, global_batch_size: int) -> int:
        """Batches in one pass over the data, the last one perhaps not full."""
        return -(-self.num_windows // global_batch_size)

    def batch(self, step: int, global_batch_size: int, rows: slice | np.ndarray) -> dict[str, np.ndarray]:
        """The rows `rows` of the global batch of step `step`: int32 [rows, sequence_length] under packing.KEYS."""
        samples = step * global_batch_size + np.arange(global_batch_size)[rows]
        if self._repeat:
            epochs, positions = np.divmod(samples, self.num_windows)
            if self._shuffle_seed is not None:
                positions = permute(positions, self.num_windows, self._shuffle_seed, epochs)
        else:
            positions = samples
        return packing.pack(*self._read_windows(positions), self.eos_id)

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes per token id; 0 for special tokens and for ids the tokenizer has not."""
        sizes = self._reader.token_bytes()
        padded = np.zeros(self.vocab_size, np.int32)
        padded[: sizes.size] = sizes[: self.vocab_size]
        return padded

    def _read_windows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The windows [B, L + 1] at these positions and their true lengths [B]; a position past the end is empty."""
        width = self.sequence_length + 1
        inside = positions < self.num_windows
        shards = np.searchsorted(self._window_ends[:-1], positions, side="right")
        starts = (positions - self._window_starts[shards]) * self.sequence_length
        lengths = np.where(inside, np.minimum(width, self._shard_tokens[shards] - starts), 0)
        pieces = []
        for shard, start, length in zip(shards.tolist(), starts.tolist(), lengths.tolist(), strict=True):
            if length:
                pieces.append(self._reader.read(shard, start, length))
            if length < width:  # any valid id serves as padding: its segment is 0
                pieces.append(self._padding * (width - length))
        windows = np.frombuffer(b"".join(pieces), self._reader.dtype).reshape(positions.size, width)
        return windows.astype(np.int32), lengths


def read_ahead(
    make_batch: Callable[[int], Any], start_step: int, num_steps: int, num_threads: int, buffer_size: int
) -> Iterator[Any]:
    """`make_batch(step)` for each of `num_steps` steps from `start_step` on, in order, made in advance by threads."""
    import grain  # here, because importing it takes seconds

    steps = grain.MapDataset.range(start_step, start_step + num_steps).map(make_batch)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffer_size)
    return iter(steps.to_iter_dataset(options))


def check_epochs(steps: int, global_batch_size: int, num_windows: int, num_epoch: int) -> None:
    """Refuse a run that would read the data more often than `num_epoch` times; -1 allows any number.

    Raises:
        ValueError: it would.
    """
    if num_epoch != -1 and steps * global_batch_size > num_epoch * num_windows:
        raise ValueError(
            f"steps={steps:,} of {global_batch_size:,} sequences read {steps * global_batch_size:,} sequences, that is "
            f"{steps * global_batch_size / num_windows:.2f} epochs of the {num_windows:,} there are, but "
            f"num_epoch={num_epoch}; use steps={num_epoch * num_windows // global_batch_size:,} at the most, or "
            "raise num_epoch"
        )


def open_datasets(config: Any, log: Callable[[str], None]) -> Datasets:
    """The data that `config.dataset_type` names, checked and ready.

    Raises:
        FileNotFoundError, ValueError: it is missing, damaged, or does not fit the model.
    """
    shuffle_seed = config.data_shuffle_seed if config.enable_data_shuffling else None
    if config.dataset_type == "synthetic":
        return _open_synthetic(config)
    if config.dataset_type == "embedded":
        corpus = embedded.prepare(**_embedded_settings(config), log=log)
        train_directory, eval_directory = corpus.train, corpus.heldout
        tokenizer_path, note = corpus.tokenizer_path, f"; {corpus.note}"
        cure = f"; or delete {corpus.train.parent}, and the same command makes it again"
    elif config.dataset_type == "grain":
        if not config.grain_train_files:
            raise ValueError("dataset_type=grain needs grain_train_files, a directory with a manifest.json")
        train_directory, eval_directory = config.grain_train_files, config.grain_eval_files
        tokenizer_path, note, cure = config.tokenizer_path, "", ""
    else:
        raise ValueError(f"dataset_type={config.dataset_type}: use embedded, grain or synthetic")
    length = config.max_target_length
    evaluation = None
    try:
        train = TokenDataset(train_directory, config.vocab_size, length, shuffle_seed, repeat=True)
        if eval_directory:
            evaluation = TokenDataset(eval_directory, config.vocab_size, length, shuffle_seed=None, repeat=False)
            _check_same_tokenizer(train, evaluation)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{error}{cure}") from error
    return Datasets(
        train=train,
        evaluation=evaluation,
        token_bytes=train.token_bytes(),
        eos_id=train.eos_id,
        tokenizer_path=tokenizer_path or train.manifest.tokenizer["name"],
        description=_describe(train, evaluation) + note,
    )


def describe(config: Any) -> tuple[str, int | None]:
    """What a run would say of its data, without making any, and how many sequences there are; None: not known yet."""
    if config.dataset_type == "embedded" and not embedded.is_prepared(**_embedded_settings(config)):
        text = (
            f"DATA: the Python files of this machine, at most {config.embedded_corpus_bytes / 1e6:.1f} MB of them; not "
            f"prepared yet, a run would do so first and keep the result in {config.data_cache_directory}"
        )
        return text, None
    data = open_datasets(config, log=lambda _: None)
    return data.description, data.train.num_windows


def _embedded_settings(config: Any) -> dict[str, Any]:
    return {
        "cache_directory": Path(config.data_cache_directory).expanduser(),
        "corpus_bytes": config.embedded_corpus_bytes,
        "vocab_size": config.vocab_size,
        "tokenizer_path": config.tokenizer_path,
    }


def _open_synthetic(config: Any) -> Datasets:
    arguments = {"vocab_size": config.vocab_size, "sequence_length": config.max_target_length}
    seed = config.data_shuffle_seed
    train = SyntheticDataset(**arguments, seed=2 * seed, num_windows=SYNTHETIC_TRAIN_WINDOWS)
    evaluation = SyntheticDataset(**arguments, seed=2 * seed + 1, num_windows=SYNTHETIC_EVAL_WINDOWS)
    description = f"DATA: SYNTHETIC tokens of a fixed random process (seed {seed}); no text, for benchmarks only"
    return Datasets(train, evaluation, None, train.eos_id, "", description)


def _check_same_tokenizer(train: TokenDataset, evaluation: TokenDataset) -> None:
    ours, theirs = train.manifest.tokenizer, evaluation.manifest.tokenizer
    if ours["sha256"] != theirs["sha256"]:
        raise ValueError(
            f"training and evaluation data were made with different tokenizers: {ours['name']} ({ours['sha256'][:16]}) "
            f"and {theirs['name']} ({theirs['sha256'][:16]}); prepare both with one"
        )


def _describe(train: TokenDataset, evaluation: TokenDataset | None) -> str:
    manifest = train.manifest
    heldout = "no held-out data"
    if evaluation is not None:
        heldout = f"{evaluation.manifest.tokens:,} tokens of {evaluation.manifest.documents:,} held-out files"
    return (
        f"DATA: {manifest.source}; {manifest.tokens:,} training tokens of {manifest.documents:,} files "
        f"({train.num_windows:,} sequences of {train.sequence_length}), {heldout}; "
        f"tokenizer {manifest.tokenizer['name']} of {manifest.vocab_size:,} entries"
    )
