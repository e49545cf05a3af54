"""SIGTERM, Ctrl-C and the end of max_run_hours in every phase: saved, exit code 75; a second signal ends it at once."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from MaxText import checkpoint_manifest, checkpointing, preemption, train_loop
from MaxText.evaluation import held_out
from tests import support
from tests.faults import training


def slowly(function, at_call: int):
    """The function; its `at_call`th call is interrupted by a signal, and takes a minute unless it is given up."""
    calls = 0

    def slow(*args, **keys):
        nonlocal calls
        calls += 1
        if calls == at_call:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return function(*args, **keys)

    return slow


def stopped_after(console: training.Lines) -> int:
    return int(re.search(r"Stopped after step (\d+) of 12; the same command resumes", "\n".join(console.lines))[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_between_steps(tmp_path, number):
    console = training.Lines(lambda line: line.startswith("completed step: 3,") and os.kill(os.getpid(), number))
    assert training.train(tmp_path, console) == 75
    step = stopped_after(console)
    assert 3 <= step <= 5 and training.saved_steps(tmp_path) == [step]
    again = training.Lines()
    assert training.train(tmp_path, again, log_period=2) == 0
    assert f"Resuming after step {step} " in again
    assert "Changed since it was saved: log_period 1 -> 2" in again
    assert training.saved_steps(tmp_path)[-1] == 12


def test_while_waiting_for_data(tmp_path, monkeypatch):
    monkeypatch.setattr(
        train_loop.batch_feed.BatchFeed, "__next__", slowly(train_loop.batch_feed.BatchFeed.__next__, 5)
    )
    console = training.Lines()
    begin = time.monotonic()
    assert training.train(tmp_path, console) == 75
    assert time.monotonic() - begin < 30
    assert stopped_after(console) == 4 and training.saved_steps(tmp_path) == [4]


@pytest.mark.parametrize("phase", ["compile", "evaluate"])
def test_in_an_evaluation(tmp_path, monkeypatch, phase):
    """What was to be evaluated is saved, and the evaluation given up."""
    if phase == "compile":
        real = held_out.HeldOut.compile

        def compile_slowly(self, params, wait_for):
            def slow(compile_step):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)

            real(self, params, lambda compile_step: wait_for(lambda: slow(compile_step)))

        monkeypatch.setattr(held_out.HeldOut, "compile", compile_slowly)
        monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 3)))
    else:
        monkeypatch.setattr(held_out.HeldOut, "__call__", slowly(held_out.HeldOut.__call__, 1))
    console = training.Lines()
    assert training.train(tmp_path, console, eval_interval=4) == 75
    assert "the evaluation after step 4 was given up" in console
    assert stopped_after(console) == 4 and training.saved_steps(tmp_path) == [4]


def test_while_saving(tmp_path, monkeypatch):
    real = checkpointing.Checkpointer.save

    def save(self, *args, **keys):
        real(self, *args, **keys)
        if len(training.saved_steps(tmp_path)) <= 1 and not stop:
            stop.append(os.kill(os.getpid(), signal.SIGTERM))

    stop = []
    monkeypatch.setattr(checkpointing.Checkpointer, "save", save)
    console = training.Lines()
    assert training.train(tmp_path, console, checkpoint_period=3) == 75
    assert training.saved_steps(tmp_path)[-1] == stopped_after(console) <= 4


def test_the_end_of_max_run_hours(tmp_path):
    console = training.Lines()
    code = training.train(tmp_path, console, steps=10**6, max_run_hours=4 / 3600)
    assert code == 75
    assert "max_run_hours=0.00111111: " in console


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_in_a_finalizer_is_not_lost():
    """Python throws away what is raised there."""

    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)

    begin = time.monotonic()
    with preemption.StopSignals() as stop, stop.saving():
        with pytest.raises(preemption.Stopped), stop.may_give_up():
            held = Finalized()
            del held
            time.sleep(30)
        time.sleep(0.3)  # nothing comes any more
    assert time.monotonic() - begin < 5


def test_a_request_before_a_block_that_may_be_given_up_is_not_lost():
    with preemption.StopSignals() as stop, stop.saving():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)  # for the thread that reads the signals
        with pytest.raises(preemption.Stopped), stop.may_give_up():
            pytest.fail("the block was begun")
        assert stop.requested == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is not stop._on_signal


# Runs train.py with one function replaced: it says where it is and never returns.
DRIVER = """
import hashlib, runpy, sys
sys.path.insert(0, {root!r})
{replacement}
sys.argv = sys.argv[1:]
sys.path[0] = {package!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
STUCK = {
    # In the main thread, inside one call of C code: no Python handler can run.
    "starting": """
from MaxText import resume
def stuck(*_):
    print("STUCK", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)
resume.restore_or_initialize = stuck
""",
    # In the middle of the second checkpoint, before it is vouched for.
    "saving": """
from MaxText import checkpoint_manifest
def stuck(directory, step, write=checkpoint_manifest.write):
    if step > 1:
        print("STUCK", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)
    write(directory, step)
checkpoint_manifest.write = stuck
""",
    "data": """
import threading
from MaxText import batch_feed
def stuck(self, calls=[], real=batch_feed.BatchFeed.__next__):
    calls.append(1)
    if len(calls) == 6:
        print("STUCK", flush=True)
        threading.Event().wait()
    return real(self)
batch_feed.BatchFeed.__next__ = stuck
""",
    "": "",
}


def launched(tmp_path: pathlib.Path, environment: dict[str, str], where: str, **keys) -> subprocess.Popen:
    program = DRIVER.format(root=str(support.ROOT), package=str(support.ROOT / "MaxText"), replacement=STUCK[where])
    cache = support.ROOT / ".pytest_cache/jax_stopping"
    given = support.SMALL | training.KEYS | {"base_output_directory": tmp_path, "run_name": "run"}
    given |= {"jax_cache_dir": cache} | keys
    config = [str(support.ROOT / "configs/base.yml"), *(f"{key}={value}" for key, value in given.items())]
    command = [sys.executable, "-c", program, str(support.ROOT / "MaxText/train.py"), *config]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment | {"JAX_PLATFORMS": "cpu"}, cwd="/", **streams)


def stuck_process(tmp_path: pathlib.Path, environment: dict[str, str], where: str, **keys) -> subprocess.Popen:
    process = launched(tmp_path, environment, where, **keys)
    for line in process.stdout:
        if line == "STUCK\n":
            return process
    pytest.fail("it ended by itself")


def test_before_there_is_anything_to_save_it_ends_at_once(tmp_path, user_environment):
    with stuck_process(tmp_path, user_environment, "starting") as process:
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert process.wait(20) == 75
        assert time.monotonic() - begin < 2
        assert "SIGTERM: there is nothing to save; the same command goes on" in process.stdout.read()


def test_a_second_signal_ends_it_in_two_seconds(tmp_path, user_environment):
    keys = {"checkpoint_period": 1, "async_checkpointing": "false"}
    with stuck_process(tmp_path, user_environment, "saving", **keys) as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert process.wait(20) == 128 + signal.SIGTERM
        assert time.monotonic() - begin < 2
    assert checkpoint_manifest.steps_in(tmp_path / "run/checkpoints") == [1]
    checkpoint_manifest.verify(tmp_path / "run/checkpoints/1")


def test_a_run_that_waits_for_data_for_ever_is_ended_and_goes_on(tmp_path, user_environment):
    keys = {"checkpoint_period": 4, "hang_timeout_minutes": 0.05}
    with stuck_process(tmp_path, user_environment, "data", **keys) as process:
        assert process.wait(60) == 75
        said = process.stdout.read()
    assert "HANG: no sign of life for " in said and "in: data wait" in said
    (report,) = (tmp_path / "run").glob("hang-*.txt")
    assert "in stuck" in report.read_text()
    with launched(tmp_path, user_environment, "", **keys) as process:
        said = process.stdout.read()
    assert process.returncode == 0 and "Resuming after step 4 " in said, said
