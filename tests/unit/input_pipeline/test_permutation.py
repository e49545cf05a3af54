import numpy as np
import pytest

from MaxText.input_pipeline.permutation import permute


def whole(size, seed, epoch):
    return permute(np.arange(size), size, seed, np.full(size, epoch))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 20_726, 88_899])
def test_is_a_permutation(size):
    for epoch in (0, 1, 7):
        np.testing.assert_array_equal(np.sort(whole(size, 3, epoch)), np.arange(size))


def test_epochs_and_seeds_differ():
    orders = [whole(5000, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1), (2**40, 0)]]
    for first in range(len(orders)):
        for second in range(first):
            assert (orders[first] == orders[second]).mean() < 0.01


def test_an_element_does_not_depend_on_its_company():
    order = whole(1000, 5, 2)
    assert permute(np.array([17, 3]), 1000, 5, np.array([2, 0])).tolist() == [order[17], whole(1000, 5, 0)[3]]


def test_neighbours_are_scattered():
    order = whole(20_000, 0, 0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.03


def test_beyond_32_bits():
    size = 2**40 + 7
    images = permute(np.arange(1000) + 2**35, size, 0, np.zeros(1000, int))
    assert images.min() >= 0 and images.max() < size and np.unique(images).size == 1000
    assert images.max() > 2**39


def test_the_order_is_the_one_it_has_always_been():
    """A resumed run must find the data in the order in which it left it."""
    assert whole(10, 0, 0).tolist() == [6, 7, 3, 9, 0, 8, 2, 5, 1, 4]
