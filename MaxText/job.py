"""What a config means on a set of devices, before anything is allocated or compiled: mesh, model, abstract state.

Training takes this machine's devices; compiling for another machine takes that machine's.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import FrozenConfigDict

from MaxText import config_rules, flops, models, pyconfig, schedule_plan, sharding, train_state, train_step
from MaxText.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class Job:
    """A config with its mesh, its model and the shapes and shardings of its state."""

    config: FrozenConfigDict
    mesh: jax.sharding.Mesh
    model: models.AbstractModel
    abstract_state: TrainState
    global_batch_size: int

    @property
    def tokens_per_step(self) -> int:
        """Positions in one step's batch."""
        return self.global_batch_size * self.config.max_target_length

    @property
    def directory(self) -> Path:
        """The run directory."""
        return schedule_plan.run_directory(self.config)

    def settled(self, num_windows: int | None) -> tuple["Job", list[str]]:
        """The job with a number for all that its config leaves to arithmetic, and that arithmetic in words.

        Args:
            num_windows: sequences in one pass over the training data; None where no data is at hand.

        Raises:
            ValueError: the data is smaller than one batch, or a branch does not start in the stable phase.
        """
        config, lines = schedule_plan.settled(
            self.config,
            num_parameters=flops.count_parameters(self.abstract_state.params).total,
            num_windows=num_windows,
            global_batch_size=self.global_batch_size,
        )
        return dataclasses.replace(self, config=config), lines


def make_job(config: FrozenConfigDict, devices: Sequence[jax.Device]) -> Job:
    """The mesh over the devices, and the abstract model and state. Sets JAX's precision of float32 products.

    Raises:
        ValueError: the config does not fit the devices.
    """
    problems = config_rules.mesh_problems(config, len(devices))
    if problems:
        raise pyconfig.ConfigError(problems)
    precision = None if config.matmul_precision == "default" else config.matmul_precision
    jax.config.update("jax_default_matmul_precision", precision)
    sizes = [config[f"ici_{axis}_parallelism"] for axis in sharding.MESH_AXES]
    mesh = sharding.make_mesh(sizes, devices, config_rules.slices(config))
    model = models.abstract(config)
    abstract = train_state.abstract_train_state(config, model, mesh)
    rows = config.per_device_batch_size * mesh.size * config.gradient_accumulation_steps
    return Job(config, mesh, model, abstract, rows)


def trace(job: Job) -> jax.stages.Traced:
    """The training step of the job, traced for its mesh."""
    step = train_step.make_train_step(job.config, job.model, job.abstract_state, job.mesh)
    batch = train_step.abstract_batch(job.global_batch_size, job.config.max_target_length, job.mesh)
    with jax.set_mesh(job.mesh):
        return step.trace(job.abstract_state, batch)


def lower(job: Job) -> jax.stages.Lowered:
    """The training step of the job, lowered for its mesh."""
    with jax.set_mesh(job.mesh):
        return trace(job).lower()
