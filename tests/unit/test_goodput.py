"""Where the time of a run went, over all its launches."""

import json

import pytest

from MaxText import goodput


def launch(directory, started, first, last, **seconds):
    record = {"started": started, "first_step": first, "last_step": last, "seconds": seconds}
    (directory / f"{started:.3f}.json").write_text(json.dumps(record))


def test_steps_taken_again_are_lost_work_and_pauses_are_not_running(tmp_path):
    launch(tmp_path, 1000.0, 0, 100, startup=5.0, step=100.0)  # killed; 80 was saved
    launch(tmp_path, 1200.0, 80, 95, startup=5.0, step=30.0, eval=2.0)  # killed; nothing was saved
    launch(tmp_path, 1300.0, 80, 200, startup=5.0, step=120.0, save=3.0)
    total = goodput.run_seconds(tmp_path, now=1430.0)
    assert sum(total.values()) == pytest.approx(430)
    assert total["lost work"] == pytest.approx(20 + 30)
    assert total["step"] == pytest.approx(80 + 120)
    assert total["startup"] == 15 and total["eval"] == 2 and total["save"] == 3
    assert total["not running"] == pytest.approx(430 - 270)


def test_going_back_further_than_one_launch(tmp_path):
    launch(tmp_path, 0.0, 0, 100, step=100.0)
    launch(tmp_path, 100.0, 100, 200, step=100.0)
    launch(tmp_path, 200.0, 50, 250, step=200.0)  # both newer checkpoints were damaged
    total = goodput.run_seconds(tmp_path, now=400.0)
    assert total["lost work"] == pytest.approx(50 + 100)
    assert total["step"] == pytest.approx(250)


def test_a_record_that_a_loss_of_power_emptied_is_left_out(tmp_path):
    launch(tmp_path, 0.0, 0, 100, step=100.0)
    (tmp_path / "100.000.json").write_text("")
    assert goodput.run_seconds(tmp_path, now=150.0)["not running"] == pytest.approx(50)


def test_a_record_is_written_at_once_when_asked_and_seldom_otherwise(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: now[0])
    ledger = goodput.TimeLedger(started=90.0)
    record = goodput.RunRecord(tmp_path / "goodput", ledger)
    for step in range(1, 100):
        now[0] += 0.1
        with ledger.charge("step"):
            now[0] += 0.9
        record.update(0, step)
    (path,) = (tmp_path / "goodput").iterdir()
    assert 95 <= json.loads(path.read_text())["last_step"] <= 99
    record.update(0, 99, now=True)
    written = json.loads(path.read_text())
    assert written["last_step"] == 99 and written["seconds"]["step"] == pytest.approx(99 * 0.9)
    assert sum(written["seconds"].values()) == pytest.approx(10 + 99)
    assert goodput.RunRecord(None, ledger).total() == {}
