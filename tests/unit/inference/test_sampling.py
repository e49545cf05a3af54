"""The choice of a token: from exactly the tokens that the settings allow, with the right chances, by the seed alone."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxText.inference import sampling

SETTINGS = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 400},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"min_p": 0.1},
    {"temperature": 1.7, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
]


def settings_of(rows: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0) -> sampling.Settings:
    def all_rows(value, dtype):
        return jnp.full(rows, value, dtype)

    return sampling.Settings(
        all_rows(temperature, jnp.float32),
        all_rows(top_k, jnp.int32),
        all_rows(top_p, jnp.float32),
        all_rows(min_p, jnp.float32),
        (seed + jnp.arange(rows)).astype(jnp.uint32),
    )


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs PyTorch")
@pytest.mark.parametrize("keys", SETTINGS)
def test_weights_are_those_of_transformers(keys):
    import torch
    from transformers.generation import logits_process as processors

    scores = np.random.default_rng(0).normal(size=(6, 300)).astype(np.float32) * 3
    steps = [processors.TemperatureLogitsWarper(keys.get("temperature", 1.0))]
    steps += [processors.TopKLogitsWarper(min(keys["top_k"], 300))] if "top_k" in keys else []
    steps += [processors.TopPLogitsWarper(keys["top_p"])] if "top_p" in keys else []
    steps += [processors.MinPLogitsWarper(keys["min_p"])] if "min_p" in keys else []
    theirs = processors.LogitsProcessorList(steps)(torch.zeros(6, 1, dtype=torch.long), torch.from_numpy(scores))
    expected = torch.softmax(theirs, dim=-1).numpy()
    ours = np.asarray(jax.jit(sampling._weights)(scores, settings_of(6, **keys)))
    np.testing.assert_array_equal(ours > 0, expected > 0)
    np.testing.assert_allclose(ours / ours.sum(axis=1, keepdims=True), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("keys", [{}, {"temperature": 0.5, "top_p": 0.95}, {"top_k": 20}])
def test_tokens_come_as_often_as_they_should(keys):
    """Chi-squared of 20,000 draws over a vocabulary of two and a half blocks."""
    scores = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, 320)), jnp.float32)
    rows, rounds = 2000, 10
    many, none = jnp.tile(scores, (rows, 1, 1)), jnp.zeros(rows, jnp.int32)
    choose = jax.jit(lambda settings: sampling.choose(many, settings, none))
    counts = np.zeros(320)
    for i in range(rounds):
        counts += np.bincount(np.asarray(choose(settings_of(rows, **keys, seed=i * rows)))[:, 0], minlength=320)
    weights = np.asarray(sampling._weights(scores[0], settings_of(1, **keys)))[0].astype(float)
    expected = rows * rounds * weights / weights.sum()
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    squared = np.sum((counts[possible] - expected[possible]) ** 2 / expected[possible])
    degrees = possible.sum() - 1
    assert squared < degrees + 4 * np.sqrt(2 * degrees)


def test_a_choice_depends_on_seed_and_number_alone():
    scores = jnp.asarray(np.random.default_rng(2).normal(size=(8, 3, 100)), jnp.float32)
    settings = settings_of(8)
    together = np.asarray(sampling.choose(scores, settings, jnp.arange(8)))
    for row in (0, 5):
        for place in range(3):
            alone = jax.tree.map(lambda x, row=row: x[row : row + 1], settings)
            one = sampling.choose(scores[row : row + 1, place : place + 1], alone, jnp.array([row + place]))
            assert int(one[0, 0]) == together[row, place]
    assert len({tuple(row) for row in together}) > 4


def test_temperature_zero_takes_the_likeliest_beside_rows_that_draw():
    scores = jnp.asarray(np.random.default_rng(3).normal(size=(50, 1, 100)), jnp.float32)
    settings = settings_of(50)
    mixed = sampling.Settings(settings.temperature.at[::2].set(0), *list(vars(settings).values())[1:])
    chosen = np.asarray(sampling.choose(scores, mixed, jnp.zeros(50, jnp.int32)))[:, 0]
    likeliest = np.asarray(scores[:, 0].argmax(axis=1))
    np.testing.assert_array_equal(chosen[::2], likeliest[::2])
    assert (chosen[1::2] != likeliest[1::2]).mean() > 0.5


def test_equal_scores_are_kept_together_and_hopeless_ones_never_drawn():
    scores = jnp.full((4000, 1, 10), -1e9).at[:, :, jnp.array([2, 5, 7])].set(1.0)
    for keys in ({"top_k": 2}, {"top_p": 0.5}, {"temperature": 100.0}):
        chosen = np.asarray(sampling.choose(scores, settings_of(4000, **keys), jnp.zeros(4000, jnp.int32)))
        assert set(chosen[:, 0]) == {2, 5, 7}


def test_log_probabilities_and_alternatives_are_the_models():
    scores = jnp.asarray(np.random.default_rng(4).normal(size=(2, 3, 50)), jnp.float32)
    expected = np.asarray(jax.nn.log_softmax(scores))
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, 50, (2, 3)))
    got = sampling.log_probabilities(scores, tokens)
    np.testing.assert_allclose(got, np.take_along_axis(expected, tokens[..., None], -1)[..., 0], rtol=1e-5)
    ids, values = sampling.alternatives(scores, jnp.array([False, True]))
    np.testing.assert_array_equal(ids, np.argsort(-np.asarray(scores), axis=-1)[..., :5])
    np.testing.assert_allclose(values, np.sort(expected, axis=-1)[..., ::-1][..., :5], rtol=1e-5)
    assert not np.asarray(sampling.alternatives(scores, jnp.array([False, False]))[1]).any()
