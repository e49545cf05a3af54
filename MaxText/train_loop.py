"""The whole of training: config -> mesh -> model -> data -> state -> loop.

While the step compiles in a thread, the state is made. Step N is dispatched before the metrics
of step N-1 are fetched, so the device never waits for the host; before anything is saved the step in flight is fetched
and checked, so no checkpoint can hold a value that is not finite.
"""

import contextlib
import dataclasses
import gc
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from MaxText import (
    checkpointing,
    goodput,
    hf_directory,
    metric_logger,
    preemption,
    profiler,
    pyconfig,
    schedule_plan,
    sharding,
    train_report,
    train_state,
)
from MaxText.evaluation import held_out
from MaxText.input_pipeline import device, loader
from MaxText.job import Job, lower, make_job
from MaxText.train_report import Console
from MaxText.train_state import TrainState

EXIT_COMPLETE = 0
EXIT_RESUME = 75  # stopped by a signal after saving; the same command continues


def open_job(config: FrozenConfigDict, console: Console) -> Job:
    """The job on this machine's devices; says what it is going to be.

    Raises:
        ValueError: the config does not fit the devices.
    """
    if jax.process_count() > 1:
        raise ValueError(f"there are {jax.process_count()} processes; this version trains on the devices of one")
    job = make_job(config, jax.devices())
    for line in train_report.opening(config, job.mesh, job.abstract_state, job.tokens_per_step):
        console.emit(line)
    return job


def dry_run(config: FrozenConfigDict, console: Console) -> int:
    """Says all that a run would say before its first step, and compiles the step; allocates and writes nothing."""
    job = open_job(config, console)
    description, num_windows = loader.describe(config)
    console.emit(description)
    job, lines = job.settled(num_windows)
    for line in lines:
        console.emit(line)
    console.emit(f"Checkpoints, metrics and TensorBoard would go to {job.directory}")
    console.emit(train_report.compiled_memory(lower(job).compile()))
    console.emit("Dry run: nothing was written")
    return EXIT_COMPLETE


def train(config: FrozenConfigDict, console: Console, started: float) -> int:
    """Runs or resumes the training that the config describes; the result is the process's exit code.

    Args:
        started: the `time.perf_counter()` reading at the process's start.

    Raises:
        ValueError, OSError: the config does not fit the devices, the data or the run directory.
        FloatingPointError: the loss or the gradient is not finite; nothing was saved after that.
    """
    ledger = goodput.TimeLedger(started)
    if config.jax_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.jax_cache_dir).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    job = open_job(config, console)
    _make_run_directory(job)
    data = loader.open_datasets(config, console.emit)
    console.emit(data.description)
    job, lines = job.settled(data.train.num_windows)
    for line in lines:
        console.emit(line)
    config = job.config
    loader.check_epochs(config.steps, job.global_batch_size, data.train.num_windows, config.num_epoch)
    with ledger.charge("compile"):
        lowered = lower(job)
    with futures.ThreadPoolExecutor(1) as background, jax.set_mesh(job.mesh):
        compiling = background.submit(lowered.compile)
        run = Run(job, data, console, ledger)
        with ledger.charge("restore"):
            state = run.restore_or_initialize()
        _write_run_record(job, run.info)
        with ledger.charge("compile"):
            compiled = compiling.result()
        console.emit(train_report.compiled_memory(compiled))
        gc.freeze()
        gc.enable()
        return run.loop(compiled, state)


class Run:
    """One launch: the loop and what it reports, evaluates and saves."""

    def __init__(self, job: Job, data: loader.Datasets, console: Console, ledger: goodput.TimeLedger):
        config = job.config
        self.job, self.data, self.console, self.ledger = job, data, console, ledger
        self.metrics = metric_logger.MetricLogger(
            job.directory, enable_tensorboard=config.enable_tensorboard, emit=console.emit
        )
        self.info = train_report.run_info(config, data, job.tokens_per_step, str(Path(__file__).parent))
        self.epoch_ends = (
            schedule_plan.epoch_ends(config.steps, job.global_batch_size, data.train.num_windows)
            if config.checkpoint_every_epoch
            else []
        )
        self.checkpointer = checkpointing.Checkpointer(
            job.directory / "checkpoints",
            self.info,
            keep=config.max_num_checkpoints_to_keep,
            keep_always=self.epoch_ends,
            asynchronous=config.async_checkpointing,
        )
        self.timer = goodput.StepTimer()
        self.last: dict[str, float] = {}  # the newest value of every metric
        self.peak_flops: float | None = None  # of a device; found after the first step
        self.held_out: held_out.HeldOut | None = None
        if data.evaluation is not None and config.eval_interval > 0:
            self.held_out = held_out.HeldOut(config, job.mesh, job.model, job.abstract_state, data)

    def restore_or_initialize(self) -> TrainState:
        """The state to go on from: this run's newest checkpoint, else the one the config names, else a fresh one."""
        job, config, resolved = self.job, self.job.config, self.info["config"]
        if config.enable_checkpointing:
            state = self.checkpointer.restore_newest(job.abstract_state, self.data_position())
            if state is not None:
                self.console.emit(f"Resuming after step {int(state.step):,} from {self.checkpointer.directory}")
                return state
        start = config.load_full_state_path
        if config.branch_decay_from != -1:
            start = schedule_plan.branch_start(config)
        if start:
            path = Path(start).expanduser()
            self.console.emit(f"Starting from the full state in {path}")
            return checkpointing.restore_step(path, job.abstract_state, resolved, self.data_position())
        state = train_state.initial_train_state(config, job.abstract_state)
        if config.load_parameters_path:
            path = Path(config.load_parameters_path).expanduser()
            self.console.emit(f"Starting from the weights in {path}")
            if hf_directory.is_one(path):
                params = hf_directory.read(path, config, job.abstract_state.params)
                params = jax.device_put(params, train_state.shardings(job.abstract_state).params)
            else:
                params = checkpointing.restore_params(path, job.abstract_state, resolved)
            state = dataclasses.replace(state, params=params)
        return state

    def data_position(self) -> dict[str, Any]:
        """What, with the step, determines every batch to come; a resumed run must have the same."""
        config = self.job.config
        return {
            "dataset": self.data.train.identity,
            "data_shuffle_seed": config.data_shuffle_seed if config.enable_data_shuffling else -1,
            "max_target_length": config.max_target_length,
            "global_batch_size": self.job.global_batch_size,
        }

    def loop(self, compiled: jax.stages.Compiled, state: TrainState) -> int:
        """Trains to the last step, or until a signal; saves at the end."""
        config = self.job.config
        first = int(state.step)
        if first >= config.steps:
            self.console.emit(f"The run is complete: {first:,} steps are done; raise steps={config.steps} to train on")
            return EXIT_COMPLETE
        with preemption.StopSignals() as stop:
            try:
                step = self._steps(compiled, state, first, stop)
                self._close(step, step - first)
            except BaseException:
                self._abandon()
                raise
        return EXIT_COMPLETE if step == config.steps else EXIT_RESUME

    def _steps(self, compiled: jax.stages.Compiled, state: TrainState, first: int, stop: preemption.StopSignals) -> int:
        """Takes the steps after `first`, with what is due between them; the last step taken."""
        config, ledger = self.job.config, self.ledger
        profile = profiler.Profiler(
            self.job.directory / "tensorboard",
            enabled=config.profiler == "xplane",
            first=config.skip_first_n_steps_for_profiler,
            steps=config.profiler_steps,
        )
        batches = self._batches(first)
        in_flight: tuple[int, dict[str, jax.Array]] | None = None
        with contextlib.closing(profile):
            for step in range(first + 1, config.steps + 1):
                with ledger.charge("data wait"):
                    batch = next(batches)
                profile.before_step(step - first - 1)
                with ledger.charge("step"):
                    if in_flight is None:
                        self.timer.resume()
                    state, metrics = compiled(state, batch)
                    if in_flight is not None:
                        self._fetch(*in_flight)
                    in_flight = (step, metrics)
                signal_name = stop.requested  # read once: it may come at any time
                last = step == config.steps or bool(signal_name)
                evaluate = self.held_out is not None and (step == config.steps or step % config.eval_interval == 0)
                due = last or step % config.checkpoint_period == 0 or step in self.epoch_ends
                save = config.enable_checkpointing and due
                if step == first + 1 or last or evaluate or save:
                    with ledger.charge("step"):
                        self._fetch(*in_flight)
                    in_flight = None
                if step == first + 1:
                    self.console.start_bar(step, config.steps)
                if signal_name:
                    self.console.emit(f"{signal_name}: stopping after step {step:,}; once more to stop at once")
                if evaluate:
                    self._evaluate(step, state.params)
                if save:
                    with ledger.charge("save"):
                        self.checkpointer.save(state, step, self.data_position())
                if last:
                    return step
        raise AssertionError("unreachable: the last step returns")

    def _batches(self, first: int) -> Iterator[dict[str, jax.Array]]:
        """The batches of all steps to come; the first is made at once and used while reading ahead starts."""
        config = self.job.config
        where = sharding.batch_sharding(self.job.mesh)

        def make(step: int) -> dict[str, jax.Array]:
            return device.global_batch(self.data.train, step, self.job.global_batch_size, where)

        yield make(first)
        yield from loader.read_ahead(
            make,
            first + 1,
            config.steps - first - 1,
            num_threads=config.grain_worker_count,
            buffer_size=config.grain_prefetch_buffer_size,
        )

    def _fetch(self, step: int, arrays: dict[str, jax.Array]) -> None:
        """Waits for a step's metrics, checks them, and reports them where that is due."""
        metrics = {name: float(value) for name, value in jax.device_get(arrays).items()}
        self.timer.completed()
        checked = {name: metrics[f"learning/{name}"] for name in ("loss", "raw_grad_norm", "param_norm")}
        if not all(map(math.isfinite, checked.values())):
            raise FloatingPointError(
                f"step {step}: {', '.join(f'{name}={value}' for name, value in checked.items())}. "
                "Nothing was saved after it; the same command resumes from the last checkpoint in "
                f"{self.checkpointer.directory}. A lower learning_rate or gradient_clipping_threshold may help"
            )
        self.last |= metrics
        first = self.peak_flops is None
        if step % self.job.config.log_period == 0 or first or step == self.job.config.steps:
            self._report(step, metrics)
        if first:  # after its line, as it may have to be measured
            self.peak_flops, source = train_report.peak_flops(self.job.config, self.job.mesh.local_devices)
            self.console.emit(f"MFU is measured against {self.peak_flops / 1e12:.3f} TFLOP/s per device: {source}")
        self.console.step(metrics["learning/loss"])

    def _report(self, step: int, metrics: dict[str, float]) -> None:
        config = self.job.config
        seconds = self.timer.lap()
        tokens_per_second = self.job.tokens_per_step / self.job.mesh.size / seconds
        flops_per_second = tokens_per_second * train_report.model_flops_per_token(config)
        self.metrics.train(
            step,
            metrics
            | {
                "perf/step_time_seconds": seconds,
                "perf/per_device_tflops_per_sec": flops_per_second / 1e12,
                "perf/per_device_tokens_per_sec": tokens_per_second,
            }
            | ({} if self.peak_flops is None else {"perf/mfu": flops_per_second / self.peak_flops}),
        )

    def _evaluate(self, step: int, params: Any) -> None:
        assert self.held_out is not None
        with self.ledger.charge("compile"):
            self.held_out.compile(params)
        with self.ledger.charge("eval"):
            metrics = self.held_out(params)
        self.last |= metrics
        self.metrics.evaluation(step, metrics)

    def _close(self, step: int, steps: int) -> None:
        """Waits for the last save, and says what was done and where it is."""
        config, directory = self.job.config, self.job.directory
        if config.enable_checkpointing:
            with self.ledger.charge("save"):
                self.checkpointer.close()
        self.metrics.close()
        self.console.close()
        for line in train_report.closing(self.ledger.seconds(), steps, steps * self.job.tokens_per_step, self.last):
            self.console.emit(line)
        if config.enable_checkpointing:
            self.console.emit(f"Checkpoint: {directory / 'checkpoints' / str(step)}")
        self.console.emit(f"Metrics: {self.metrics.jsonl}")
        if config.enable_tensorboard:
            self.console.emit(f"TensorBoard: tensorboard --logdir {self.metrics.tensorboard}")
        if step < config.steps:
            then = "the same command resumes" if config.enable_checkpointing else "nothing was saved, as asked"
            self.console.emit(f"Stopped after step {step:,} of {config.steps:,}; {then}")

    def _abandon(self) -> None:
        """Lets a save under way finish and flushes what there is, whatever went wrong."""
        for close in (self.checkpointer.close, self.metrics.close, self.console.close):
            with contextlib.suppress(Exception):
                close()


def _make_run_directory(job: Job) -> None:
    """Makes the run directory and tries it; changes nothing in one that is there.

    Raises:
        OSError: it cannot be written, or is too small for a checkpoint.
    """
    directory = job.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OSError(
            f"cannot write the run directory {directory}: {error}; set base_output_directory to one that can be written"
        ) from error
    if job.config.enable_checkpointing:
        checkpointing.check_free_space(directory, job.abstract_state)


def _write_run_record(job: Job, info: dict[str, Any]) -> None:
    """Writes what the run is, once it is certain that it belongs to this directory."""
    files = {"config.yml": pyconfig.to_yaml(job.config), "environment.json": json.dumps(info, indent=1) + "\n"}
    for name, text in files.items():
        partial = job.directory / f".{name}.partial"
        partial.write_text(text)
        partial.replace(job.directory / name)
    _copy_tokenizer(Path(info["tokenizer"]).expanduser(), job.directory / "tokenizer")


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Keeps the tokenizer with the run, if it is a directory or a file and not the name of one on the hub."""
    if target.exists() or not source.exists() or source == Path():
        return
    partial = target.with_name(".tokenizer.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if source.is_dir():
        shutil.copytree(source, partial)
    else:
        partial.mkdir()
        shutil.copy(source, partial)
    partial.rename(target)
