"""The file of results: what is kept, what a kill in the middle of a line does, and what is refused."""

import json
import pathlib

import pytest

from MaxText.evaluation.results import Results, summarize

HEADER = {"task": "t", "stop": ("\n",), "limits": {"cpu_seconds": 1}}


def record(problem: str, sample: int, passed: bool = True) -> dict:
    return {"problem": problem, "sample": sample, "scores": {"pass": passed}, "completion": "é", "reason": ""}


def write(path: pathlib.Path, *records: dict) -> None:
    with Results(path, HEADER) as results:
        for item in records:
            results.add(item)


def test_records_are_found_again(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    write(path, record("a", 0), record("a", 1, False))
    with Results(path, HEADER) as results:
        assert results.records == {("a", 0): record("a", 0), ("a", 1): record("a", 1, False)}
        results.add(record("b", 0))
    assert [json.loads(line).get("problem") for line in path.read_text().splitlines()] == [None, "a", "a", "b"]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_cut_short_is_dropped_and_the_file_goes_on(tmp_path, cut: int):
    path = tmp_path / "results.jsonl"
    write(path, record("a", 0), record("a", 1))
    path.write_bytes(path.read_bytes()[:-cut])
    with Results(path, HEADER) as results:
        assert list(results.records) == [("a", 0)]
        results.add(record("a", 1))
    with Results(path, HEADER) as results:
        assert list(results.records) == [("a", 0), ("a", 1)]


def test_a_header_cut_short_is_an_empty_file(tmp_path):
    path = tmp_path / "results.jsonl"
    write(path)
    path.write_bytes(path.read_bytes()[:-3])
    write(path, record("a", 0))
    assert len(path.read_text().splitlines()) == 2


def test_a_damaged_line_is_refused_by_name(tmp_path):
    path = tmp_path / "results.jsonl"
    write(path, record("a", 0), record("a", 1))
    path.write_bytes(path.read_bytes().replace(b'"sample": 0', b'"sample": '))
    with pytest.raises(ValueError, match=r"results.jsonl is damaged .*; delete it"):
        Results(path, HEADER)


def test_other_settings_are_refused_and_named(tmp_path):
    path = tmp_path / "results.jsonl"
    write(path, record("a", 0))
    with pytest.raises(ValueError, match=r"other settings \(temperature: None, now 0.2\)"):
        Results(path, HEADER | {"temperature": 0.2})


def test_two_processes_do_not_write_one_file(tmp_path):
    path = tmp_path / "results.jsonl"
    with Results(path, HEADER), pytest.raises(ValueError, match="is being written by another process"):
        Results(path, HEADER)
    write(path)


def test_a_summary_takes_means_over_problems():
    passed = {"a": [True] * 10, "b": [True] + [False] * 9, "c": [False] * 10}
    records = [record(name, i, value) for name, values in passed.items() for i, value in enumerate(values)]
    for item in records:
        item["scores"]["syntax_valid"] = item["problem"] != "c"
    summary = summarize(records, 10)
    assert summary["pass@1"] == pytest.approx((1 + 0.1 + 0) / 3)
    assert summary["pass@10"] == pytest.approx(2 / 3)
    assert summary["syntax_valid"] == pytest.approx(2 / 3)
    assert summary["pass@10_standard_error"] == pytest.approx(1 / 3)
    assert set(summary) == {
        name + error for name in ("pass@1", "pass@10", "syntax_valid") for error in ("", "_standard_error")
    }


def test_a_summary_of_one_problem_has_no_error():
    summary = summarize([record("a", 0), record("a", 1, False)], 2)
    assert summary == {"pass@1": 0.5}


def test_an_incomplete_problem_has_no_summary():
    with pytest.raises(ValueError, match="b has 1 samples instead of 2"):
        summarize([record("a", 0), record("a", 1), record("b", 0)], 2)
