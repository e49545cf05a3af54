"""What a verdict says and what passes between tests and program; how a tier is chosen. Attacks are in tests/faults."""

import math
import os
import subprocess
import sys

import pytest

from MaxText.evaluation import sandbox, sandbox_cell, sandbox_warden
from MaxText.evaluation.sandbox import Job


def grade(box, program: str, tests: str, **functions: str) -> sandbox.Verdict:
    return box.grade(Job(program, tests, functions or {"f": "f"}))


VALUES = """[
    None, True, False, 0, -1, 1 << 200, 10**5000, 1.5, -0.0, float("inf"), "", "é\\x00\\ud800", b"\\x00\\xff", 1 + 2j,
    [], [1, [2, "3"]], (), (1, (2,), []), {}, {"a": 1, (1, 2): [3], None: {}}, set(), {1, "a"}, frozenset({(1,)}),
]"""


def test_plain_data_arrives_as_it_was_sent(box):
    program = "def f(*values, **names):\n    return values, names\n"
    tests = (
        f"values = {VALUES}\ngot, names = f(*values, a=1)\nassert names == {{'a': 1}}\n"
        "for sent, back in zip(values, got, strict=True):\n"
        "    assert repr(sent) == repr(back) and type(sent) is type(back), (sent, back)\n"
    )
    verdict = grade(box, program, tests)
    assert verdict.passed, verdict.reason


def test_not_a_number_arrives():
    kept: list = []
    assert math.isnan(sandbox_cell.decode(sandbox_cell.encode(math.nan, kept), kept.__getitem__))


def test_subclasses_lose_their_methods(box):
    program = (
        "import collections, enum\nclass Number(int):\n    __eq__ = lambda *_: True\n    __hash__ = int.__hash__\n"
        "class Color(enum.IntEnum):\n    RED = 1\nPoint = collections.namedtuple('Point', 'x y')\n"
        "def f():\n    return Number(7), Color.RED, Point(1, 2), collections.Counter('aab'), bytearray(b'x')\n"
    )
    verdict = grade(box, program, "assert f() == (7, 1, (1, 2), {'a': 2, 'b': 1}, b'x')\nassert f()[0] != 8\n")
    assert verdict.passed, verdict.reason


def test_an_object_can_be_handed_back_but_equals_only_itself(box):
    program = (
        "class Pair:\n    __eq__ = lambda *_: True\n    def __init__(self, a, b):\n        self.a, self.b = a, b\n"
        "def total(pairs):\n    return sum(pair.a + pair.b for pair in pairs)\n"
    )
    tests = "first = Pair(1, 2)\nassert total([first, Pair(3, 4)]) == 10\nassert first != Pair(1, 2) and first != 3\n"
    verdict = grade(box, program, tests, Pair="Pair", total="total")
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize(
    ("raised", "caught"),
    [
        ("ValueError('x y')", "ValueError"),
        ("KeyError(1)", "KeyError"),
        ("UnicodeDecodeError('a', b'', 0, 1, 'z')", "RuntimeError"),
        ("Own('x y')", "RuntimeError"),
    ],
)
def test_tests_can_expect_exceptions(box, raised: str, caught: str):
    program = f"class Own(Exception):\n    pass\ndef f():\n    raise {raised}\n"
    tests = f"try:\n    f()\nexcept {caught}:\n    caught = True\nassert caught\n"
    verdict = grade(box, program, tests)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize(
    ("program", "tests", "reason"),
    [
        ("def f(): return 2\n", "assert f() == 1, 'not one'", "AssertionError: not one"),
        ("def f(): return 1 +\n", "f()", "the program does not parse: SyntaxError"),
        ("x = 1 / 0\n", "f()", "the program raised ZeroDivisionError"),
        ("def g(): pass\n", "f()", "NameError: the program defines no f"),
        ("import os\ndef f(): os._exit(3)\n", "f()", "the program ended itself with status 3"),
        ("import os\ndef f(): os._exit(3)\n", "try:\n    f()\nexcept BaseException: pass", "ended itself"),
        ("def f():\n    while True: pass\n", "f()", "ended by signal 24 (out of processor time)"),
        ("def f():\n    return bytearray(1 << 30)\n", "f()", "MemoryError"),
        ("def f(): return 'x' * (1 << 25)\n", "f()", "more than 16,777,216"),
        ("def f(x): return x\n", "f(len)", "TypeError: a test passes <built-in function len>"),
        ("def f(): return 1\n", "raise SystemExit(0)", "SystemExit: 0"),
        ("def f(): return 1\n", "import os\nos._exit(0)", "the judge ended without a verdict"),
        ("def f(): return 1\n", "def (", "SyntaxError"),
    ],
)
def test_a_failure_says_why(box, program: str, tests: str, reason: str):
    verdict = grade(box, program, tests)
    assert not verdict.passed
    assert reason in verdict.reason


def test_time_is_limited(box):
    limits = sandbox.Limits(cpu_seconds=9, wall_seconds=0.5, memory_bytes=256 << 20)
    with sandbox.Sandbox(box.tier, limits, workers=1) as quick:
        verdict = grade(quick, "import time\ndef f(): time.sleep(9)\n", "f()")
        assert (verdict.passed, verdict.reason) == (False, "no verdict within 0.5 s")
        assert 0.5 <= verdict.seconds < 5
        assert grade(quick, "def f(): return 1\n", "assert f() == 1").passed


def test_printing_disturbs_nobody(box):
    program = (
        "import sys\ndef f():\n    print('x' * 10**6, file=sys.stderr)\n    print('{}', flush=True)\n    return 1\n"
    )
    verdict = grade(box, program, "print('{\"nonce\": 1}', flush=True)\nassert f() == 1\nprint('ok')\n")
    assert verdict.passed, verdict.reason


def test_the_modules_of_a_usual_solution_are_there(box):
    program = (
        "import bisect, collections, copy, dataclasses, datetime, decimal, enum, fractions, functools, hashlib, heapq, "
        "itertools, json, math, operator, random, re, statistics, string, typing\n"
        "@dataclasses.dataclass\nclass Point:\n    x: 'int'\n"
        "def f():\n    return hashlib.md5(b'').hexdigest()[:4], Point(3).x, len(set('abc')), input.__name__\n"
    )
    verdict = grade(box, program, "assert f() == ('d41d', 3, 3, 'input')")
    assert verdict.passed, verdict.reason


def test_equal_programs_have_equal_hashes(box):
    program, order = "def f(): return ''.join({chr(i) for i in range(97, 117)})\n", set()
    for _ in range(4):
        order.add(grade(box, program, "raise ValueError(f())").reason)
    assert len(order) == 1


def with_cell(monkeypatch, box, code: str) -> sandbox.Verdict:
    """The verdict of a warden whose cell is another program."""
    monkeypatch.setattr(sandbox, "_command", lambda tier, limits: [sys.executable, "-S", "-c", code])
    with sandbox.Sandbox(box.tier, box.limits, workers=1) as fresh:
        return fresh.grade(Job("", "", {}))


@pytest.mark.parametrize(
    "line", ['{"nonce": "00000000000000000000000000000000"}', '{"nonce": null}', '{"passed": true}', "[1]", "ok", ""]
)
def test_only_the_nonce_is_a_pass(monkeypatch, box, line: str):
    verdict = with_cell(monkeypatch, box, f"print('sealed')\nprint({line!r})")
    assert (verdict.passed, verdict.reason) == (False, "the judge ended without a verdict")
    right = "import json, sys; print('sealed'); print(json.dumps({'nonce': json.load(sys.stdin)['nonce']}))"
    assert with_cell(monkeypatch, box, right).passed


@pytest.mark.parametrize(
    ("code", "reason"), [("raise OSError('no walls')", "OSError: no walls"), ("", "not built within 20 s")]
)
def test_broken_walls_are_not_the_fault_of_the_program(monkeypatch, box, code: str, reason: str):
    with pytest.raises(RuntimeError, match=f"walls of the sandbox .* do not stand: {reason}"):
        with_cell(monkeypatch, box, code)


def test_walls_that_the_programs_process_cannot_build_are_broken(monkeypatch, box):
    command = sandbox._command(box.tier, box.limits)
    broken = [
        word.replace("        if parent is not None:\n", "        if parent:\n            1 / 0\n") for word in command
    ]
    assert broken != command
    monkeypatch.setattr(sandbox, "_command", lambda tier, limits: broken)
    with (
        sandbox.Sandbox(box.tier, box.limits, workers=1) as fresh,
        pytest.raises(RuntimeError, match="do not stand: .*ProgramEnded"),
    ):
        fresh.grade(Job("", "", {}))


def test_a_process_that_leaves_its_cell_is_found_and_killed(monkeypatch, box):
    escape = (
        "import json, os, time\nreading, writing = os.pipe()\nif os.fork() == 0:\n    os.setsid()\n"
        "    if os.fork() == 0:\n        os.setsid()\n        os.write(writing, str(os.getpid()).encode())\n"
        "        time.sleep(100)\n    os._exit(0)\nos.wait()\n"
        "print('sealed')\nprint(json.dumps({'failure': os.read(reading, 9).decode()}), flush=True)\ntime.sleep(100)\n"
    )
    verdict = with_cell(monkeypatch, box, escape)
    assert verdict.reason.isdecimal() and verdict.seconds < 20
    assert not os.path.exists(f"/proc/{verdict.reason}")


def test_a_file_descriptor_of_ours_is_not_inherited(box, tmp_path):
    with (tmp_path / "open").open("w") as file:
        os.dup2(file.fileno(), 99, inheritable=True)
    try:
        with sandbox.Sandbox(box.tier, box.limits, workers=1) as fresh:
            verdict = grade(fresh, "import os\ndef f(): os.fstat(99)\n", "f()")
    finally:
        os.close(99)
    assert "Bad file descriptor" in verdict.reason


def test_an_unknown_tier_and_no_workers_are_refused():
    with pytest.raises(ValueError, match="sandbox tier 'chroot': use one of bubblewrap, namespaces, landlock, rlimits"):
        sandbox.Sandbox("chroot", sandbox.STANDARD_LIMITS, workers=1)
    with pytest.raises(ValueError, match="a sandbox of 0 workers"):
        sandbox.Sandbox("landlock", sandbox.STANDARD_LIMITS, workers=0)


def test_the_strongest_tier_that_stands_is_taken_and_named(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(sandbox, "unavailable", lambda tier: {"bubblewrap": "no bwrap"}.get(tier))
    assert sandbox.strongest(allow_unsafe=False, log=said.append) == "namespaces"
    assert said == [f"sandbox: {sandbox.TIERS['namespaces']}"]


def test_the_last_tier_must_be_asked_for(monkeypatch):
    monkeypatch.setattr(sandbox, "unavailable", lambda tier: None if tier == "rlimits" else "not here")
    with pytest.raises(ValueError, match="landlock: not here.* ask for the tier rlimits"):
        sandbox.strongest(allow_unsafe=False, log=print)
    said: list[str] = []
    assert sandbox.strongest(allow_unsafe=True, log=said.append) == "rlimits"
    assert "UNSAFE" in said[0]


def test_a_wall_with_a_hole_is_no_tier(monkeypatch, box):
    """The probe runs without the filter of system calls, which is what keeps sockets and processes away."""
    command = sandbox._command("landlock", sandbox.STANDARD_LIMITS)
    pierced = [word.replace("            refuse_system_calls()\n", "            pass\n") for word in command]
    assert pierced != command
    monkeypatch.setattr(sandbox, "_command", lambda tier, limits: pierced)
    reason = sandbox.unavailable("landlock")
    if reason and "landlock" in reason:
        pytest.skip(reason)
    assert reason == "AssertionError: a program uses the network, starts processes"


def test_a_landlock_that_does_not_know_truncation_is_no_tier(monkeypatch, box):
    command = sandbox._command("landlock", sandbox.STANDARD_LIMITS)
    older = [word.replace("system_call(SYS_LANDLOCK_CREATE_RULESET, None, 0, 1)", "2") for word in command]
    assert older != command
    monkeypatch.setattr(sandbox, "_command", lambda tier, limits: older)
    assert "OSError: Landlock's version 2 does not know truncation" in str(sandbox.unavailable("landlock"))


@pytest.mark.parametrize("module", [sandbox_cell, sandbox_warden])
def test_helpers_need_the_standard_library_only(module):
    """-S leaves no other package to be found, and -I not the project."""
    command = [sys.executable, "-I", "-S", "-c", f"exec(compile(open({module.__file__!r}).read(), 'x', 'exec'), {{}})"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stderr == ""
