"""The whole of a preparation: the same bytes whatever happens on the way, and data that the trainer reads."""

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from MaxText.preparation import preparing, tasks
from tests.unit.preparation.conftest import BASE, content_of

KILLS = int(os.environ.get("PREPARE_KILLS", "2"))  # 50 in the long version
PROGRAM = """
import sys
from MaxText import pyconfig
from MaxText.input_pipeline import inputs
from MaxText.preparation import preparing
if __name__ == "__main__":
    inputs.UNIT_BYTES = 100_000
    sys.exit(preparing.prepare(pyconfig.initialize(sys.argv[1:], {}), print))
"""


@pytest.fixture
def source(texts, tmp_path):
    """Some 60 files, with duplicates among them."""
    folder = tmp_path / "source"
    folder.mkdir()
    changed = [text.replace("def ", "def  ") for text in texts]
    for number, text in enumerate([*texts, *changed, *texts[:9]]):
        (folder / f"{number:03d}.py").write_text(text)
    return f"dir:{folder}"


@pytest.mark.slow
def test_the_number_of_workers_does_not_matter(source, prepare, tmp_path):
    settings = {"source": source, "unit_bytes": 100_000, "near_duplicate_threshold": 0.7}
    assert prepare(**settings, out=tmp_path / "one")[0] == 0
    assert prepare(**settings, out=tmp_path / "two", prepare_workers=2)[0] == 0
    one = content_of(tmp_path / "one")
    assert one == content_of(tmp_path / "two")
    assert len([name for name in one if name.startswith("train/tokens")]) > 3
    report = json.loads((tmp_path / "one/report.json").read_text())
    assert report["dropped"]["duplicate"] == 9 and report["dropped"]["near_duplicate"] > 20


def test_it_says_how_far_it_is_and_how_long_it_will_take(source, prepare, monkeypatch):
    """By a clock that is ten seconds later at each look."""
    monkeypatch.setattr(preparing, "time", types.SimpleNamespace(monotonic=itertools.count(0.0, 10.0).__next__))
    _, lines = prepare(source=source, unit_bytes=100_000)
    pattern = r"scan: (\d+) of (\d+) units, ([\d,]+) of about ([\d,]+) MB, ([\d.]+) MB/s, about ([\d,]+) s left"
    told = [[float(part.replace(",", "")) for part in match.groups()] for l in lines if (match := re.match(pattern, l))]
    finished, units, read, total, _, left = zip(*told, strict=True)
    assert len(told) > 3 and len(set(units)) == len(set(total)) == 1
    assert finished[0] == 0 and finished[-1] >= units[0] - 1 and list(finished) == sorted(finished)
    assert list(read) == sorted(read) and read[-1] == total[0]
    elapsed = 10 * len(told)
    assert left[0] > elapsed / 2 and left[-1] < elapsed / 4


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on(source, prepare, tmp_path, tokenizer_path, user_environment):
    """Kills the whole preparation, workers included, at random times; what is there at the end is what should be."""
    assert prepare(source=source, unit_bytes=100_000, out=tmp_path / "whole")[0] == 0
    (tmp_path / "program.py").write_text(PROGRAM)
    keys = {"run_name": "x", "vocab_size": 512, "tokenizer_path": tokenizer_path, "prepare_workers": 2}
    keys |= {"out": tmp_path / "out", "held_out_one_in": 4, "decontaminate": "", "near_duplicate_threshold": 0}
    command = [sys.executable, str(tmp_path / "program.py"), BASE, *(f"{k}={v}" for k, v in keys.items())]
    root = str(Path(BASE).parent.parent)
    options = {"env": {**user_environment, "PYTHONPATH": root}, "cwd": tmp_path, "text": True}
    rng = random.Random(0)
    for _ in range(KILLS):
        process = subprocess.Popen([*command, f"source={source}"], stdout=subprocess.PIPE, **options)
        assert process.stdout is not None
        process.stdout.readline()  # the work begins here
        time.sleep(rng.uniform(0, 4))
        process.kill()
        process.communicate()
        if (tmp_path / "out/report.json").is_file():
            assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")
            shutil.rmtree(tmp_path / "out")
    finished = subprocess.run([*command, f"source={source}"], capture_output=True, timeout=120, **options)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


@pytest.mark.parametrize("task", ["scan", "encode"])
def test_what_is_done_is_not_done_again(task, source, prepare, tmp_path, monkeypatch):
    assert prepare(source=source, unit_bytes=100_000, out=tmp_path / "whole")[0] == 0
    done = []
    real = tasks.TASKS[task]

    def fails_at_two(workplace, number, report):
        if number == 2:
            raise RuntimeError("the disk is on fire")
        done.append(number)
        real(workplace, number, report)

    monkeypatch.setitem(tasks.TASKS, task, fails_at_two)
    code, lines = prepare(source=source, unit_bytes=100_000)
    assert code == 1 and 2 not in done and len(done) > 2
    assert any("UNIT 2 FAILED: RuntimeError: the disk is on fire" in line for line in lines)
    monkeypatch.setitem(tasks.TASKS, task, lambda *args: (done.append("again"), real(*args)))
    code, lines = prepare(source=source, unit_bytes=100_000)
    assert code == 0 and done.count("again") == 1
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")
    code, lines = prepare(source=source, unit_bytes=100_000)
    assert code == 0 and "is complete already" in lines[-1]
    with pytest.raises(ValueError, match="holds data of another source or other settings"):
        prepare(source=source, unit_bytes=100_000, syntax_check="off")


DEADLY = """
import os, signal, sys
from pathlib import Path
from MaxText.preparation import pool, tasks

def scan(workplace, number, report):
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    report(number)

tasks.TASKS["scan"] = scan  # workers import this file too
if __name__ == "__main__":
    done = []
    place = tasks.Workplace(Path("x"), Path("x"))
    failures = pool.run("scan", [0, 1, 2, 3], place, 2, lambda size: None, done.append)
    assert sorted(done) == [0, 2, 3], done
    print(failures)
"""


EARLY_DEATH = """
import os
from pathlib import Path
from MaxText.preparation import pool, tasks

tasks.TASKS["scan"] = lambda workplace, number, report: report(number)
if __name__ == "__main__":
    done = []
    failures = pool.run("scan", [0, 1, 2], tasks.Workplace(Path("x"), Path("x")), 2, lambda size: None, done.append)
    assert len(done) == 2, done
    print(list(failures.values()))
else:
    try:
        Path("one").touch(exist_ok=False)
        os._exit(3)
    except FileExistsError:
        pass
"""


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (DEADLY, "{1: 'its process ended with exit code -9; is memory short?'}\n"),
        (EARLY_DEATH, "['its process ended with exit code 3; is memory short?']\n"),  # before it has read its task
    ],
)
def test_a_worker_that_dies_is_replaced(program, said, tmp_path, user_environment):
    (tmp_path / "program.py").write_text(program)
    environment = {**user_environment, "PYTHONPATH": str(Path(BASE).parent.parent)}
    command = [sys.executable, str(tmp_path / "program.py")]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stdout == said, result.stderr


def test_a_second_preparation_is_kept_out(source, prepare, tmp_path):
    with preparing._alone(tmp_path / "out"), pytest.raises(ValueError, match="being prepared by another process"):
        prepare(source=source)


def test_a_tokenizer_is_trained_when_none_is_given(source, prepare, tmp_path):
    code, lines = prepare(source=source, tokenizer_path="")
    assert code == 0 and any("training a byte-level BPE of 512" in line for line in lines)
    manifest = json.loads((tmp_path / "out/train/manifest.json").read_text())
    assert manifest["vocab_size"] == 512 and manifest["special_ids"]["fim_prefix"] == 2


def test_settings_that_will_not_do(source, prepare, tmp_path):
    with pytest.raises(ValueError, match="both are needed, such as source=dir:src"):
        prepare(source="")
    with pytest.raises(ValueError, match="has 500 entries, more than vocab_size - vocab_padding = 300"):
        prepare(source=source, vocab_size=300)
    with pytest.raises(ValueError, match="lower held_out_one_in=1000000"):
        prepare(source=source, held_out_one_in=1_000_000)
    with pytest.raises(ValueError, match=r"no document is left of 63: .*license_unknown"):
        prepare(source=source, licenses="mit", held_out_one_in=0, out=tmp_path / "other")


def test_files_of_a_repository_are_one_document(texts, prepare, tmp_path, documents_in):
    from tests.unit.preparation.test_sources import write

    source = write("jsonl", tmp_path / "source", texts)
    assert prepare(source=source, repositories="true", held_out_one_in=0, unit_bytes=60_000)[0] == 0
    documents = documents_in(tmp_path / "out/train")
    assert len(documents) == 3
    for document in documents:
        name, _, rest = document.removeprefix("<|repo_name|>").partition("<|file_sep|>")
        expected = [(f"p{i}.py", text) for i, text in enumerate(texts) if f"a/r{i % 3}" == name]
        assert expected and rest == "<|file_sep|>".join(f"{path}\n{text}" for path, text in expected)


def test_the_split_keeps_repositories_whole(texts, prepare, tmp_path, documents_in):
    from tests.unit.preparation.test_sources import write

    source = write("jsonl", tmp_path / "source", texts)
    assert prepare(source=source, repositories="true", held_out_one_in=2)[0] == 0
    names = [
        {document.partition("<|file_sep|>")[0] for document in documents_in(tmp_path / "out" / part)}
        for part in ("train", "heldout")
    ]
    assert names[0] and names[1] and not names[0] & names[1]


STAND_IN = """
import pickle
_started = []
def is_initialized(): return bool(_started)
def init(**options): _started.append(options); assert options["num_cpus"] == 3
def remote(**options):
    assert options == {"num_cpus": 1, "max_retries": 3}
    class Remote:
        def __init__(self, function): self.function = pickle.dumps(function)
        def remote(self, *arguments): return pickle.dumps((self.function, arguments))
    return Remote
def wait(references): return references[-1:], references[:-1]
def get(reference):
    function, arguments = pickle.loads(reference)
    return pickle.loads(function)(*arguments)
"""


def test_ray_gives_the_same_bytes(source, prepare, tmp_path, monkeypatch):
    """By a stand-in that does the tasks in another order; docs/decisions.md tells of the real one."""
    settings = {"source": source, "unit_bytes": 100_000}
    with pytest.raises(ValueError, match="prepare_engine=ray needs Ray: pip install ray"):
        prepare(**settings, prepare_engine="ray")
    assert prepare(**settings, out=tmp_path / "whole")[0] == 0
    (tmp_path / "ray.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, lines = prepare(**settings, prepare_engine="ray", prepare_workers=3)
    assert code == 0, lines
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")
    monkeypatch.setitem(tasks.TASKS, "scan", lambda workplace, number, report: 1 / 0)
    code, lines = prepare(**settings, prepare_engine="ray", prepare_workers=3, out=tmp_path / "other")
    assert code == 1 and any("FAILED: ZeroDivisionError: division by zero" in line for line in lines)


def test_unfinished_work_of_others_is_not_deleted(source, prepare, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(tasks.TASKS, "encode", lambda *args: 1 / 0)
        assert prepare(source=source)[0] == 1
    (work,) = (tmp_path / "out").glob(".work-*")
    with pytest.raises(ValueError, match=rf"{work.name} holds unfinished work with other settings: repeat the command"):
        prepare(source=source, syntax_check="off")
    assert (work / "scan/00000.json").is_file()
    assert prepare(source=source)[0] == 0


@pytest.mark.parametrize("inside", ["tokenizer", "tokenizer/deep"])
def test_a_tokenizer_that_would_be_overwritten_is_refused(inside, source, prepare, tmp_path, tokenizer_path):
    mine = tmp_path / "out" / inside
    shutil.copytree(tokenizer_path, mine)
    with pytest.raises(ValueError, match=r"lies in .*out/tokenizer, which a preparation writes anew; move it"):
        prepare(source=source, tokenizer_path=mine)
    assert content_of(mine) == content_of(Path(tokenizer_path))


def test_out_is_no_bucket(source, prepare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"out=gs://bucket/x: must be a folder of a disk or of a mounted bucket"):
        prepare(source=source, out="gs://bucket/x")
    assert not (tmp_path / "gs:").exists()


def test_what_a_killed_encoding_left_is_removed(source, prepare, tmp_path, monkeypatch):
    assert prepare(source=source, out=tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setitem(tasks.TASKS, "encode", lambda *args: 1 / 0)
        assert prepare(source=source)[0] == 1
    (tmp_path / "out/train").mkdir()
    for name in ("train/tokens-00000.4711.tmp", "report.json.4711.tmp"):
        (tmp_path / "out" / name).write_text("half")
    assert prepare(source=source)[0] == 0
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


def test_killed_just_before_the_end_nothing_is_left_over(source, prepare, tmp_path, monkeypatch):
    assert prepare(source=source, out=tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(preparing.shutil, "rmtree", lambda folder, **_: 1 / 0 if ".work" in folder.name else None)
        with pytest.raises(ZeroDivisionError):
            prepare(source=source)
    assert prepare(source=source)[0] == 0
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"work": "x"}'])
def test_the_report_of_another_program_is_refused(content, source, prepare, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.json").write_text(content)
    with pytest.raises(ValueError, match=r"report.json, which no preparation wrote|holds data of another source"):
        prepare(source=source)


def test_ray_gets_whole_paths_and_the_result_holds_none(source, prepare, tmp_path, monkeypatch):
    assert prepare(source=source, out=tmp_path / "whole", tokenizer_path="")[0] == 0
    monkeypatch.chdir(tmp_path)
    real, places = tasks.TASKS["scan"], []
    monkeypatch.setitem(tasks.TASKS, "scan", lambda place, *rest: (places.append(place), real(place, *rest)))
    code, lines = prepare(source=source, out="relative", tokenizer_path="")
    assert code == 0 and "grain_train_files=relative/train" in lines[-1]
    assert places[0].folder.is_absolute() and places[0].out == tmp_path / "relative"
    assert content_of(tmp_path / "relative") == content_of(tmp_path / "whole")
