"""The configs, compiled by the real TPU compiler: they fit, with the collectives, kernels and memory of the goldens."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests import support
from tests.aot import goldens

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs setup.sh --tpu-compiler"),
]

RUN = {"env": goldens.ENVIRONMENT, "capture_output": True, "text": True}


@pytest.mark.slow
@pytest.mark.parametrize("case", goldens.CASES)
def test_what_the_compiler_makes_of_a_config_is_as_recorded(case):
    *recorded, step = goldens.recorded().get(case, [f"{case}: not recorded", ""])
    if "LONG_TESTS" not in os.environ and step == goldens.step(case):
        assert ": fits" in recorded[0]  # it is the very step whose compilation was recorded
        return
    found = goldens.compiled(case)
    changed = goldens.difference(recorded, goldens.facts(case, found))
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
    done = subprocess.run([*command, "compile_topology=v9-8"], cwd=support.ROOT, **RUN)
    assert done.returncode == 1
    assert done.stderr.startswith("error: compile_topology='v9-8' is not known")


def test_two_slices_are_one_mesh(tmp_path):
    small = ["base_num_decoder_layers=1", "vocab_size=1024", "num_vocab_tiling=1", "compile_topology=v5e-8"]
    small += ["base_emb_dim=128", "base_mlp_dim=256", "max_target_length=128", "attention=blocked"]
    slices = [
        "compile_topology_num_slices=2",
        "dcn_data_parallelism=2",
        "ici_data_parallelism=1",
        "ici_fsdp_parallelism=8",
    ]
    command = [sys.executable, "MaxText/train_compile.py", "configs/validate_10m.yml", *small, *slices]
    done = subprocess.run([*command, f"base_output_directory={tmp_path}"], cwd=support.ROOT, **RUN)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "16 devices, mesh data=2 x fsdp=8 x tensor=1" in done.stdout
    (path,) = tmp_path.glob("*/compile/v5e-8-2slices.json")
    collectives = {(c["kind"], c["axes"]): c for c in json.loads(path.read_text())["collectives"]}
    assert {axes for kind, axes in collectives if not kind.startswith("dcn")} == {"fsdp"}
    assert ("all-gather", "fsdp") in collectives
    assert collectives["dcn all-reduce", "data"]["seconds"] > 0
