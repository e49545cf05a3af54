"""One launch at a time in a run directory."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from MaxText import run_lock
from tests import support

HOLDER = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from MaxText import run_lock
with run_lock.hold(pathlib.Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_one_is_refused_with_the_holders_name_until_the_holder_is_gone(tmp_path: pathlib.Path):
    command = [sys.executable, "-c", HOLDER, str(support.ROOT), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):  # being refused changes nothing
            with pytest.raises(run_lock.RunIsLocked, match=rf"in use by process {holder.pid} on \S+ since 20"):
                run_lock.hold(tmp_path).__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with run_lock.hold(tmp_path), pytest.raises(run_lock.RunIsLocked, match=f"process {os.getpid()} "):
            run_lock.hold(tmp_path).__enter__()


def test_a_directory_that_cannot_be_written_is_said(tmp_path: pathlib.Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write the run directory .*set base_output_directory"):
        run_lock.hold(tmp_path / "file/run").__enter__()
