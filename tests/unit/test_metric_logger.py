"""The lines that other programs parse, and the files they read."""

import json
import re

from benchmarks import mfu
from MaxText import goodput, metric_logger

TRAIN = {
    "perf/step_time_seconds": 5.6681,
    "perf/per_device_tflops_per_sec": 134.9094,
    "perf/per_device_tokens_per_sec": 8671.7941,
    "perf/mfu": 0.412,
    "learning/total_weights": 196608.0,
    "learning/loss": 10.8794,
    "learning/current_learning_rate": 1e-3,
    "learning/raw_grad_norm": 1.5,
}


def test_the_train_line_is_maxtexts_byte_for_byte_up_to_the_loss():
    line = metric_logger.train_line(5, TRAIN)
    assert line.startswith(
        "completed step: 5, seconds: 5.668, TFLOP/s/device: 134.909, Tokens/s/device: 8671.794, "
        "total_weights: 196608, loss: 10.879"
    )
    existing_parser = (
        r"completed step: (\d+), seconds: ([\d.]+), TFLOP/s/device: ([\d.]+), "
        r"Tokens/s/device: ([\d.]+), total_weights: (\d+), loss: ([\d.]+)"
    )
    assert re.match(existing_parser, line).groups() == ("5", "5.668", "134.909", "8671.794", "196608", "10.879")
    assert ", MFU: 41.2%" in line
    assert mfu.COMPLETED.match(line).groups() == ("5", "5.668", "8671.794", "41.2")


def test_the_eval_line_has_bits_per_byte_only_where_there_are_bytes():
    metrics = {"eval/avg_loss": 2.0, "eval/avg_perplexity": 7.389, "eval/total_weights": 100.0}
    line = metric_logger.eval_line(20, metrics)
    assert line == "Completed eval after train step 20, loss=2.000, perplexity=7.389, total_weights=100"
    assert metric_logger.eval_line(20, metrics | {"eval/bits_per_byte": 0.75}).endswith(", bits_per_byte=0.7500")


def test_json_lines_are_whole_at_once_and_appended(tmp_path):
    printed = []
    for step in (1, 2):
        logger = metric_logger.MetricLogger(tmp_path, enable_tensorboard=step == 2, emit=printed.append)
        logger.train(step, TRAIN)
        records = [json.loads(line) for line in logger.jsonl.read_text().splitlines()]
        assert [record["step"] for record in records] == list(range(1, step + 1))
        logger.close()
    assert records[0]["learning/loss"] == TRAIN["learning/loss"]
    assert len(printed) == 2
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_half_a_line_of_a_full_disk_is_no_evaluation(tmp_path):
    logger = metric_logger.MetricLogger(tmp_path, enable_tensorboard=False, emit=lambda line: None)
    logger.evaluation(20, {"eval/avg_loss": 2.0, "eval/avg_perplexity": 7.389, "eval/total_weights": 100.0})
    logger.close()
    with logger.jsonl.open("a") as file:
        file.write('{"step": 40, "eval/avg_loss"')
    resumed = metric_logger.MetricLogger(tmp_path, enable_tensorboard=False, emit=lambda line: None)
    found = resumed.has_evaluation(20), resumed.has_evaluation(40)
    resumed.close()
    assert found == (True, False)


def test_the_ledger_sums_to_the_wall_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: now[0])
    ledger, timer = goodput.TimeLedger(started=98.0), goodput.StepTimer()
    with ledger.charge("compile"):
        now[0] += 7
    timer.resume()  # so that compilation is not charged to the first step
    for _ in range(3):
        with ledger.charge("step"):
            now[0] += 2
        timer.completed()
    with ledger.charge("eval"):
        now[0] += 50
    timer.resume()
    with ledger.charge("step"):
        now[0] += 2
    timer.completed()
    assert timer.lap() == 2.0
    seconds = ledger.seconds()
    assert (seconds["startup"], seconds["compile"], seconds["step"], seconds["eval"]) == (2, 7, 8, 50)
    assert sum(seconds.values()) == ledger.wall() == now[0] - 98
