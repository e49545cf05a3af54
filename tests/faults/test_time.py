"""The account of a run's time against a stopwatch, over two launches and the pause between them."""

import re
import time

import pytest

from MaxText import batch_feed
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
    accounted = []  # when each launch gave its last account

    def listen(line):
        accounted.extend([time.perf_counter()] if line.startswith("Goodput: ") else [])

    assert training.train(tmp_path, training.Lines(listen), steps=6) == 0
    time.sleep(2)
    console = training.Lines(listen)
    paused = time.perf_counter() - accounted[0]
    assert training.train(tmp_path, console, steps=12) == 0
    stopwatch = accounted[-1] - begin
    (line,) = [line for line in console.lines if line.startswith("Goodput: ")]
    share, total = map(float, re.match(r"Goodput: ([\d.]+)% of the ([\d.]+) s since the first launch", line).groups())
    pairs = (part.rsplit(" ", 2) for part in line.split("; ")[1].split(", "))
    spent = {name: float(seconds) for name, seconds, _ in pairs}
    hundredth = 0.01 * stopwatch + 0.05  # and half a unit of what the line is rounded to
    assert total == pytest.approx(stopwatch, abs=hundredth)
    assert spent["data wait"] == pytest.approx(waited, abs=hundredth)
    assert spent["not running"] == pytest.approx(paused, abs=hundredth)
    assert share / 100 * total + sum(spent.values()) == pytest.approx(total, abs=0.5)
