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

from MaxText.input_pipeline import embedded, tokenizer
from MaxText.input_pipeline.fim import Fim
from MaxText.input_pipeline.synthetic import SyntheticDataset
from MaxText.input_pipeline.token_blocks import Manifest
from MaxText.input_pipeline.token_dataset import TokenDataset, check_same_tokenizer, parse_mixture

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
    def identity(self) -> str: ...

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
    if config.dataset_type == "hf":
        return _open_stream(config, log)
    if config.dataset_type == "embedded":
        corpus = embedded.prepare(**embedded_settings(config), log=log)
        train_directory, eval_directory = corpus.train, corpus.heldout
        tokenizer_path, note = corpus.tokenizer_path, f"; {corpus.note}"
        cure = f"; or delete {corpus.train.parent}, and the same command makes it again"
    elif config.dataset_type == "grain":
        if not config.grain_train_files:
            raise ValueError("dataset_type=grain needs grain_train_files, a directory with a manifest.json")
        train_directory, eval_directory = config.grain_train_files, config.grain_eval_files
        tokenizer_path, note, cure = config.tokenizer_path or _tokenizer_beside(train_directory), "", ""
    else:
        raise ValueError(f"dataset_type={config.dataset_type}: use embedded, grain, hf or synthetic")
    size, length, masking = tokenizer.num_token_ids(config), config.max_target_length, config.document_masking
    evaluation = None
    try:
        fim = _open_fim(config, tokenizer_path)
        train = TokenDataset(train_directory, size, length, shuffle_seed, True, fim, masking)
        _check_fim_tokenizer(fim, train.manifest)
        if eval_directory:
            evaluation = TokenDataset(eval_directory, size, length, None, repeat=False, document_masking=masking)
            check_same_tokenizer("training and evaluation data", train.manifest, evaluation.manifest)
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
    if config.dataset_type == "embedded" and not embedded.is_prepared(**embedded_settings(config)):
        text = (
            f"DATA: the Python files of this machine, at most {config.embedded_corpus_bytes / 1e6:.1f} MB of them; not "
            f"prepared yet, a run would do so first and keep the result in {config.data_cache_directory}"
        )
        return text, None
    data = open_datasets(config, log=lambda _: None)
    return data.description, data.train.num_windows


def embedded_settings(config: Any) -> dict[str, Any]:
    """What `embedded.prepare` is to be called with."""
    return {
        "cache_directory": Path(config.data_cache_directory).expanduser(),
        "corpus_bytes": config.embedded_corpus_bytes,
        "vocab_size": tokenizer.num_token_ids(config),
        "tokenizer_path": config.tokenizer_path,
    }


def _open_synthetic(config: Any) -> Datasets:
    arguments = {"vocab_size": tokenizer.num_token_ids(config), "sequence_length": config.max_target_length}
    seed = config.data_shuffle_seed
    train = SyntheticDataset(**arguments, seed=2 * seed, num_windows=SYNTHETIC_TRAIN_WINDOWS)
    evaluation = SyntheticDataset(**arguments, seed=2 * seed + 1, num_windows=SYNTHETIC_EVAL_WINDOWS)
    description = f"DATA: SYNTHETIC tokens of a fixed random process (seed {seed}); no text, for benchmarks only"
    return Datasets(train, evaluation, None, train.eos_id, "", description)


def _open_stream(config: Any, log: Callable[[str], None]) -> Datasets:
    from MaxText.input_pipeline.streaming import StreamDataset  # imported only by who streams

    if not config.source or not config.tokenizer_path:
        raise ValueError(
            f"dataset_type=hf needs source and tokenizer_path, and they are {config.source or 'empty'} and "
            f"{config.tokenizer_path or 'empty'}; such as source=hf:codeparrot/codeparrot-clean "
            "tokenizer_path=bigcode/starcoder2-3b"
        )
    if config.steps == "auto":
        raise ValueError("steps=auto needs to know how much data there is, and dataset_type=hf does not; give a number")
    size, length, masking = tokenizer.num_token_ids(config), config.max_target_length, config.document_masking
    loaded = tokenizer.load(config.tokenizer_path)
    tokenizer.check_fits(loaded, config.tokenizer_path, size)
    fim = _open_fim(config, config.tokenizer_path)
    train = StreamDataset(config.source, config.text_column, loaded, size, length, config.num_epoch, fim, masking, log)
    evaluation = None
    if config.grain_eval_files:
        evaluation = TokenDataset(config.grain_eval_files, size, length, None, repeat=False, document_masking=masking)
        theirs = evaluation.manifest.tokenizer
        if theirs["sha256"] != loaded.fingerprint:
            raise ValueError(f"grain_eval_files={config.grain_eval_files} was made with the tokenizer {theirs['name']}")
    description = (
        f"DATA: STREAMED from {train.source}: in its order, not deduplicated, "
        f"{'no held-out data' if evaluation is None else 'held-out data is prepared'}; a resumed run reads all again "
        f"up to its step; tokenizer {loaded.name} of {loaded.vocab_size:,} entries"
    )
    return Datasets(train, evaluation, train.token_bytes(), train.eos_id, config.tokenizer_path, description)


def _tokenizer_beside(files: str) -> str:
    """The tokenizer that prepare_data.py put next to the data; empty if there is none."""
    folder = Path(parse_mixture(files)[0][0]).expanduser().parent / "tokenizer"
    found = [path for path in (folder / "tokenizer.model", folder / "tokenizer.json") if path.is_file()]
    return "" if not found else str(found[0] if found[0].suffix == ".model" else folder)


def _open_fim(config: Any, tokenizer_path: str) -> Fim | None:
    if config.fim_rate == 0:
        return None
    if not tokenizer_path:
        raise ValueError(f"fim_rate={config.fim_rate} cuts between characters, for which it needs tokenizer_path")
    return Fim(tokenizer.load(tokenizer_path), config.fim_rate, config.fim_spm_rate, config.data_shuffle_seed)


def _check_fim_tokenizer(fim: Fim | None, manifest: Manifest) -> None:
    """Refuse to cut with another tokenizer than the data was made with.

    Raises:
        ValueError: it is another one.
    """
    if fim is not None and fim.identity[-1] != manifest.tokenizer["sha256"]:
        raise ValueError(
            f"tokenizer_path is another tokenizer than the data was made with, {manifest.tokenizer['name']} "
            f"({manifest.tokenizer['sha256'][:16]}); fim_rate needs that one"
        )


def _describe(train: TokenDataset, evaluation: TokenDataset | None) -> str:
    manifest = train.manifest
    heldout = "no held-out data"
    if evaluation is not None:
        heldout = f"{evaluation.manifest.tokens:,} tokens of {evaluation.manifest.documents:,} held-out files"
    sources = "; and ".join(
        f"{part.source}; {part.tokens:,} training tokens of {part.documents:,} files" for part in train.manifests
    )
    return (
        f"DATA: {sources} ({train.num_windows:,} sequences of {train.sequence_length}), {heldout}; "
        f"tokenizer {manifest.tokenizer['name']} of {manifest.vocab_size:,} entries"
    )
