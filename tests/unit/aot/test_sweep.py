"""The sweep over variants: what it compiles, what it keeps, how it ranks; the compiler itself is not run."""

import json
import subprocess

import pytest

from MaxText.aot import compile as aot_compile
from MaxText.aot import executable, sweep
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
    refused = {"error": "2 errors in the config:   one   two", "exit_code": 2}
    assert sweep._compiled(arguments, {"remat_policy": "full"}) == refused
    assert commands[0][2:] == ["x.yml", "steps=3", "sweep=", "compiled_trainstep_file=", "remat_policy=full"]


def test_what_was_killed_is_tried_again_and_what_is_kept_is_whole(tmp_path, monkeypatch):
    codes = [-9, 1]
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, codes.pop(0), stdout="", stderr="")
    )
    config, lines = support.small_config(sweep="per_device_batch_size=2"), []
    for _ in range(3):
        assert sweep.run(config, ["x.yml"], tmp_path, 1, lines.append) == 1
    assert not codes
    tried = [line for line in lines if "ended" in line]
    assert "ended by signal 9, to be tried again" in tried[0]
    assert all("the compiler ended with code 1" in line for line in tried[1:])
    assert {path.name for path in tmp_path.iterdir()} == {"per_device_batch_size=2.json", "sweep.svg"}


def test_a_kill_while_a_result_is_written_leaves_none(tmp_path, monkeypatch):
    def half(path, text):
        path.write_bytes(text[: len(text) // 2].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "_compiled", lambda *_: report(1.0, 1))
    monkeypatch.setattr(sweep.Path, "write_text", half)
    config = support.small_config(sweep="per_device_batch_size=2")
    with pytest.raises(KeyboardInterrupt):
        sweep.run(config, ["x.yml"], tmp_path, 1, lambda line: None)
    monkeypatch.undo()
    monkeypatch.setattr(sweep, "_compiled", lambda *_: report(1.0, 1))
    assert sweep.run(config, ["x.yml"], tmp_path, 1, lambda line: None) == 0


def test_results_hang_on_the_versions_and_the_commit_and_not_on_the_list_of_values(monkeypatch):
    digest = aot_compile.sweep_digest(support.small_config(sweep="per_device_batch_size=2"))
    assert digest == aot_compile.sweep_digest(support.small_config(sweep="per_device_batch_size=2,4"))
    assert digest != aot_compile.sweep_digest(support.small_config(steps=21))
    monkeypatch.setattr(executable, "versions", lambda: "jax 9.9")
    assert digest != aot_compile.sweep_digest(support.small_config())


def test_auto_splits_the_weights_over_one_slice(monkeypatch):
    seen = []
    monkeypatch.setattr(sweep, "run", lambda config, arguments, folder, devices, emit: seen.append(devices) or 0)
    slices = {"compile_topology": "v5e-8", "compile_topology_num_slices": 2, "dcn_data_parallelism": 2}
    aot_compile.run(support.small_config(sweep="auto", **slices), [], print)
    assert seen == [8]
