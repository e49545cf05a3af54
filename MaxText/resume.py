"""Where a run goes on: its newest good checkpoint, else the one the config names, else a fresh state."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from MaxText import checkpointing, config_changes, hf_directory, schedule_plan, train_state
from MaxText.input_pipeline import loader
from MaxText.job import Job
from MaxText.train_state import TrainState


def data_position(job: Job, dataset: loader.Dataset) -> dict[str, Any]:
    """What, with the step, determines every batch to come; a resumed run must have the same."""
    config = job.config
    return {
        "dataset": dataset.identity,
        "data_shuffle_seed": config.data_shuffle_seed if config.enable_data_shuffling else -1,
        "max_target_length": config.max_target_length,
        "global_batch_size": job.global_batch_size,
    }


def restore_or_initialize(
    job: Job, checkpointer: checkpointing.Checkpointer, position: Mapping[str, Any], emit: Callable[[str], None]
) -> TrainState:
    """The state to go on from; says which.

    Raises:
        config_changes.Mismatch: a checkpoint is of another model, or of other data than `position` says.
        OSError: it cannot be read.
    """
    config, resolved = job.config, job.config.to_dict()
    allowed = config.allow_config_change.replace(",", " ").split()
    if config.enable_checkpointing:
        state = checkpointer.restore_newest(job.abstract_state, position, allowed)
        if state is not None:
            emit(f"Resuming after step {int(state.step):,} from {checkpointer.directory}")
            changes = config_changes.described(checkpointer.saved_config(int(state.step)), resolved)
            if changes:
                emit(f"Changed since it was saved: {changes}")
            return state
    start = config.load_full_state_path
    if config.branch_decay_from != -1:
        start = schedule_plan.branch_start(config)
    if start:
        path = Path(start).expanduser()
        emit(f"Starting from the full state in {path}")
        return checkpointing.restore_step(path, job.abstract_state, resolved, position, allowed)
    state = train_state.initial_train_state(config, job.abstract_state)
    if config.load_parameters_path:
        path = Path(config.load_parameters_path).expanduser()
        emit(f"Starting from the weights in {path}")
        if hf_directory.is_one(path):
            params = hf_directory.read(path, config, job.abstract_state.params)
            params = jax.device_put(params, train_state.shardings(job.abstract_state).params)
        else:
            params = checkpointing.restore_params(path, job.abstract_state, resolved)
        state = dataclasses.replace(state, params=params)
    return state
