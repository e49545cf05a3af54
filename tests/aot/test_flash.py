"""The flash kernels, compiled by the real TPU compiler at the lengths that are used: within the VMEM they ask for."""

import importlib.util
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

# Maps, keys for them, query heads, key/value heads, head dim, value width, lengths.
SHAPES = (
    (2, 2, 6, 2, 128, 256, (512, 2048, 8192)),
    (2, 1, 12, 4, 128, 128, (2048,)),
    (1, 1, 12, 4, 128, 128, (2048,)),
    (1, 1, 4, 1, 64, 64, (512,)),
)
PROGRAM = f"""
import jax, jax.numpy as jnp
from MaxText import sharding
from MaxText.aot import topologies
from MaxText.kernels import attention_flash

for family in ("v5e", "v6e"):
    devices = topologies.devices(topologies.parse(f"{{family}}-1"), num_slices=1)
    mesh = sharding.make_mesh((1, 1, 1), devices)
    options = dict(batch_axes=sharding.BATCH_AXES, head_axis=sharding.HEAD_AXIS, interpret=False)
    options["chip"] = devices[0].device_kind
    for maps, keys, heads, kv_heads, head_dim, width, lengths in {SHAPES}:
        for length in lengths:
            def array(*sizes, dtype=jnp.bfloat16):
                return jax.ShapeDtypeStruct((1, length, *sizes), dtype, sharding=sharding.replicated(mesh))
            arrays = [array(maps, heads, head_dim), array(keys, kv_heads, head_dim), array(kv_heads, width)]
            if maps == 2:
                arrays.append(array(heads, dtype=jnp.float32))
            def loss(segments, *arrays):
                if maps == 2:
                    out = attention_flash.differential_flash(*arrays, segments, **options)
                else:
                    q, k, v = arrays
                    out = attention_flash.attention_flash(q[:, :, 0], k[:, :, 0], v, segments, **options)
                return jnp.sum(out.astype(jnp.float32))
            gradient = jax.grad(loss, range(1, 1 + len(arrays)))
            with jax.set_mesh(mesh):
                text = jax.jit(gradient).trace(array(dtype=jnp.int32), *arrays).lower().compile().as_text()
            assert f"flash_{{maps}}_forward" in text and f"flash_{{maps}}_backward" in text
            print("compiled", family, maps, length, flush=True)
"""


def test_they_compile_for_both_generations_at_every_length():
    environ = dict(goldens.ENVIRONMENT)
    topologies.prepare_environment(environ)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=support.ROOT, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled") == 2 * sum(len(shape[-1]) for shape in SHAPES)
