"""The steps of generation, compiled by the real TPU compiler: they fit, and read little more than they must."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests import support

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs setup.sh --tpu-compiler"),
]


def test_the_steps_of_validate_10m_fit_and_are_near_the_roofline(tmp_path):
    command = [sys.executable, "MaxText/decode_compile.py", "configs/validate_10m.yml", "compile_topology=v5e-1"]
    done = subprocess.run(
        [*command, f"base_output_directory={tmp_path}", "decode_rows=16"],
        cwd=support.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fits" in done.stdout and "Roofline: " in done.stdout
    found = json.loads((tmp_path / "validate_10m" / "compile" / "decode-v5e-1-16.json").read_text())
    assert found["weight_bytes"] == pytest.approx(2 * 18.29e6, rel=0.01)  # bfloat16
    assert found["memory_bytes"] == 16 * 6 * 2 * 512 * 64 * 2  # rows, layers, keys and values, places, head, bytes
    assert found["roofline_seconds_per_step"] == pytest.approx(
        (found["weight_bytes"] + found["memory_bytes"]) / 819e9, rel=1e-6
    )
    assert found["hbm_bytes_per_step"] < 4 * (found["weight_bytes"] + found["memory_bytes"])
