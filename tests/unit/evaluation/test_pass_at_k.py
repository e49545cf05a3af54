"""pass@k against counting every choice of k samples; the standard error against the spread of repeated experiments."""

import itertools

import numpy as np
import pytest

from MaxText.evaluation.pass_at_k import mean_and_standard_error, pass_at_k


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_it_is_the_share_of_choices_with_a_correct_one(num_samples: int):
    for num_correct in range(num_samples + 1):
        correct = [True] * num_correct + [False] * (num_samples - num_correct)
        for k in range(1, num_samples + 1):
            choices = [any(choice) for choice in itertools.combinations(correct, k)]
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(sum(choices) / len(choices), abs=1e-12)


def test_many_samples_do_not_overflow():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01, abs=1e-12)


@pytest.mark.parametrize(("num_samples", "num_correct", "k"), [(5, 6, 1), (5, -1, 1), (5, 2, 6), (5, 2, 0)])
def test_impossible_counts_are_refused(num_samples: int, num_correct: int, k: int):
    with pytest.raises(ValueError, match=f"pass@{k} of {num_correct} correct among {num_samples} samples"):
        pass_at_k(num_samples, num_correct, k)


def test_the_standard_error_is_the_spread_of_the_mean():
    rng = np.random.default_rng(0)
    experiments = rng.random((2000, 50)) ** 2
    errors = [mean_and_standard_error(values.tolist())[1] for values in experiments]
    assert np.mean(errors) == pytest.approx(experiments.mean(axis=1).std(), rel=0.05)
    mean, error = mean_and_standard_error([1.0, 0.0, 0.0, 0.0])
    assert (mean, error) == (0.25, 0.25)


def test_one_value_has_no_error_and_none_no_mean():
    assert mean_and_standard_error([0.5]) == (0.5, None)
    with pytest.raises(ValueError, match="no results"):
        mean_and_standard_error([])
