"""Checkpoints: one step directory holds the state, the position in the data, the resolved config and the commit.

Orbax writes and commits them, in the background if asked. Restoring goes to whatever mesh the abstract state names. A
step that cannot be read is named and the next older one is used; a step of another model or other data is refused with
the difference.
"""

import contextlib
import functools
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from MaxText.train_state import TrainState

_LOG = logging.getLogger("MaxText")

# The keys that give the parameters their shapes and their meaning: a checkpoint fits only if they are the same.
MODEL_KEYS = (
    "base_emb_dim",
    "base_num_decoder_layers",
    "base_num_query_heads",
    "base_num_kv_heads",
    "head_dim",
    "base_mlp_dim",
    "attention_type",
    "vocab_size",
    "vocab_padding",
    "final_logits_soft_cap",
    "logits_via_embedding",
    "mtp_num_layers",
    "mtp_transformer_block",
    "use_qk_norm",
    "normalization_layer_epsilon",
    "rope_max_timescale",
    "weight_dtype",
)
# Those that the optimizer's state depends on besides.
STATE_KEYS = (*MODEL_KEYS, "opt_type", "mu_dtype")


class Checkpointer:
    """The checkpoints of one run directory.

    Args:
        directory: the run's `checkpoints/`.
        run_info: what is saved as `config`: {"config": resolved keys, ...}; a restored step's model keys must be equal.
        keep: so many of the newest are kept, and besides them the steps of `keep_always`.
    """

    def __init__(
        self,
        directory: Path,
        run_info: Mapping[str, Any],
        *,
        keep: int,
        keep_always: Sequence[int] = (),
        asynchronous: bool,
    ):
        self.directory = directory
        self._run_info = dict(run_info)
        self._keep = keep
        self._keep_always = keep_always
        self._asynchronous = asynchronous

    @functools.cached_property
    def _manager(self) -> Any:
        """Orbax's manager; made at the first save, because importing it takes a second that a fresh start has not."""
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

        return ocp.CheckpointManager(
            self.directory.absolute(),
            item_names=("state", "data", "config"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(self._keep), policies.CustomSteps(self._keep_always)]
                ),
                enable_async_checkpointing=self._asynchronous,
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, state: TrainState, step: int, data: Mapping[str, Any]) -> None:
        """Writes the state after `step` steps; in the background if the run asked for that.

        Raises:
            OSError: it, or an earlier one still being written, could not be written.
        """
        import orbax.checkpoint as ocp

        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(dict(data)),
            config=ocp.args.JsonSave(self._run_info),
        )
        with self._errors_in_words():
            self._manager.save(step, args=items, force=True)

    def steps(self) -> list[int]:
        """The steps that are there, the newest first. Orbax gives a step its name when it is complete, not before."""
        return steps_in(self.directory)

    def restore_newest(self, abstract: TrainState, data: Mapping[str, Any]) -> TrainState | None:
        """The state of the newest step that can be read, or None where there is no step.

        A step that cannot be read is named and moved to `checkpoints_damaged/`, so that its number is free again.

        Raises:
            Mismatch: the newest step is of another model, or of other data than `data` says.
            OSError: there are steps, but none of them can be read.
        """
        steps = self.steps()
        damaged = []
        for step in steps:
            try:
                state = restore_step(self.directory / str(step), abstract, self._run_info["config"], data)
            except PermissionError:
                raise
            except OSError as error:
                _LOG.warning("checkpoint %s cannot be read, trying an older one: %s", step, _first_line(error))
                damaged.append(step)
                continue
            for bad in damaged:
                self._set_aside(bad)
            return state
        if steps:
            raise OSError(f"none of the checkpoints {steps} in {self.directory} can be read; nothing was changed there")
        return None

    def _set_aside(self, step: int) -> None:
        place = self.directory.with_name("checkpoints_damaged") / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}"
        place.parent.mkdir(exist_ok=True)
        (self.directory / str(step)).rename(place)
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

    def close(self) -> None:
        """Waits for what is being written and lets go of the directory."""
        if "_manager" not in vars(self):
            return  # nothing was saved
        with self._errors_in_words():
            self._manager.wait_until_finished()
            self._manager.close()


def steps_in(directory: Path) -> list[int]:
    """The steps that have a directory of their own there, the newest first."""
    names = [path.name for path in directory.glob("*") if path.is_dir()] if directory.is_dir() else []
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def check_free_space(directory: Path, abstract: TrainState) -> None:
    """Refuses to start where not even one checkpoint fits.

    Raises:
        OSError: too little is free.
    """
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"a checkpoint takes up to {needed / 1e9:.2f} GB and {directory} has {free / 1e9:.2f} GB free; free some, "
            "set base_output_directory to another disk, or enable_checkpointing=false"
        )


class Mismatch(ValueError):
    """A checkpoint that is whole but does not belong to this run."""


def restore_step(
    directory: Path, abstract: TrainState, config: Mapping[str, Any], data: Mapping[str, Any]
) -> TrainState:
    """The whole state of one step directory, on the shardings of `abstract`.

    Args:
        data: the position's fixed part: which data, in which order.

    Raises:
        Mismatch: it is of another model or other data.
        OSError: it cannot be read.
    """
    with _readable(directory):
        saved = _read_json(directory)
        _check_same(directory, saved["config"]["config"], config, STATE_KEYS, "model")
        _check_same(directory, saved["data"], data, tuple(data), "data")
        return _read(directory, abstract)


def restore_params(directory: Path, abstract: TrainState, config: Mapping[str, Any]) -> Any:
    """Only the parameters of one step directory.

    Raises:
        Mismatch: it is of another model.
    """
    import orbax.checkpoint as ocp

    with _readable(directory), ocp.PyTreeCheckpointer() as checkpointer:
        _check_same(directory, _read_json(directory)["config"]["config"], config, MODEL_KEYS, "model")
        restored = checkpointer.restore(
            (directory / "state").absolute(),
            args=ocp.args.PyTreeRestore(
                item={"params": abstract.params},
                restore_args=ocp.checkpoint_utils.construct_restore_args({"params": abstract.params}),
                partial_restore=True,
            ),
        )
    return restored["params"]


def read_info(directory: Path) -> dict[str, Any]:
    """What was saved beside the weights of one step directory: {"config": resolved keys, "git_commit": ..., ...}.

    Raises:
        OSError: it cannot be read.
    """
    with _readable(directory):
        return _read_json(directory)["config"]


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


def _read(directory: Path, abstract: TrainState) -> TrainState:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((directory / "state").absolute(), abstract)


def _read_json(directory: Path) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return {name: checkpointer.restore((directory / name).absolute()) for name in ("data", "config")}


def _check_same(
    directory: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any], keys: tuple[str, ...], what: str
) -> None:
    different = [key for key in keys if saved.get(key) != wanted[key]]
    if different:
        raise Mismatch(
            f"checkpoint {directory} was made with another {what}:\n  "
            + "\n  ".join(f"{key}: {saved.get(key)!r} there, {wanted[key]!r} here" for key in different)
            + "\nuse the values it was made with, or another run_name for a new run; nothing was changed"
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}"
