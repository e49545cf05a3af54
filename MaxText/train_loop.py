"""The whole of training: config -> mesh -> model -> data -> state -> loop.

While the step compiles in a thread, the state is made. Step N is dispatched before the metrics
of step N-1 are fetched, so the device never waits for the host; before anything is saved the step in flight is fetched
and checked, so no checkpoint can hold a value that is not finite.
"""

import contextlib
import gc
import math
import time
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from MaxText import (
    agreement,
    batch_feed,
    checkpoint_space,
    checkpointing,
    corruption,
    goodput,
    metric_logger,
    preemption,
    profiler,
    resume,
    run_record,
    schedule_plan,
    train_report,
    watchdog,
)
from MaxText.aot import executable
from MaxText.evaluation import held_out
from MaxText.input_pipeline import loader
from MaxText.job import Job, lower, make_job
from MaxText.train_report import Console
from MaxText.train_state import TrainState

EXIT_COMPLETE = 0


def open_job(config: FrozenConfigDict, console: Console) -> Job:
    """The job on this machine's devices; says what it is going to be.

    Raises:
        ValueError: the config does not fit the devices.
    """
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


def train(config: FrozenConfigDict, console: Console, stop: preemption.StopSignals, started: float) -> int:
    """Runs or resumes the training that the config describes, in a run directory that is locked; the exit code.

    Args:
        started: the `time.perf_counter()` reading at the process's start.

    Raises:
        ValueError, OSError: the config does not fit the devices, the data or the run directory.
        FloatingPointError: too many updates in a row had to be skipped, or the parameters are not finite.
    """
    ledger = goodput.TimeLedger(started)
    if config.max_run_hours:
        stop.stop_after(config.max_run_hours, ledger.wall())
    if config.jax_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.jax_cache_dir).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    job = open_job(config, console)
    data = loader.open_datasets(config, console.emit)
    console.emit(data.description)
    job, lines = job.settled(data.train.num_windows)
    for line in lines:
        console.emit(line)
    config = job.config
    position = resume.data_position(job, data.train)
    agreement.check_same({"the config": config.to_dict(), "the data": position})
    if config.enable_checkpointing:
        keep, epochs = config.max_num_checkpoints_to_keep, len(_epoch_ends(job, data))
        console.emit(checkpoint_space.check(job.directory, _staging(job), job.abstract_state, keep, epochs))
    loader.check_epochs(config.steps, job.global_batch_size, data.train.num_windows, config.num_epoch)
    with ledger.charge("compile"):
        lowered = lower(job)
    with futures.ThreadPoolExecutor(1) as background, jax.set_mesh(job.mesh):
        compiling = background.submit(executable.load_or_compile, job, lowered)
        run = Run(job, data, position, console, ledger, stop)
        with ledger.charge("restore"):
            state = resume.restore_or_initialize(job, run.checkpointer, position, console.emit)
        if run.is_first_process:
            run_record.write(job, run.info)
        with ledger.charge("compile"):
            compiled, lines = compiling.result()
        for line in lines:
            console.emit(line)
        console.emit(train_report.compiled_memory(compiled))
        gc.freeze()
        gc.enable()
        return run.loop(compiled, state)


class Run:
    """One launch: the loop and what it reports, evaluates and saves."""

    def __init__(
        self,
        job: Job,
        data: loader.Datasets,
        position: dict[str, Any],
        console: Console,
        ledger: goodput.TimeLedger,
        stop: preemption.StopSignals,
    ):
        config = job.config
        self.job, self.data, self.console, self.ledger, self.stop = job, data, console, ledger, stop
        self.is_first_process = jax.process_index() == 0
        self.metrics = metric_logger.MetricLogger(
            job.directory,
            enable_tensorboard=config.enable_tensorboard,
            emit=console.emit,
            records=self.is_first_process,
        )
        self.info = train_report.run_info(config, data, job.tokens_per_step, str(Path(__file__).parent))
        self.epoch_ends = _epoch_ends(job, data)
        self.info["epoch_ends"] = self.epoch_ends
        self.position = position
        self.checkpointer = checkpointing.Checkpointer(
            job.directory / "checkpoints",
            self.info,
            keep=config.max_num_checkpoints_to_keep,
            asynchronous=config.async_checkpointing,
            staging=_staging(job),
        )
        self.timer = goodput.StepTimer()
        self.goodput = goodput.RunRecord(job.directory / "goodput" if self.is_first_process else None, ledger)
        self.watchdog = watchdog.Watchdog(job.directory, 60 * config.hang_timeout_minutes, self._described)
        self.stop_together = agreement.StopTogether(job.mesh)
        self.checker = corruption.Checker(job.mesh, job.abstract_state) if config.sdc_check_interval else None
        self.step = self.saved = 0  # the newest step dispatched, and the newest saved or being saved
        self.feed: batch_feed.BatchFeed | None = None
        self.last: dict[str, float] = {}  # the newest value of every metric
        self.skipped = self.skipped_in_a_row = 0
        self.gave_up = False  # the last evaluation; the next launch makes up for it
        self.hopeless = ""  # why to stop after so many skipped updates
        self.peak_flops: float | None = None  # of a device; found after the first step
        self.held_out: held_out.HeldOut | None = None
        if data.evaluation is not None and config.eval_interval > 0:
            self.held_out = held_out.HeldOut(config, job.mesh, job.model, job.abstract_state, data)

    def loop(self, compiled: jax.stages.Compiled, state: TrainState) -> int:
        """Trains to the last step, or until it is asked to stop; saves at the end."""
        config = self.job.config
        first = int(state.step)
        with self.stop.saving(), self.watchdog:
            try:
                if self._evaluation_is_missing(first) and not self._evaluate(first, state.params):
                    self._abandon()
                    return preemption.EXIT_RESUME
                if first >= config.steps:
                    done = f"The run is complete: {first:,} steps are done"
                    self.console.emit(f"{done}; raise steps={config.steps} to train on")
                    self._abandon()
                    return EXIT_COMPLETE
                step = self._steps(compiled, state, first)
                self._close(step, step - first)
                if self.hopeless:
                    raise FloatingPointError(self.hopeless)
            except BaseException:
                self._abandon()
                raise
        complete = step == config.steps and not self.gave_up
        return EXIT_COMPLETE if complete else preemption.EXIT_RESUME

    def _steps(self, compiled: jax.stages.Compiled, state: TrainState, first: int) -> int:
        """Takes the steps after `first`, with what is due between them; the last step taken."""
        config, ledger = self.job.config, self.ledger
        profile = profiler.Profiler(
            self.job.directory / "tensorboard",
            enabled=config.profiler == "xplane",
            first=config.skip_first_n_steps_for_profiler,
            steps=config.profiler_steps,
        )
        feed = self.feed = batch_feed.BatchFeed(self.job, self.data.train, first)
        in_flight: tuple[int, dict[str, jax.Array]] | None = None
        step = self.step = self.saved = first
        last = False
        with contextlib.closing(profile):
            while not last:
                batch = self._next_batch(feed)
                if batch is not None:
                    profile.before_step(step - first)
                    with ledger.charge("step"):
                        if in_flight is None:
                            self.timer.resume()
                        if self.checker is not None and (step + 1) % config.sdc_check_interval == 0:
                            state, metrics = self._checked_step(self.checker, compiled, state, batch, step + 1)
                        else:
                            state, metrics = compiled(state, batch)
                        if in_flight is not None:
                            self._fetch(*in_flight)
                        step = self.step = step + 1
                        in_flight = (step, metrics)
                request = self.stop.requested  # read once: it may come at any time
                if self.stop_together(bool(request)):
                    stopping = request = request or "another process was asked to stop"
                else:
                    stopping, request = self.hopeless, ""
                self.checkpointer.check()
                self.goodput.update(first, step)
                last = bool(stopping) or step == config.steps
                evaluate = self._evaluation_is_due(step) and not stopping
                save = last or step % config.checkpoint_period == 0 or step in self.epoch_ends
                if in_flight is not None and (step == first + 1 or last or evaluate or save):
                    with ledger.charge("step"):
                        self._fetch(*in_flight)
                    in_flight = None
                if step == first + 1:
                    self.console.start_bar(step, config.steps)
                if request:
                    self.console.emit(f"{request}: stopping after step {step:,}; once more to stop at once")
                if save:
                    self._save(state, step)
                if evaluate and not self._evaluate(step, state.params):
                    self._save(state, step)
                    last = True
        return step

    def _next_batch(self, feed: batch_feed.BatchFeed) -> dict[str, jax.Array] | None:
        """The next batch; None where a request to stop came first."""
        try:
            with self.ledger.charge("data wait"), self.stop.may_give_up():
                return next(feed)
        except preemption.Stopped:
            return None

    def _fetch(self, step: int, arrays: dict[str, jax.Array]) -> None:
        """Waits for a step's metrics, checks them, and reports them where that is due."""
        metrics = {name: float(value) for name, value in jax.device_get(arrays).items()}
        self.watchdog.alive(self.timer.completed())
        if not math.isfinite(metrics["learning/param_norm"]):
            raise FloatingPointError(
                f"step {step}: param_norm={metrics['learning/param_norm']}, the parameters are not finite any more. "
                "Nothing was saved after it; the same command resumes from the last checkpoint in "
                f"{self.checkpointer.directory}. A lower learning_rate or gradient_clipping_threshold may help"
            )
        self.last |= metrics
        skipped = bool(metrics["optim/step_skipped"])
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row == self.job.config.max_skipped_steps_in_a_row:
            self.hopeless = (
                f"step {step}: {self.skipped_in_a_row} updates in a row were skipped, as many as "
                "max_skipped_steps_in_a_row; the parameters are those before the first of them. To go on from an older "
                "checkpoint move the newer ones away; a lower learning_rate or gradient_clipping_threshold may help"
            )
        first = self.peak_flops is None
        if step % self.job.config.log_period == 0 or first or skipped or step == self.job.config.steps:
            self._report(step, metrics)
        if skipped:
            measured = f"loss={metrics['learning/loss']:.4g}, raw_grad_norm={metrics['learning/raw_grad_norm']:.4g}"
            self.console.emit(f"step {step}: update skipped, {self.skipped} in this launch: {measured}")
        if first:  # after its line, as it may have to be measured
            self.peak_flops, source = train_report.peak_flops(self.job.config, self.job.mesh.local_devices)
            self.console.emit(f"MFU is measured against {self.peak_flops / 1e12:.3f} TFLOP/s per device: {source}")
        self.console.step(metrics["learning/loss"])

    def _checked_step(
        self, checker: corruption.Checker, compiled: jax.stages.Compiled, state: TrainState, batch: Any, step: int
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        begin = time.perf_counter()
        done = checker.step(compiled, state, batch)
        seconds = time.perf_counter() - begin
        self.console.emit(f"step {step}: taken twice in {seconds:.3f} s, the same bits on every device")
        return done

    def _described(self) -> str:
        """What the run is doing, for whoever finds it hanging."""
        feed = self.feed
        batches = f"{feed.made} batches made, {feed.taken} taken" if feed is not None else "no batches yet"
        return f"step {self.step:,} was the last one begun, now in: {self.ledger.current}; {batches}"

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

    def _evaluation_is_due(self, step: int) -> bool:
        config = self.job.config
        return self.held_out is not None and (step == config.steps or step % config.eval_interval == 0)

    def _evaluation_is_missing(self, first: int) -> bool:
        """Whether the launch before this one saved step `first`, but was stopped in its evaluation."""
        if first == 0 or not self._evaluation_is_due(first):
            return False
        return agreement.from_first_process(lambda: not self.metrics.has_evaluation(first)) == 1

    def _save(self, state: TrainState, step: int) -> None:
        """Saves the checked state after `step`, once."""
        if self.job.config.enable_checkpointing and step > self.saved:
            with self.ledger.charge("save"), self.watchdog.longer():
                self.checkpointer.save(state, step, self.position)
            self.saved = step

    def _evaluate(self, step: int, params: Any) -> bool:
        """Evaluates; False where a request to stop made it give up."""
        assert self.held_out is not None
        try:
            with self.ledger.charge("compile"), self.watchdog.longer():
                self.held_out.compile(params, self.stop.wait_for)
            with self.ledger.charge("eval"), self.watchdog.longer(), self.stop.may_give_up():
                metrics = self.held_out(params, self.watchdog.alive)
        except preemption.Stopped:
            self.gave_up = True
            self.console.emit(f"{self.stop.requested}: the evaluation after step {step:,} was given up")
            return False
        self.last |= metrics
        self.metrics.evaluation(step, metrics)
        return True

    def _close(self, step: int, steps: int) -> None:
        """Waits for the last save, and says what was done and where it is."""
        config, directory = self.job.config, self.job.directory
        if config.enable_checkpointing:
            with self.ledger.charge("save"), self.watchdog.longer():
                self.checkpointer.close()
        self.metrics.close()
        self.console.close()
        for line in train_report.closing(self.ledger.seconds(), steps, steps * self.job.tokens_per_step, self.last):
            self.console.emit(line)
        self.goodput.update(step - steps, step, now=True)
        if self.is_first_process:
            self.console.emit(train_report.goodput_line(self.goodput.total()))
        if self.skipped:
            self.console.emit(f"{self.skipped} updates skipped, as their loss or gradient was not finite or a spike")
        if config.enable_checkpointing:
            self.console.emit(f"Checkpoint: {directory / 'checkpoints' / str(step)}")
        self.console.emit(f"Metrics: {self.metrics.jsonl}")
        if config.enable_tensorboard:
            self.console.emit(f"TensorBoard: tensorboard --logdir {self.metrics.tensorboard}")
        if step < config.steps:
            then = "the same command resumes" if config.enable_checkpointing else "nothing was saved, as asked"
            self.console.emit(f"Stopped after step {step:,} of {config.steps:,}; {then}")

    def _abandon(self) -> None:
        """Lets a save under way finish and flushes what there is, whatever happened."""
        for close in (self.checkpointer.close, self.metrics.close, self.console.close):
            with contextlib.suppress(Exception):
                close()


def _epoch_ends(job: Job, data: loader.Datasets) -> list[int]:
    """The steps at the end of a pass over the data, if those are to be kept."""
    config, windows = job.config, data.train.num_windows
    keeps = config.checkpoint_every_epoch
    return schedule_plan.epoch_ends(config.steps, job.global_batch_size, windows) if keeps else []


def _staging(job: Job) -> Path | None:
    folder = job.config.checkpoint_staging_directory
    return checkpoint_space.staging_place(Path(folder), job.directory) if folder else None
