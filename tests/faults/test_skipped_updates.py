"""Updates that are skipped, as the whole run sees them: logged, counted, and as many in a row end it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from MaxText import checkpoint_manifest, train_step
from MaxText.input_pipeline import synthetic
from tests.faults import training


@pytest.fixture
def poison(monkeypatch):
    """steps -> None: the loss of these steps is NaN."""
    sums_of, batch_of = train_step.loss.training_sums, synthetic.SyntheticDataset.batch
    poisoned: list[int] = []

    def batch(self, step, global_batch_size, rows):
        made = batch_of(self, step, global_batch_size, rows)
        made["inputs"] = np.where(made["inputs"] == 127, 126, made["inputs"])
        if step + 1 in poisoned:
            made["inputs"][:, 0] = 127
        return made

    def training_sums(config, model, params, batch, **keys):
        total, sums = sums_of(config, model, params, batch, **keys)
        factor = jnp.where(jnp.any(batch["inputs"] == 127), jnp.nan, 1.0)
        return total * factor, {**sums, "loss": sums["loss"] * factor}

    monkeypatch.setattr(synthetic.SyntheticDataset, "batch", batch)
    monkeypatch.setattr(train_step.loss, "training_sums", training_sums)
    return poisoned.extend


def test_one_is_logged_counted_and_saved_past(tmp_path, poison):
    poison([1, 5])
    console = training.Lines()
    assert training.train(tmp_path, console, log_period=100) == 0
    assert "step 1: update skipped, 1 in this launch: loss=nan, raw_grad_norm=nan" in console
    assert "step 5: update skipped, 2 in this launch" in console
    assert "2 updates skipped" in console
    lines = (tmp_path / "run/metrics/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [(r["step"], r["learning/loss"]) for r in records if r["optim/step_skipped"]] == [(1, None), (5, None)]


def test_so_many_in_a_row_end_the_run_with_the_last_good_state_saved(tmp_path, poison):
    poison(range(6, 100))
    console = training.Lines()
    with pytest.raises(FloatingPointError, match="step 8: 3 updates in a row were skipped"):
        training.train(tmp_path, console, max_skipped_steps_in_a_row=3)
    (step,) = training.saved_steps(tmp_path)
    assert 8 <= step <= 9
    checkpoint_manifest.verify(tmp_path / f"run/checkpoints/{step}")
    again = training.Lines()
    with pytest.raises(FloatingPointError):
        training.train(tmp_path, again, max_skipped_steps_in_a_row=3)
    assert f"Resuming after step {step} " in again
