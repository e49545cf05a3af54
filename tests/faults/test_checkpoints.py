"""Checkpoints that are damaged, half written or not written at all: noticed, named, and the newest good one is used."""

import json
import os
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest

from MaxText import checkpoint_manifest, checkpoint_report, checkpoint_space, checkpointing
from tests import support

DATA = {"dataset": "synthetic"}
CONFIG = support.small_config(skip_step_on_spikes=True)


def checkpointer(directory: pathlib.Path, keep: int = 5, staging: pathlib.Path | None = None):
    return checkpointing.Checkpointer(
        directory / "checkpoints", {"config": CONFIG.to_dict()}, keep=keep, asynchronous=True, staging=staging
    )


@pytest.fixture(scope="module")
def trainer() -> support.Trainer:
    return support.Trainer(CONFIG, support.mesh_of(1, 2, 1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, trainer) -> tuple[pathlib.Path, dict[int, object]]:
    """A directory with steps 1, 2 and 3, and the states that were saved."""
    directory, states = tmp_path_factory.mktemp("saved"), {}
    saver = checkpointer(directory)
    for step in (1, 2, 3):
        trainer(support.packed_batch(CONFIG, rows=4, seed=step))
        saver.save(trainer.state, step, DATA)
        states[step] = jax.device_get(trainer.state)
    saver.close()
    return directory, states


@pytest.fixture
def copy(saved, tmp_path) -> pathlib.Path:
    shutil.copytree(saved[0] / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


def restored(directory: pathlib.Path, trainer: support.Trainer, **keys):
    return checkpointer(directory, **keys).restore_newest(trainer.abstract, DATA)


def assert_same(state, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)


def test_what_is_restored_is_what_was_saved(saved, trainer):
    directory, states = saved
    assert checkpointer(directory).steps() == [3, 2, 1]
    assert_same(restored(directory, trainer), states[3])
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["1", "2", "3"]


def flip_a_bit(path: pathlib.Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


MUTATIONS = {
    "truncate": lambda path, rng: os.truncate(path, rng.integers(path.stat().st_size)),
    "flip a bit": flip_a_bit,
    "delete": lambda path, _: path.unlink(),
    "empty": lambda path, _: os.truncate(path, 0),
    "bad JSON": lambda path, _: path.write_text('{"format": 1, "files": '),
    "other JSON": lambda path, _: path.write_text('{"format": 1, "files": {}, "step": 3, "sha256": "0"}'),
    "append": lambda path, _: path.write_bytes(path.read_bytes() + b"\0"),
    "an empty directory instead": lambda path, _: (path.unlink(), path.mkdir()),
    "another name": lambda path, _: path.rename(path.with_name("other")),
    "a file too many": lambda path, _: path.with_name("extra").touch(),
}


def test_two_hundred_mutations_are_all_found_and_named(copy):
    """Every kind of damage to files of every kind, twenty times each."""
    rng = np.random.default_rng(0)
    step = copy / "checkpoints/3"
    files = sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)
    untouched = copy / "untouched"
    shutil.copytree(step, untouched)
    hit = set()
    for number in range(200):
        kind = list(MUTATIONS)[number % len(MUTATIONS)]
        path = files[rng.integers(len(files))]
        MUTATIONS[kind](path, rng)
        with pytest.raises(checkpoint_manifest.Damaged) as caught:
            checkpoint_manifest.verify(step)
        assert path.name in str(caught.value) or "extra" in str(caught.value), kind
        hit.add(path.relative_to(step).parts[0])
        shutil.rmtree(step)
        shutil.copytree(untouched, step)
    assert hit == {"state", "config.json", "data.json", "manifest.json"}
    checkpoint_manifest.verify(step)


@pytest.mark.parametrize("kind", ["flip a bit", "delete", "no manifest", "empty directory"])
def test_the_newest_good_one_is_used_and_the_damaged_are_moved_aside(copy, trainer, saved, caplog, kind):
    for step in (3, 2):
        directory = copy / f"checkpoints/{step}"
        largest = max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        if kind == "no manifest":
            (directory / "manifest.json").unlink()
        elif kind == "empty directory":
            shutil.rmtree(directory)
            directory.mkdir()
        else:
            MUTATIONS[kind](largest, np.random.default_rng(0))
    assert_same(restored(copy, trainer), saved[1][1])
    assert "checkpoint 3 cannot be read, trying an older one" in caplog.text
    assert {path.name.split("-")[0] for path in (copy / "checkpoints_damaged").iterdir()} == {"2", "3"}
    assert checkpointer(copy).steps() == [1]


def test_where_none_is_whole_nothing_is_touched(copy, trainer):
    for step in (1, 2, 3):
        (copy / f"checkpoints/{step}/config.json").unlink()
    with pytest.raises(OSError, match=r"none of the checkpoints \[3, 2, 1\] in .* can be read; nothing was changed"):
        restored(copy, trainer)
    assert checkpointer(copy).steps() == [3, 2, 1]


def test_what_a_kill_leaves_behind_is_no_checkpoint_and_goes_with_the_next_save(copy, trainer, saved):
    shutil.copytree(copy / "checkpoints/3", copy / "checkpoints/.writing-4")
    (copy / "checkpoints/.deleting-1").mkdir()
    (copy / "checkpoints/9").symlink_to(copy / "checkpoints/3")
    state = restored(copy, trainer)
    assert_same(state, saved[1][3])
    saver = checkpointer(copy)
    saver.save(state, 4, DATA)
    saver.close()
    assert saver.steps() == [4, 3, 2, 1]
    assert not list((copy / "checkpoints").glob(".*"))


def test_a_save_that_fails_in_the_background_is_an_error_soon_and_never_the_newest(copy, trainer, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device")

    saver = checkpointer(copy, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_manifest, "write", fails)
        saver.save(trainer.state, 4, DATA)
        saver._background.submit(lambda: None).result()  # when it is its turn, the save has ended
    with pytest.raises(OSError, match=r"could not be written .*No space left.* Checkpoints \[3, 2, 1\] are whole"):
        saver.check()
    saver.save(trainer.state, 5, DATA)
    saver.close()
    assert saver.steps() == [5]


def test_a_disk_with_room_for_one_keeps_a_whole_checkpoint_at_every_moment(tmp_path, trainer, saved, monkeypatch):
    """The copy to the run's directory is cut short, after the old checkpoint had to make room for the new one."""
    staging = tmp_path / "scratch/run"
    saver = checkpointer(tmp_path, keep=1, staging=staging)
    saver.save(trainer.state, 1, DATA)
    saver.wait()
    assert (tmp_path / "checkpoints/1").is_dir() and not list(staging.iterdir())

    full = types.SimpleNamespace(free=0)
    monkeypatch.setattr(checkpointing.shutil, "disk_usage", lambda _: full)
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.shutil, "copytree", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        saver.save(trainer.state, 2, DATA)
        with pytest.raises(OSError, match=r"killed.*Checkpoints \[2\] are whole"):
            saver.wait()
    assert not list((tmp_path / "checkpoints").iterdir())
    assert_same(restored(tmp_path, trainer, staging=staging), saved[1][3])

    saver = checkpointer(tmp_path, keep=1, staging=staging)
    saver.save(trainer.state, 3, DATA)
    saver.close()
    assert saver.steps() == [3] and (tmp_path / "checkpoints/3").is_dir() and not list(staging.iterdir())


def test_room_is_foretold(tmp_path, trainer, monkeypatch):
    each = checkpoint_space.state_bytes(trainer.abstract)
    real = sum(leaf.nbytes for leaf in jax.tree.leaves(jax.device_get(trainer.state)))
    assert each == real

    def with_room_for(checkpoints: float, keep: int, staging: pathlib.Path | None = None) -> str:
        usage = types.SimpleNamespace(free=int(checkpoints * each))
        monkeypatch.setattr(checkpoint_space.shutil, "disk_usage", lambda _: usage)
        return checkpoint_space.check(tmp_path, staging, trainer.abstract, keep)

    assert with_room_for(3, keep=2).startswith("Room for checkpoints: ")
    with pytest.raises(OSError, match="Use max_num_checkpoints_to_keep=1, or .*checkpoint_staging_directory"):
        with_room_for(2.9, keep=2)
    with pytest.raises(OSError, match="Use max_num_checkpoints_to_keep=1 with checkpoint_staging_directory="):
        with_room_for(1.5, keep=1)
    assert "where they are made" in with_room_for(1.5, keep=1, staging=tmp_path / "scratch")
    with pytest.raises(OSError, match="too little room"):
        with_room_for(0.9, keep=1, staging=tmp_path / "scratch")


def test_what_is_proposed_for_too_little_room_fits(tmp_path, trainer, monkeypatch):
    each = checkpoint_space.state_bytes(trainer.abstract)
    usage = types.SimpleNamespace(free=int(1.5 * each))  # as on Kaggle: 20 GB for checkpoints of 13
    monkeypatch.setattr(checkpoint_space.shutil, "disk_usage", lambda _: usage)
    proposed = "Use checkpoint_every_epoch=false, max_num_checkpoints_to_keep=1 with checkpoint_staging_directory="
    with pytest.raises(OSError, match=proposed):
        checkpoint_space.check(tmp_path, None, trainer.abstract, keep=3, epochs=4)
    with pytest.raises(OSError, match="Use checkpoint_every_epoch=false with max_num_checkpoints_to_keep=1, or base"):
        checkpoint_space.check(tmp_path, tmp_path / "scratch", trainer.abstract, keep=1, epochs=4)
    checkpoint_space.check(tmp_path, tmp_path / "scratch", trainer.abstract, keep=1)


def test_two_runs_of_one_name_are_staged_apart_and_several_processes_not_at_all(tmp_path, monkeypatch):
    places = [checkpoint_space.staging_place(tmp_path, tmp_path / folder / "run") for folder in ("a", "b")]
    assert places[0] != places[1] and places[0].parent == tmp_path
    monkeypatch.setattr(checkpoint_space.jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="checkpoint_staging_directory=.* with 2 processes"):
        checkpoint_space.staging_place(tmp_path, tmp_path / "run")


def saver_with_epochs(directory: pathlib.Path, epoch_ends: list[int], staging: pathlib.Path | None = None):
    info = {"config": CONFIG.to_dict(), "epoch_ends": epoch_ends}
    return checkpointing.Checkpointer(directory / "checkpoints", info, keep=1, asynchronous=False, staging=staging)


def test_an_epochs_end_makes_no_room_for_a_staged_one(tmp_path, trainer, monkeypatch):
    saver = saver_with_epochs(tmp_path, [1], tmp_path / "scratch")
    for step in (1, 2):
        saver.save(trainer.state, step, DATA)
    room = iter([0, 10**12, 0])  # full until one has gone, and full again
    monkeypatch.setattr(checkpointing.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=next(room, 0)))
    saver.save(trainer.state, 3, DATA)
    assert saver.steps() == [3, 1]
    with pytest.raises(
        OSError, match=r"the ends of epochs, \[1\], are never deleted: move some elsewhere.*\[4, 1\] are"
    ):
        saver.save(trainer.state, 4, DATA)
    assert saver.steps() == [4, 1] and (tmp_path / "scratch/4").is_dir()


def test_an_epochs_end_stays_when_a_later_launch_has_other_epochs(tmp_path, trainer):
    for step, epoch_ends in ((1, [1]), (2, []), (3, [5])):
        saver = saver_with_epochs(tmp_path, epoch_ends)
        saver.save(trainer.state, step, DATA)
        saver.close()
    assert saver.steps() == [3, 1]


def test_a_disk_that_cannot_read_the_newest_gives_the_one_before(copy, trainer, saved, monkeypatch):
    real = checkpoint_manifest._record

    def failing(path, *arguments, **keys):
        if "/3/" in str(path):
            raise OSError(5, "Input/output error")
        return real(path, *arguments, **keys)

    monkeypatch.setattr(checkpoint_manifest, "_record", failing)
    assert_same(restored(copy, trainer), saved[1][2])


def without_key(directory: pathlib.Path, key: str) -> None:
    """The step as an earlier version wrote it."""
    info = json.loads((directory / "config.json").read_text())
    del info["config"][key]
    (directory / "config.json").write_text(json.dumps(info))
    checkpoint_manifest.write(directory, int(directory.name))


def test_a_change_of_the_training_is_refused_with_its_difference_unless_it_is_allowed(copy, trainer):
    def attempt(data=DATA, allowed=(), **changes):
        changed = CONFIG.to_dict() | changes
        saver = checkpointing.Checkpointer(copy / "checkpoints", {"config": changed}, keep=5, asynchronous=False)
        return saver.restore_newest(trainer.abstract, data, allowed)

    assert attempt(steps=99, eval_interval=7, ici_fsdp_parallelism=2) is not None
    with pytest.raises(checkpointing.Mismatch, match=r"another training:\n  learning_rate: 0.001 there, 0.5 here\n"):
        attempt(learning_rate=0.5)
    with pytest.raises(checkpointing.Mismatch, match="or, if the change is meant, allow_config_change=learning_rate"):
        attempt(learning_rate=0.5)
    assert attempt(learning_rate=0.5, allowed=["adam_b1", "learning_rate"]) is not None
    for step in (1, 2, 3):  # a key that is younger than the checkpoint
        without_key(copy / f"checkpoints/{step}", "dropout_rate")
    assert attempt() is not None
    with pytest.raises(checkpointing.Mismatch, match="dropout_rate: 0.0 there, 0.5 here"):
        attempt(dropout_rate=0.5)
    with pytest.raises(checkpointing.Mismatch, match="dataset: 'synthetic' there, 'other' here"):
        attempt({"dataset": "other"})
    assert attempt({"dataset": "other"}, allowed=["dataset"]) is not None
    with pytest.raises(checkpointing.Mismatch, match="another model:\n  head_dim: 8 there, 16 here"):
        attempt(head_dim=16, allowed=["head_dim"])
    with pytest.raises(checkpointing.Mismatch, match="another model:\n  vocab_size: "):
        attempt(vocab_size=512)
    with pytest.raises(checkpointing.Mismatch, match="another training:\n  init_weights_seed: "):
        attempt(init_weights_seed=7)


def test_the_command_lists_verifies_and_inspects(copy, capsys):
    assert checkpoint_report.main(["list", str(copy)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["3", "2", "1"]
    assert checkpoint_report.main(["inspect", str(copy / "checkpoints")]) == 0
    shown = capsys.readouterr().out
    assert "skip_step_on_spikes=True" in shown and "data: {'dataset': 'synthetic'}" in shown
    assert "params.decoder.final_norm.scale  float32[32]" in shown.replace("decoder_norm", "final_norm")
    config = json.loads((copy / "checkpoints/2/config.json").read_text())
    (copy / "checkpoints/2/config.json").write_text(json.dumps(config).replace("128", "129"))
    assert checkpoint_report.main(["list", str(copy)]) == 1
    assert checkpoint_report.main(["verify", str(copy)]) == 1
    shown = capsys.readouterr().out
    assert "2  DAMAGED" in shown and "config.json has" in shown
    assert checkpoint_report.main(["verify", str(copy / "checkpoints/3")]) == 0
    assert "every byte is as written" in capsys.readouterr().out
    assert checkpoint_report.main(["list", str(copy / "nowhere")]) == 1
