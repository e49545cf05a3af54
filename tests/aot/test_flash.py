"""The flash kernels, compiled by the real TPU compiler at the lengths that are used: within the VMEM they ask for."""

import importlib.util
import os

import pytest

from tests.aot import flash_kernels, goldens

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs setup.sh --tpu-compiler"),
]


@pytest.mark.slow
def test_they_compile_for_both_generations_at_every_length():
    recorded = goldens.recorded().get(goldens.FLASH, [""])
    if "LONG_TESTS" in os.environ or recorded[-1] != flash_kernels.sources():
        recorded = flash_kernels.compiled(goldens.FLASH)
    assert recorded[1:-1] == flash_kernels.expected()
