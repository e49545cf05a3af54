"""A run that hangs is ended, and says where."""

import subprocess
import sys

import pytest

from MaxText import watchdog
from tests import support

# The main thread waits for ever: first after signs of life, or holding the interpreter itself.
HANGS = """
import pathlib, sys, threading, time
sys.path.insert(0, sys.argv[1])
from MaxText import watchdog
doing = lambda: "step 7, in: data wait; 3 batches made, 3 taken"
with watchdog.Watchdog(pathlib.Path(sys.argv[2]), 0.5, doing) as watched:
    for _ in range(5):
        watched.alive(0.01)
        time.sleep(0.2)
    def a_function_that_hangs():
        {hang}
    a_function_that_hangs()
"""


def hung(tmp_path, hang: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HANGS.format(hang=hang), str(support.ROOT), str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def test_a_hang_is_ended_with_stacks_and_can_be_resumed(tmp_path):
    done = hung(tmp_path, "time.sleep(60)")
    assert done.returncode == 75
    assert "HANG: no sign of life for " in done.stderr and "step 7, in: data wait; 3 batches made" in done.stderr
    (report,) = tmp_path.glob("hang-*.txt")
    assert "a_function_that_hangs" in report.read_text() and "step 7" in report.read_text()


def test_even_where_the_interpreter_itself_is_held(tmp_path):
    done = hung(tmp_path, "import re; re.match('(a*)*b', 'a' * 99)")
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "a_function_that_hangs" in done.stderr


def test_what_is_usual_decides(tmp_path):
    watched = watchdog.Watchdog(tmp_path, 300.0, lambda: "")
    assert watched.limit() == 300
    for _ in range(10):
        watched.alive(60.0)
    watched.alive(10_000.0)  # one slow step changes nothing
    assert watched.limit() == 20 * 60
    with watched.longer():
        assert watched.limit() == 6 * 20 * 60
    assert watched.limit() == 20 * 60


def test_nothing_is_watched_before_the_first_sign_of_life_nor_if_it_is_switched_off(tmp_path):
    waits = "import time; time.sleep(1.2)"
    program = HANGS.split("    for _")[0] + f"    {waits}\n"
    command = [sys.executable, "-c", program, str(support.ROOT), str(tmp_path)]
    assert subprocess.run(command, timeout=30).returncode == 0
    with watchdog.Watchdog(tmp_path, 0.0, pytest.fail) as watched:
        watched.alive(0.0)
