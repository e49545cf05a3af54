"""Numbers that must not change unnoticed."""

import pytest

from tests.golden import update


@pytest.mark.parametrize("name", update.GOLDENS)
def test_golden(name):
    difference = update.difference(name, tolerance=2e-4)
    assert not difference, f"{difference}\nIf this is meant: python -m tests.golden.update, and say why in the commit."
