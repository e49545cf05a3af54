"""The configs, compiled by the real TPU compiler: they fit, with the collectives, kernels and memory of the goldens."""

import importlib.util
import subprocess
import sys

import pytest

from tests import support
from tests.aot import goldens

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs setup.sh --tpu-compiler"),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", goldens.CASES)
def test_what_the_compiler_makes_of_a_config_is_as_recorded(case):
    found = goldens.compiled(case)
    changed = goldens.difference(goldens.recorded().get(case, []), goldens.facts(case, found))
    assert not changed, (
        f"\n{changed}\n\nIs a weight gathered that was not, or an array as large as the vocabulary new? If that is "
        "meant: python -m tests.aot.goldens, and put the difference into the description of the change."
    )
    assert found["memory"]["fits"]
    assert not found["pallas_unknown"], "a kernel's blocks are not in the table: benchmarks/flash_blocks.py"


def test_a_config_that_cannot_be_is_refused_in_words(tmp_path):
    command = [
        sys.executable,
        "MaxText/train_compile.py",
        "configs/validate_10m.yml",
        f"base_output_directory={tmp_path}",
    ]
    done = subprocess.run([*command, "compile_topology=v9-8"], cwd=support.ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: compile_topology='v9-8' is not known")
