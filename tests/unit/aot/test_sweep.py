"""The sweep over variants: what it compiles, what it keeps, how it ranks; the compiler itself is not run."""

import json
import subprocess

import pytest

from MaxText.aot import sweep
from tests import support


def report(speed, peak, fits=True):
    return {
        "estimated_tokens_per_second_per_device": speed,
        "estimated_mfu": 0.4,
        "memory": {"fits": fits, "peak": peak},
    }


def test_every_combination_is_a_variant():
    config = support.small_config(sweep="remat_policy=none,full;per_device_batch_size=4,8")
    assert sweep.variants(config, 1) == [
        {"remat_policy": remat, "per_device_batch_size": rows} for remat in ("none", "full") for rows in ("4", "8")
    ]


def test_auto_tries_data_against_fsdp_where_there_are_devices():
    config = support.small_config(sweep="auto")
    assert {v["per_device_batch_size"] for v in sweep.variants(config, 1)} == {"4", "8", "16"}
    meshes = {(v["ici_data_parallelism"], v["ici_fsdp_parallelism"]) for v in sweep.variants(config, 8)}
    assert meshes == {("-1", "1"), ("-1", "8")}


@pytest.mark.parametrize("text", ["remat_policy", "no_such_key=1", "remat_policy=none,,full"])
def test_a_sweep_that_cannot_be_read_is_refused_in_words(text):
    with pytest.raises(ValueError, match="is not KEY=VALUE,VALUE with a key of base.yml"):
        sweep.variants(support.small_config(sweep=text), 1)


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path, monkeypatch):
    config = support.small_config(sweep="per_device_batch_size=2,4,8")
    found = {"2": report(10.0, 2**30), "4": report(30.0, 2**31, fits=False), "8": {"error": "refused"}}
    compiled, lines = [], []

    def compile_one(arguments, overrides):
        rows = overrides["per_device_batch_size"]
        compiled.append(rows)
        if len(compiled) == 2:
            raise KeyboardInterrupt
        return found[rows]

    monkeypatch.setattr(sweep, "_compiled", compile_one)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(config, ["x.yml"], tmp_path / "sweep", 1, lines.append)
    assert sweep.run(config, ["x.yml"], tmp_path / "sweep", 1, lines.append) == 0
    assert compiled == ["2", "4", "4", "8"]
    assert lines[-1] == "The best, ready to paste: per_device_batch_size=2"
    ranked = [line for line in lines if "  per_device_batch_size=" in line]
    assert [line.split("=")[1] for line in ranked] == ["2", "4", "8: refused"]
    assert "does not fit" in ranked[1]
    picture = (tmp_path / "sweep" / "sweep.svg").read_text()
    assert picture.count("<rect") == 1
    assert json.loads((tmp_path / "sweep" / "per_device_batch_size=8.json").read_text()) == {"error": "refused"}


def test_when_nothing_fits_the_exit_code_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_compiled", lambda arguments, overrides: {"error": "out of memory"})
    config = support.small_config(sweep="per_device_batch_size=2")
    assert sweep.run(config, ["x.yml"], tmp_path / "sweep", 1, lambda line: None) == 1


def test_a_variant_replaces_what_the_command_line_said(monkeypatch):
    commands = []
    ended = subprocess.CompletedProcess([], 2, stdout="", stderr="2 errors in the config:\n  one\n  two\n  three\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command) or ended)
    arguments = ["x.yml", "sweep=remat_policy=none,full", "remat_policy=minimal", "steps=3"]
    assert sweep._compiled(arguments, {"remat_policy": "full"}) == {"error": "2 errors in the config:   one   two"}
    assert commands[0][2:] == ["x.yml", "steps=3", "sweep=", "compiled_trainstep_file=", "remat_policy=full"]
