"""Estimates from samples: pass@k of one problem, and a mean over problems with its standard error."""

import math
import statistics
from collections.abc import Sequence


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that at least one of k samples is correct, estimated without bias from `num_samples` of them.

    1 - C(n - c, k) / C(n, k). Source: Chen et al., arXiv:2107.03374, equation 1.
    Raises:
        ValueError: fewer samples than k or than were correct.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_correct} correct among {num_samples} samples: take at least k samples")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean over problems and its standard error, s / sqrt(n); it holds the choice of problems and the sampling.

    Source: Miller, arXiv:2411.00640, section 2.1. A single problem has no error.
    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no results: nothing to take a mean of")
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error
