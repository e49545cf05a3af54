"""Data sets of the Hugging Face hub, streamed or from its cache, and TFDS directories in ArrayRecord.

In: `dataset[/data_dir][@revision]`, or a local folder in place of the dataset; or a TFDS directory. Out: the libraries'
own objects. Both libraries are imported here only, and late. The hub is asked once, with a short time-out: the library
itself retries for most of a minute.
"""

import os
from pathlib import Path
from typing import Any

from MaxText.input_pipeline import tokenizer


def open_stream(place: str) -> Any:
    """The training split as a `datasets.IterableDataset`.

    Raises:
        FileNotFoundError: it is neither on this machine nor on a hub that answers.
    """
    name, data_dir, revision = split_place(place)
    problem = None if Path(name).is_dir() else tokenizer.hub_problem()
    import datasets

    if problem is not None:  # then the cache is all there is, and is asked at once
        import huggingface_hub.constants

        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    try:
        if problem is not None:  # streaming always asks the hub; what is cached is whole
            cached: Any = datasets.load_dataset(name, data_dir=data_dir, revision=revision, split="train")
            return cached.to_iterable_dataset(num_shards=1)
        return datasets.load_dataset(name, data_dir=data_dir, revision=revision, split="train", streaming=True)
    except Exception as error:
        asked = f"; the hub cannot be asked ({problem})" if problem else ""
        raise FileNotFoundError(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}{asked}") from error


def split_place(place: str) -> tuple[str, str | None, str | None]:
    """(dataset, data_dir, revision) of `dataset[/data_dir][@revision]`; a local folder is a data set without either."""
    if Path(place).expanduser().is_dir():
        return str(Path(place).expanduser()), None, None
    name, _, revision = place.partition("@")
    parts = name.strip("/").split("/")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None, revision or None


def broken_data() -> type[Exception]:
    """What the library raises where the data, and not the way to it, is broken."""
    import datasets.exceptions

    return datasets.exceptions.DatasetGenerationError


def version(stream: Any) -> str:
    """What the library knows of the data's version."""
    return str(stream.info.version or "") + str(stream.info.download_size or "")


def open_tfds(place: str) -> Any:
    """The training split of a TFDS directory as a random-access source; TensorFlow is not needed.

    Raises:
        ValueError: it is not in ArrayRecord.
    """
    import tensorflow_datasets

    builder: Any = tensorflow_datasets.builder_from_directory(os.path.expanduser(place))
    try:
        return builder.as_data_source(split="train")
    except NotImplementedError as error:
        raise ValueError(f"only TFDS data in ArrayRecord can be read ({error})") from error
