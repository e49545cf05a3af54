"""The model card tells the numbers of the checkpoint that is exported, and says where they are of an earlier step."""

import json
import pathlib

from MaxText import hf_export
from MaxText.inference import runs
from tests import support


def test_a_number_of_an_earlier_step_says_so(tmp_path: pathlib.Path, monkeypatch):
    config = support.small_config()
    records = [
        {"step": 20, "learning/lm_loss": 3.0},
        {"step": 20, "eval/avg_loss": 2.5, "eval/bits_per_byte": 0.75},
        {"step": 30, "learning/lm_loss": 2.0},
        {"step": 40, "learning/lm_loss": 1.0, "eval/avg_loss": 1.0},  # after the checkpoint
    ]
    (tmp_path / "metrics").mkdir()
    lines = [json.dumps(record) for record in records]
    (tmp_path / "metrics/metrics.jsonl").write_text("\n".join([*lines, '{"step": 30, "eval/avg_l']))
    info = {"config": config.to_dict(), "tokens_per_step": 64, "data": "random", "tokenizer": ""}
    info |= {"git_commit": "abc", "jax_version": "0.10.2"}
    run = runs.TrainedRun(tmp_path, {}, None)
    monkeypatch.setattr(runs.TrainedRun, "info", lambda *_: info)
    card = hf_export.model_card(run, 30, config, "1", "float32")
    assert "| Training loss | 2.0000 nats per token |" in card
    assert "| Held-out loss | 2.5000 nats per token (at step 20) |" in card
    assert "| Held-out bits per byte | 0.7500 (at step 20) |" in card
    assert "| Training loss | 1.0000 nats per token |" in hf_export.model_card(run, 40, config, "1", "float32")
