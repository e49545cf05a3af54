"""The rule for skipping updates: one bad value is one skipped update, and it never enters the window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxText import spikes
from tests import support

STEPS = 400
CONFIG = support.small_config(skip_step_on_spikes=True)


def skipped(loss_at: dict[int, float], grad_norm_at: dict[int, float], config=CONFIG) -> list[int]:
    """The steps that are skipped of 400 with a falling, noisy loss and these values put in."""
    rng = np.random.default_rng(0)
    losses = 4 - np.arange(STEPS) / STEPS + rng.normal(0, 0.05, STEPS)
    norms = 1 + rng.normal(0, 0.1, STEPS)
    for series, put_in in ((losses, loss_at), (norms, grad_norm_at)):
        for step, value in put_in.items():
            series[step] = value

    def one(window, measured):
        good, window = spikes.judge(config, window, measured[0], measured[1])
        return window, good

    measured = jnp.asarray(np.stack([losses, norms], axis=1), jnp.float32)
    window, good = jax.lax.scan(one, spikes.initial(config), measured)
    if window is not None:
        assert np.isfinite(window.values).all()
    return np.flatnonzero(~np.asarray(good)).tolist()


def test_nothing_is_skipped_without_a_fault():
    assert skipped({}, {}) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("step", [0, 30, 200])
def test_one_value_that_is_not_finite_is_one_skipped_update(step, value):
    assert skipped({step: value}, {}) == [step]
    assert skipped({}, {step: value}) == [step]
    assert skipped({}, {step: value}, support.small_config()) == [step]


def test_spikes_are_skipped_each_by_itself_and_do_not_make_room_for_the_next():
    at = {200: 9.0, 201: 8.0, 210: 7.0, 300: 9.0, 399: 6.0}
    assert skipped(at, {}) == sorted(at)
    assert skipped({}, {250: 5.0}) == [250]
    assert skipped({200: 0.1}, {}) == []  # a loss that falls is no spike
    assert skipped(at, {}, support.small_config()) == []  # not asked for


def test_no_spike_before_the_window_is_half_full():
    assert skipped({62: 9.0, 63: 12.0}, {}) == []
    assert skipped({64: 9.0}, {}) == [64]
