"""How much room checkpoints will take, by arithmetic and before anything is written, and whether there is as much."""

import hashlib
import shutil
from pathlib import Path

import jax

from MaxText.train_state import TrainState


def state_bytes(abstract: TrainState) -> int:
    """Bytes of one checkpoint at the most: Orbax compresses, weights hardly shrink."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


def staging_place(folder: Path, run_directory: Path) -> Path:
    """Where below `folder` the run makes its checkpoints: no other run does, whatever its name.

    Raises:
        ValueError: the run has several processes, whose shards of a checkpoint would lie on as many disks.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"checkpoint_staging_directory={folder} with {jax.process_count()} processes: each would have its own part "
            "there, and only the first one's be kept; leave it out, with a base_output_directory that all of them share"
        )
    place = str(run_directory.expanduser().absolute())
    return folder.expanduser() / f"{run_directory.name}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def check(directory: Path, staging: Path | None, abstract: TrainState, keep: int, epochs: int = 0) -> str:
    """What the checkpoints below `directory` will take and what there is, in words.

    Args:
        keep: so many of the newest are kept.
        epochs: so many are kept besides, at the ends of epochs.

    Raises:
        OSError: they do not fit; one more than is kept must, while it is written, or fit into `staging`.
    """
    each = state_bytes(abstract)
    held = _bytes_below(directory)
    room = shutil.disk_usage(directory).free + held
    at_once = keep + epochs + (staging is None)
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
        raise OSError(f"too little room: {words}. {_cure(room // each, keep, epochs, staging)}")
    return f"Room for checkpoints: {words}"


def _cure(room: int, keep: int, epochs: int, staging: Path | None) -> str:
    """What would fit into a room of so many checkpoints."""
    cures = []
    for kept, without in ((epochs, ""), (0, "checkpoint_every_epoch=false with " if epochs else "")):
        fitting = min(room - kept - (staging is None), keep)
        if fitting >= 1 and (without or fitting < keep):
            cures.append(f"{without}max_num_checkpoints_to_keep={fitting}")
            break
    if staging is None and room >= 1:
        every_epoch = "checkpoint_every_epoch=false, " if room < 1 + epochs else ""
        cures.append(
            f"{every_epoch}max_num_checkpoints_to_keep=1 with checkpoint_staging_directory=<one on another disk, such "
            "as /tmp>"
        )
    return f"Use {', or '.join([*cures, 'base_output_directory=<a larger disk>'])}, or enable_checkpointing=false"


def _bytes_below(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("checkpoints/**/*") if path.is_file())


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
