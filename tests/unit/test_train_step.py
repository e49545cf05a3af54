"""The step's arithmetic: schedule, decay, clipping, and a loss that weighs tokens and not rows."""

import re

import jax
import numpy as np
import optax
import pytest

from MaxText import compiler_options, job, models, optimizers, train_step
from tests import support


def test_schedule_of_the_seed():
    config = support.small_config(steps=5000, learning_rate=1e-3, warmup_steps_fraction=0.02)
    rate = optimizers.learning_rate_schedule(config)
    assert float(rate(0)) == 0
    assert float(rate(50)) == pytest.approx(5e-4)
    assert float(rate(100)) == pytest.approx(1e-3)
    assert float(rate(2550)) == pytest.approx(5.5e-4)
    assert float(rate(5000)) == pytest.approx(1e-4)
    assert float(rate(9999)) == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("style", "middle"),
    [("cosine", 0.505), ("linear", 0.505), ("1-sqrt", 0.01 + 0.99 * (1 - 0.5**0.5)), ("exponential", 0.1)],
)
def test_wsd_is_stable_and_decays_over_its_last_part(style, middle):
    keys = {"lr_schedule_type": "wsd", "wsd_decay_style": style, "warmup_steps_fraction": 0.1, "mtp_num_layers": 1}
    config = support.small_config(**keys, steps=1000, learning_rate=1.0, learning_rate_final_fraction=0.01)
    rate, weight = optimizers.learning_rate_schedule(config), optimizers.mtp_weight_schedule(config)
    expected = {0: 0, 50: 0.5, 100: 1, 500: 1, 900: 1, 950: middle, 1000: 0.01, 2000: 0.01}
    assert {step: float(rate(step)) for step in expected} == pytest.approx(expected, abs=1e-6)
    assert float(weight(0)) == pytest.approx(0.3) and float(weight(900)) == pytest.approx(0.3)
    assert float(weight(950)) == pytest.approx(0.1 + 0.2 * (middle - 0.01) / 0.99, abs=1e-6)
    assert float(weight(1000)) == pytest.approx(0.1)


def test_the_compiled_step_holds_no_array_of_all_logits():
    """Of a vocabulary so large that one would outweigh everything else; for both heads of the shipped model."""
    keys = {"vocab_size": 8192, "mtp_num_layers": 1, "mtp_transformer_block": False, "num_vocab_tiling": 8}
    config = support.small_config(**keys, attention_type="differential", base_num_kv_heads=2, max_target_length=128)
    planned = job.make_job(config, jax.devices()[:1])
    compiled = job.lower(planned).compile()
    logits = planned.global_batch_size * 128 * config.vocab_size
    parameters = sum(leaf.size for leaf in jax.tree.leaves(planned.abstract_state.params))
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * logits + 4 * parameters
    shapes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    assert max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes) < logits


@pytest.mark.parametrize("attention_type", models.ATTENTION_TYPES)
def test_vectors_are_not_decayed_and_matrices_are(attention_type):
    keys = {"attention_type": attention_type, "base_num_kv_heads": 2, "logits_via_embedding": False}
    model = models.abstract(support.small_config(**keys, mtp_num_layers=1))
    mask = jax.tree.leaves(optimizers.decay_mask(model.params))
    axes = jax.tree.leaves(model.logical_axes, is_leaf=lambda node: isinstance(node, tuple))
    for path, decayed, names in zip(models.parameter_paths(model.params), mask, axes, strict=True):
        assert decayed == (len(set(names) - {"layers"}) > 1), path
    assert not all(mask)


def test_a_step_is_optax_adamw_by_hand():
    config = support.small_config(gradient_clipping_threshold=0.05, learning_rate=1e-2, warmup_steps_fraction=0.0)
    trainer = support.Trainer(config, support.mesh_of())
    before = jax.device_get(trainer.state.params)
    batch = support.packed_batch(config, rows=4, seed=0)
    metrics = trainer(batch)

    model = models.abstract(config)
    batch = jax.device_put(batch)
    weights = batch["targets_segmentation"] != 0

    def loss(params):
        logits = model.merge(params).logits(batch["inputs"], batch["inputs_position"], batch["inputs_segmentation"])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return (nll * weights).sum() / weights.sum()

    with jax.set_mesh(support.mesh_of()):
        value, gradients = jax.jit(jax.value_and_grad(loss))(before)
    optimizer = optax.chain(
        optax.clip_by_global_norm(0.05),
        optax.adamw(
            1e-2,
            config.adam_b1,
            config.adam_b2,
            config.adam_eps,
            weight_decay=config.adam_weight_decay,
            mask=optimizers.decay_mask,
        ),
    )
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(before), before)
    want = optax.apply_updates(before, updates)
    assert metrics["learning/loss"] == pytest.approx(float(value), rel=1e-6)
    assert metrics["learning/raw_grad_norm"] == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-5)
    assert metrics["learning/grad_norm"] == pytest.approx(0.05, rel=1e-5)
    assert metrics["learning/total_weights"] == weights.sum()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), jax.device_get(trainer.state.params), want)


def test_padding_and_cross_document_targets_do_not_count():
    config = support.small_config()
    batch = support.packed_batch(config, rows=4, seed=0)
    changed = np.where(batch["targets_segmentation"] == 0, (batch["targets"] + 1) % config.vocab_size, batch["targets"])
    assert (changed != batch["targets"]).any()
    losses = [
        support.Trainer(config, support.mesh_of())(b)["learning/loss"] for b in (batch, batch | {"targets": changed})
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("attention_type", models.ATTENTION_TYPES)
def test_muon_orthogonalizes_each_layer_alone_and_leaves_the_rest_to_adamw(attention_type):
    keys = {"attention_type": attention_type, "base_num_kv_heads": 2, "mtp_num_layers": 1, "adam_weight_decay": 0.0}
    config = support.small_config(**keys, opt_type="muon", warmup_steps_fraction=0.0, learning_rate=1.0)
    params = support.initial_params(config)
    gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)

    def updates_of(config, gradients):
        optimizer = optimizers.make_optimizer(config)
        return jax.jit(lambda *arrays: optimizer.update(arrays[0], optimizer.init(params), params)[0])(gradients)

    muon = updates_of(config, gradients)
    adamw = updates_of(support.small_config(**dict(config) | {"opt_type": "adamw"}), gradients)
    # Another gradient of layer 1 must not change the update of layer 0.
    other = updates_of(config, jax.tree.map(lambda g: g.at[1:].multiply(-3.0), gradients))
    for (path, ours), theirs, shuffled in zip(
        jax.tree_util.tree_leaves_with_path(muon), jax.tree.leaves(adamw), jax.tree.leaves(other), strict=True
    ):
        names = [key.key for key in path]
        vector = names[-1] in ("scale", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "lambda_projection")
        assert optimizers.is_muon(path) == ("layers" in names and not vector), names
        if not optimizers.is_muon(path):
            np.testing.assert_array_equal(ours, theirs, err_msg=str(names))
            continue
        np.testing.assert_array_equal(ours[0], shuffled[0], err_msg=str(names))
        rows = int(np.prod(ours.shape[1:-1])) if names[-1] == "out" else ours.shape[1]
        matrix = np.asarray(ours[0]).reshape(rows, -1)
        singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
        assert np.quantile(singular, 0.1) > 0.5, (names, singular)  # the smallest of a square one may be almost 0
        assert singular.max() < 1.3, (names, singular)


@jax.custom_jvp
def _infinitely_steep(x):
    return x


@_infinitely_steep.defjvp
def _(primals, tangents):
    return primals[0], tangents[0] * np.inf


FAULTS = (lambda x: x, lambda x: x * np.nan, lambda x: x + np.inf, _infinitely_steep)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_update_that_is_not_finite_is_skipped_and_only_that_one(monkeypatch, accumulation):
    """A NaN loss, an infinite one and an infinite gradient, the first in the first step of all.

    Params, moments and counts are bit for bit those before, and in the end as if the bad batches had never been.
    """
    whole = train_step.loss.training_sums

    def with_fault(config, model, params, batch, **keys):
        total, sums = whole(config, model, params, batch, **keys)
        fault = jax.numpy.clip(batch["inputs"].max() - 124, 0, 3)
        return jax.lax.switch(fault, FAULTS, total), {**sums, "loss": jax.lax.switch(fault, FAULTS, sums["loss"])}

    monkeypatch.setattr(train_step.loss, "training_sums", with_fault)
    config = support.small_config(gradient_accumulation_steps=accumulation, skip_step_on_spikes=True)
    trainer, never = (support.Trainer(config, support.mesh_of()) for _ in range(2))
    for step in range(7):
        fault = {0: 1, 3: 2, 4: 3}.get(step, 0)
        batch = support.packed_batch(config, rows=4, seed=step)
        batch["inputs"] = np.minimum(batch["inputs"], 124)
        batch["inputs"][0, 0] = 124 + fault
        before = jax.device_get(trainer.state)
        metrics = trainer(batch)
        assert metrics["optim/step_skipped"] == bool(fault)
        if fault:
            after = jax.device_get(trainer.state)
            assert after.step == before.step + 1
            jax.tree.map(np.testing.assert_array_equal, _without_step(after), _without_step(before))
        else:
            never(batch)
    jax.tree.map(np.testing.assert_array_equal, *(_without_step(jax.device_get(t.state)) for t in (trainer, never)))


def _without_step(state):
    return state.params, state.opt_state, state.spikes


def test_what_runs_once_on_a_cpu_is_hardly_optimized_unless_xla_flags_say_so():
    assert compiler_options.of_one_run("cpu", {}) == {"xla_backend_optimization_level": "1"}
    assert compiler_options.of_one_run("cpu", {"XLA_FLAGS": "--xla_backend_optimization_level=0"}) == {}
    assert compiler_options.of_one_run("tpu", {}) == {}
