"""How much room checkpoints will take, by arithmetic and before anything is written, and whether there is as much."""

import shutil
from pathlib import Path

import jax

from MaxText.train_state import TrainState


def state_bytes(abstract: TrainState) -> int:
    """Bytes of one checkpoint at the most: Orbax compresses, weights hardly shrink."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


def check(directory: Path, staging: Path | None, abstract: TrainState, keep: int) -> str:
    """What the checkpoints below `directory` will take and what there is, in words.

    Raises:
        OSError: they do not fit; one more than is kept must, while it is written, or fit into `staging`.
    """
    each = state_bytes(abstract)
    held = _bytes_below(directory)
    room = shutil.disk_usage(directory).free + held
    at_once = keep if staging is not None else keep + 1
    words = f"{_gb(at_once * each)} for {at_once} checkpoints of {_gb(each)} at a time; {directory} has {_gb(room)}"
    if held:
        words += f", {_gb(held)} of them in use by checkpoints"
    if staging is not None:
        staging.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(staging).free
        words += f"; {staging}, where they are made, has {_gb(free)}"
        if free < each:
            raise OSError(f"too little room: {words}. Set checkpoint_staging_directory to a larger disk")
    if room < at_once * each:
        raise OSError(f"too little room: {words}. {_cure(room, each, keep, staging)}")
    return f"Room for checkpoints: {words}"


def _cure(room: int, each: int, keep: int, staging: Path | None) -> str:
    cures = []
    fitting = int(room / each) - (staging is None)
    if 1 <= fitting < keep:
        cures.append(f"max_num_checkpoints_to_keep={fitting}")
    if staging is None and room >= each:
        cures.append(
            "max_num_checkpoints_to_keep=1 with checkpoint_staging_directory=<one on another disk, such as /tmp>"
        )
    return f"Use {', or '.join([*cures, 'base_output_directory=<a larger disk>'])}, or enable_checkpointing=false"


def _bytes_below(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("checkpoints/**/*") if path.is_file())


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
