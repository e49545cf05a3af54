"""Data sets of the Hugging Face hub, streamed or from its cache, and TFDS directories in ArrayRecord.

In: `dataset[/data_dir][@revision]`, or a local folder in place of the dataset; or a TFDS directory. Out: the libraries'
own objects. Both libraries are imported here only, and late. The hub is asked once, with a short time-out: the library
itself retries for most of a minute.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from MaxText.input_pipeline import tokenizer


class Stream(NamedTuple):
    """A split that is read in order.

    Attributes:
        rows: a `datasets.IterableDataset`.
        place: what names this very content again: a hub data set's with the commit that its revision stood for.
        version: the commit, or for a local folder what changes with its files.
    """

    rows: Any
    place: str
    version: str


def open_stream(place: str) -> Stream:
    """The training split of what `place` names.

    Raises:
        FileNotFoundError: it is neither on this machine nor on a hub that answers, or is cached at another revision.
    """
    name, data_dir, revision = split_place(place)
    local = Path(name).is_dir()
    problem = None if local else tokenizer.hub_problem()
    import datasets

    if problem is not None:  # then the cache is all there is, and is asked at once
        import huggingface_hub.constants

        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(name, data_dir=data_dir, revision=revision)
        if problem is None:
            rows: Any = builder.as_streaming_dataset(split="train")
        else:  # streaming always asks the hub; what is cached is whole
            cached: Any = builder.as_dataset(split="train")
            rows = cached.to_iterable_dataset(num_shards=1)
    except Exception as error:
        asked = f"; the hub cannot be asked ({problem})" if problem else ""
        if problem and data_dir:
            asked += f", and of a cached data set the library finds {name} whole only, not its {data_dir}"
        raise FileNotFoundError(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}{asked}") from error
    version = str(builder.hash)
    if problem is not None and revision not in (None, version):  # the library takes the newest, whatever was asked for
        raise FileNotFoundError(
            f"the cache holds commit {version} and revision {revision} was asked for; the hub cannot be asked which "
            f"commit that is ({problem}): name the commit, or none to take what is cached"
        )
    return Stream(rows, place if local else f"{'/'.join(filter(None, (name, data_dir)))}@{version}", version)


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
