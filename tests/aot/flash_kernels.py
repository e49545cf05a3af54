"""The flash kernels alone, forward and backward, compiled by the TPU compiler at the lengths that are used."""

import os
import subprocess
import sys

from MaxText.aot import executable, topologies
from tests import support

# XLA's flags of the tests are for CPUs; the compiler must see what a user's would.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
# Maps, keys for them, query heads, key/value heads, head dim, value width, lengths.
SHAPES = (
    (2, 2, 6, 2, 128, 256, (512, 2048, 8192)),
    (2, 1, 12, 4, 128, 128, (512, 2048, 8192)),
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
            print("compiled", family, maps, keys, heads, kv_heads, head_dim, width, length)
"""


def compiled(title: str) -> list[str]:
    """The lines of their paragraph: within the VMEM that they ask for, or it fails.

    Raises:
        RuntimeError: it failed.
    """
    environ = dict(ENVIRONMENT)
    topologies.prepare_environment(environ)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=support.ROOT, env=environ, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    lines = [f"  {line}" for line in done.stdout.splitlines() if line.startswith("compiled")]
    return [f"{title}:", *lines, sources()]


def expected() -> list[str]:
    """The lines between the title and the sources: chip, maps, keys, heads, key/value heads, widths, positions."""
    return [
        "  compiled " + " ".join(map(str, (family, *shape, length)))
        for family in ("v5e", "v6e")
        for *shape, lengths in SHAPES
        for length in lengths
    ]


def sources() -> str:
    """The line that names what is compiled, and by what."""
    return f"  the sources: {executable.versions()}, {executable.digest('')}"
