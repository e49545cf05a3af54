"""Trains a model: python MaxText/train.py configs/validate_10m.yml [key=value ...]; --help lists every key."""

import contextlib
import gc
import logging
import os
import signal
import sys
import time
from typing import Any

if __spec__ is None:  # run as a file: its folder is on the path, where the project's root must be
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main(argv: list[str]) -> int:
    """The exit code: 0 complete, 75 stopped by a signal and resumable, 1 failed, 2 a config that cannot be."""
    started = time.perf_counter()
    gc.disable()  # until the first step: starting makes many objects and hardly any garbage
    from MaxText import preemption, processes, pyconfig, run_lock, schedule_plan

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        command = pyconfig.parse_command_line(argv, os.environ)
    except pyconfig.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if command.message is not None:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `--help | head` ends in peace
        print(command.message)
        return 0
    assert command.config is not None
    with preemption.StopSignals() as stop, contextlib.ExitStack() as held:
        try:
            mine = processes.find(os.environ)
            if mine.index == 0 and not command.dry_run:  # before JAX is imported: a second launch is refused at once
                held.enter_context(run_lock.hold(schedule_plan.run_directory(command.config)))
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return run(command.config, command.dry_run, mine, stop, started)


def run(config: Any, dry_run: bool, mine: Any, stop: Any, started: float) -> int:
    """Trains, or says what training would be; the exit code."""
    import jax

    from MaxText import agreement, preemption, pyconfig, train_loop, train_report

    console = train_report.Console(quiet=mine.index > 0)
    stop.alone = mine.count == 1
    try:
        agreement.join(mine)
        if dry_run:
            return train_loop.dry_run(config, console)
        code = train_loop.train(config, console, stop, started)
        agreement.leave()
        return code
    except pyconfig.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (ValueError, OSError, ArithmeticError, jax.errors.JaxRuntimeError) as error:
        console.close()
        print(f"error: {error}", file=sys.stderr)
        if agreement.is_lost_process(error):
            print("another process of the run is gone; the same command resumes", file=sys.stderr)
            return preemption.EXIT_RESUME
        return 1


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    if exit_code:  # a compilation, or a collective without its other half, cannot be stopped: not waited for
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
