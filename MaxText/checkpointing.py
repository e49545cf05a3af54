"""Checkpoints: one step directory holds the state, the position in the data, the resolved config, and a manifest.

Orbax writes the arrays into a directory without a step's name; it gets that name when everything is on the disk and the
manifest with every file's hash is written. So a directory with a step's name was complete once, and restoring checks
that it still is: what is damaged is named, moved aside, and the next older step is used.
"""

import contextlib
import functools
import json
import logging
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import jax

from MaxText import agreement, checkpoint_manifest, config_changes
from MaxText.checkpoint_manifest import Damaged
from MaxText.config_changes import Mismatch
from MaxText.train_state import TrainState

_LOG = logging.getLogger("MaxText")
_UNFINISHED, _DELETED = ".writing-", ".deleting-"  # begin the names of what a kill may leave behind


class Checkpointer:
    """The checkpoints of one run directory; one process at a time may have one.

    Args:
        directory: the run's `checkpoints/`.
        run_info: what is saved as `config`: {"config": resolved keys, ...}; a restored step's must fit to it. A step
            that is in the "epoch_ends" it was saved with is never deleted.
        keep: so many of the newest are kept besides.
        staging: where a step is made before it replaces the old one, if the directory has no room for both.
    """

    def __init__(
        self,
        directory: Path,
        run_info: Mapping[str, Any],
        *,
        keep: int,
        asynchronous: bool,
        staging: Path | None = None,
    ):
        self.directory = directory
        self._run_info = dict(run_info)
        self._keep = keep
        self._asynchronous = asynchronous
        self._staging = staging
        self._finishing: futures.Future[None] | None = None  # of the save under way
        self._background = futures.ThreadPoolExecutor(1, "checkpoint")

    @functools.cached_property
    def _orbax(self) -> Any:
        """Made at the first save, because importing it takes a second that a fresh start has not."""
        import orbax.checkpoint as ocp

        if _is_first_process():
            for place in self._places():
                place.mkdir(parents=True, exist_ok=True)
                for left in (*place.glob(f"{_UNFINISHED}*"), *place.glob(f"{_DELETED}*")):
                    shutil.rmtree(left)
        return ocp.StandardCheckpointer()

    def save(self, state: TrainState, step: int, data: Mapping[str, Any]) -> None:
        """Writes the state after `step` steps; in the background if the run asked for that.

        Raises:
            OSError: it, or the one before it, could not be written.
        """
        self.wait()
        with self._errors_in_words():
            orbax = self._orbax
            partial = (self._staging or self.directory).absolute() / f"{_UNFINISHED}{step}"
            if _is_first_process():
                partial.mkdir()
                for name, content in (("data", dict(data)), ("config", self._run_info)):
                    (partial / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
            orbax.save(partial / "state", state)
        self._finishing = self._background.submit(self._finish, partial, step)
        if not self._asynchronous:
            self.wait()

    def check(self) -> None:
        """Call it now and then: a save in the background that has failed is an error.

        Raises:
            OSError: it could not be written.
        """
        if self._finishing is not None and self._finishing.done():
            self.wait()

    def wait(self) -> None:
        """Returns when what is being written is whole and has its name.

        Raises:
            OSError: it could not be written.
        """
        finishing, self._finishing = self._finishing, None
        if finishing is not None:
            with self._errors_in_words():
                finishing.result()

    def close(self) -> None:
        """Waits for what is being written; nothing can be saved after it.

        Raises:
            OSError: it could not be written.
        """
        try:
            self.wait()
        finally:
            self._background.shutdown()
            if "_orbax" in vars(self):
                self._orbax.close()

    def _finish(self, partial: Path, step: int) -> None:
        """Completes a step: what Orbax does in the background, the manifest, the name; then the oldest ones go."""
        self._orbax.wait_until_finished()
        if not _is_first_process():
            return
        checkpoint_manifest.write(partial, step)
        _name(partial, str(step))
        if self._staging is not None:
            for staged in reversed(checkpoint_manifest.steps_in(self._staging)):  # a kill may have left an older one
                self._move_from_staging(staged)
        for old in self.steps()[self._keep :]:
            if not self._is_epoch_end(old):
                self._delete(old)

    def _move_from_staging(self, step: int) -> None:
        """Copies a whole step to the run's directory; old ones make room for it, as it is safe where it is.

        Raises:
            OSError: there is no room for it beside the ends of epochs.
        """
        assert self._staging is not None
        staged = self._staging / str(step)
        size = sum(record["bytes"] for record in checkpoint_manifest.read(staged)["files"].values())
        there = checkpoint_manifest.steps_in(self.directory)[::-1]
        ends = [old for old in there if self._is_epoch_end(old)]
        may_go = [old for old in there if old not in ends]
        while (free := shutil.disk_usage(self.directory).free) < 1.02 * size and may_go:
            _delete(self.directory / str(may_go.pop(0)))
        if free < size and ends:
            raise OSError(
                f"{self.directory} has {free:,} bytes free, checkpoint {step} takes {size:,}; the ends of epochs, "
                f"{ends}, are never deleted: move some elsewhere"
            )
        partial = self.directory / f"{_UNFINISHED}{step}"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(staged, partial)
        checkpoint_manifest.verify(partial)
        _name(partial, str(step))
        _delete(staged)

    def _places(self) -> list[Path]:
        return [self.directory] if self._staging is None else [self.directory, self._staging]

    def _path(self, step: int) -> Path:
        """Where a step is; where it is twice, that in the run's directory may be the older one and is not taken."""
        return next(place / str(step) for place in reversed(self._places()) if (place / str(step)).is_dir())

    def _is_epoch_end(self, step: int) -> bool:
        """By its own record, as a launch may have other epochs; what cannot be read is none of ours to delete."""
        try:
            return step in read_info(self._path(step)).get("epoch_ends", ())
        except OSError:
            return True

    def _delete(self, step: int) -> None:
        for place in self._places():
            if (place / str(step)).is_dir():
                _delete(place / str(step))

    def steps(self) -> list[int]:
        """The steps that are there, the newest first. One has its name when it is complete, not before."""
        return sorted({step for place in self._places() for step in checkpoint_manifest.steps_in(place)}, reverse=True)

    def restore_newest(
        self, abstract: TrainState, data: Mapping[str, Any], allowed: Collection[str] = ()
    ) -> TrainState | None:
        """The state of the newest step that is whole, or None where there is no step.

        Args:
            allowed: keys of `data`, and of the config where they do not shape the state, that may differ.

        A damaged step is named and moved to `checkpoints_damaged/`, so that its number is free again.

        Raises:
            Mismatch: the step is of another model, other data than `data` says, or another training.
            OSError: there are steps, but none of them is whole.
        """
        newest = agreement.from_first_process(self._newest_whole)
        if newest < 0:
            return None
        directory, config = self._path(newest), self._run_info["config"]
        saved = read_info(directory)["config"]
        keys = config_changes.training_keys(config)
        config_changes.check_same(directory, saved, config, keys, "training", allowed)
        return restore_step(directory, abstract, config, data, allowed, verified=True)

    def saved_config(self, step: int) -> dict[str, Any]:
        """The resolved config that a step was saved with."""
        return read_info(self._path(step))["config"]

    def _newest_whole(self) -> int:
        """The newest step that its manifest finds whole, -1 where there is none; moves damaged ones aside."""
        steps, damaged = self.steps(), []
        for step in steps:
            try:
                checkpoint_manifest.verify(self._path(step))
            except Damaged as error:
                _LOG.warning("checkpoint %s cannot be read, trying an older one: %s", step, error)
                damaged.append(step)
                continue
            for bad in damaged:
                self._set_aside(bad)
            return step
        if steps:
            raise OSError(f"none of the checkpoints {steps} in {self.directory} can be read; nothing was changed there")
        return -1

    def _set_aside(self, step: int) -> None:
        place = self.directory.with_name("checkpoints_damaged") / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}"
        place.parent.mkdir(exist_ok=True)
        shutil.move(self._path(step), place)
        _LOG.warning("checkpoint %s was moved to %s", step, place)

    @contextlib.contextmanager
    def _errors_in_words(self) -> Iterator[None]:
        """Whatever Orbax and TensorStore raise when a disk is full or gone, as an OSError that says what to do."""
        try:
            yield
        except Exception as error:
            raise OSError(
                f"a checkpoint could not be written to {self.directory}: {_first_line(error)}. Checkpoints "
                f"{self.steps()} are whole; make room or repair the disk, and the same command resumes from the newest"
            ) from error


def _name(partial: Path, name: str) -> None:
    """Gives a finished directory its name; one that has it is replaced."""
    final = partial.with_name(name)
    if final.exists():
        _delete(final)
    partial.rename(final)
    checkpoint_manifest.sync(final.parent)


def _delete(directory: Path) -> None:
    """Deletes a step; while that lasts, or where it is cut short, the directory does not look like one."""
    doomed = directory.rename(directory.with_name(_DELETED + directory.name))
    shutil.rmtree(doomed)


def _is_first_process() -> bool:
    return jax.process_index() == 0


def restore_step(
    directory: Path,
    abstract: TrainState,
    config: Mapping[str, Any],
    data: Mapping[str, Any],
    allowed: Collection[str] = (),
    verified: bool = False,
) -> TrainState:
    """The whole state of one step directory, on the shardings of `abstract`.

    Args:
        data: the position's fixed part: which data, in which order.
        allowed: keys of `data` that may differ.
        verified: its files are known to be what was written.

    Raises:
        Mismatch: it is of another model or other data.
        OSError: it cannot be read.
    """
    with _readable(directory):
        if not verified:
            checkpoint_manifest.verify(directory)
        saved = read_records(directory)
        before = saved["config"]["config"]
        config_changes.check_same(directory, before, config, config_changes.STATE_KEYS, "model")
        config_changes.check_same(directory, saved["data"], data, tuple(data), "data", allowed)
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore((directory / "state").absolute(), abstract)


def restore_params(directory: Path, abstract: TrainState, config: Mapping[str, Any]) -> Any:
    """Only the parameters of one step directory.

    Raises:
        Mismatch: it is of another model.
        OSError: it cannot be read.
    """
    with _readable(directory):
        checkpoint_manifest.verify(directory)
        saved = read_records(directory)["config"]["config"]
        config_changes.check_same(directory, saved, config, config_changes.MODEL_KEYS, "model")
        import orbax.checkpoint as ocp

        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(
                (directory / "state").absolute(),
                args=ocp.args.PyTreeRestore(
                    item={"params": abstract.params},
                    restore_args=ocp.checkpoint_utils.construct_restore_args({"params": abstract.params}),
                    partial_restore=True,
                ),
            )
    return restored["params"]


def read_records(directory: Path) -> dict[str, Any]:
    """What a step says of itself: {"config": {"config": resolved keys, "git_commit": ..., ...}, "data": position}."""
    return {name: json.loads((directory / f"{name}.json").read_text()) for name in ("config", "data")}


def read_info(directory: Path) -> dict[str, Any]:
    """What was saved beside the weights of one step directory: {"config": resolved keys, "git_commit": ..., ...}.

    Raises:
        OSError: it cannot be read.
    """
    with _readable(directory):
        return read_records(directory)["config"]


@contextlib.contextmanager
def _readable(directory: Path) -> Iterator[None]:
    """Whatever the readers raise at a damaged or foreign directory, as an OSError that names it."""
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {directory}; name a step directory, .../checkpoints/<step>")
    try:
        yield
    except (Mismatch, PermissionError, MemoryError):
        raise
    except Exception as error:
        raise OSError(f"{directory} is not a checkpoint that can be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}"
