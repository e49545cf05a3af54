import pytest

from MaxText.input_pipeline import filters


@pytest.mark.parametrize(
    ("length", "reason"), [(0, "too_short"), (100, "too_short"), (101, None), (49_999, None), (50_000, "too_long")]
)
def test_length_bounds_are_exclusive(length, reason):
    assert filters.drop_reason("é" * length) == reason  # characters, not bytes
