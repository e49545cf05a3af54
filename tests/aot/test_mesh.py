"""The order of a mesh on the chips of a 2x4: each chip of a ring is wired to the next, the last to the first."""

import importlib.util
import json
import subprocess
import sys

import pytest

from MaxText.aot import topologies
from tests import support
from tests.aot import goldens

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs setup.sh --tpu-compiler"),
]
PROGRAM = """
import json, sys
from MaxText import sharding
from MaxText.aot import topologies

devices = topologies.devices(topologies.parse(sys.argv[1]), num_slices=1)
mesh = sharding.make_mesh(json.loads(sys.argv[2]), devices)
print(json.dumps([device.coords for device in mesh.devices.flat]))
"""


@pytest.mark.parametrize("sizes", [[8, 1, 1], [1, 8, 1], [1, 1, 8]], ids=["data", "fsdp", "tensor"])
@pytest.mark.parametrize("name", ["v5e-8", "v6e-8"])
def test_an_axis_of_eight_is_a_ring_of_wires(name, sizes):
    environ = dict(goldens.ENVIRONMENT)
    topologies.prepare_environment(environ)
    command = [sys.executable, "-c", PROGRAM, name, json.dumps(sizes)]
    done = subprocess.run(command, cwd=support.ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ring = json.loads(done.stdout.splitlines()[-1])
    for one, next_one in zip(ring, ring[1:] + ring[:1], strict=True):
        assert sum(abs(a - b) for a, b in zip(one, next_one, strict=True)) == 1, ring
