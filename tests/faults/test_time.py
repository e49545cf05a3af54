"""The account of a run's time against a stopwatch, over two launches and the pause between them."""

import re
import time

import pytest

from MaxText import batch_feed, checkpoint_manifest
from tests.faults import training


def test_the_account_is_within_a_hundredth_of_the_stopwatch(tmp_path, monkeypatch):
    real, waited = batch_feed.BatchFeed.__next__, 0.0

    def slowly(self):
        nonlocal waited
        begin = time.perf_counter()
        time.sleep(0.25)
        batch = real(self)
        waited += time.perf_counter() - begin
        return batch

    monkeypatch.setattr(batch_feed.BatchFeed, "__next__", slowly)
    begin = time.perf_counter()
    accounted, said = [], []  # when each launch gave its last account; when each line came

    def listen(line):
        said.append(time.perf_counter())
        accounted.extend(said[-1:] if line.startswith("Goodput: ") else [])

    assert training.train(tmp_path, training.Lines(listen), steps=6) == 0
    time.sleep(2)
    console = training.Lines(listen)
    paused, num_said = time.perf_counter() - accounted[0], len(said)
    assert training.train(tmp_path, console, steps=12) == 0
    stopwatch = accounted[-1] - begin
    (line,) = [line for line in console.lines if line.startswith("Goodput: ")]
    share, total = map(float, re.match(r"Goodput: ([\d.]+)% of the ([\d.]+) s since the first launch", line).groups())
    pairs = (part.rsplit(" ", 2) for part in line.split("; ")[1].split(", "))
    spent = {name: float(seconds) for name, seconds, _ in pairs}
    hundredth = 0.01 * stopwatch + 0.05  # and half a unit of what the line is rounded to
    assert total == pytest.approx(stopwatch, abs=hundredth)
    assert spent["data wait"] == pytest.approx(waited, abs=hundredth)
    # On a busy machine it takes a moment from the call to where a launch begins to count.
    assert paused - hundredth < spent["not running"] < said[num_said] - accounted[0] + hundredth
    assert share / 100 * total + sum(spent.values()) == pytest.approx(total, abs=0.5)


def test_a_slow_disk_delays_no_step_and_the_wait_for_it_is_accounted(tmp_path, monkeypatch):
    """Every checkpoint takes three seconds more: the one after step 4 is written while steps 5 to 7 are taken."""
    real, written = checkpoint_manifest.write, []

    def slowly(*args):
        time.sleep(3)
        written.append(time.perf_counter())
        return real(*args)

    monkeypatch.setattr(checkpoint_manifest, "write", slowly)
    reported = {}

    def listen(line):
        if match := re.match(r"completed step: (\d+),", line):
            reported[int(match[1])] = time.perf_counter()

    console = training.Lines(listen)
    assert training.train(tmp_path, console, checkpoint_period=4, steps=8, max_num_checkpoints_to_keep=1) == 0
    assert reported[7] < written[0] and reported[7] - reported[4] < 2.5  # 3 and more had they waited
    (line,) = [line for line in console.lines if line.startswith("Goodput: ")]
    saving = float(re.search(r"; .*save ([\d.]+) s", line)[1])
    assert 3 < saving < 3 + 3 + 3
    assert training.saved_steps(tmp_path) == [8]
