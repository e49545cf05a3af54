"""Our attention kernels beside calls of JAX's splash kernel, one for each map: python benchmarks/attention_kernels.py

Prints one JSON line for each chip, kind and length, and adds it to a file if one is named: the cycles of both, forward
and backward, by the compiler's simulator, and the bytes that the whole operation moves through HBM. Estimates all.
Splash has the better of two square blocks, with its two backward kernels or its fused one, for the cycles and for the
bytes; in the simulator it has no segment ids. Ours has them, and its cycles are those of `flash_blocks.json`. The
compiler counts each array of a kernel once, also where a grid fetches it anew.
Needs the TPU compiler (bash setup.sh --tpu-compiler), no TPU, and ten minutes of one core. Each measurement is a
process of its own, because the simulator aborts on what it does not know. That of libtpu 0.0.42.1 knows no splash on
v5e, and takes ten gigabytes and more on v6e: TPU_LIBRARY_PATH names a newer libtpu.so.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import flash_blocks  # noqa: E402

# Maps, keys for them, head dim, value width.
KINDS = {"standard": (1, 1, 128, 128), "V1": (2, 2, 128, 256), "V2": (2, 1, 128, 128)}
BLOCKS = (512, 1024)
ROWS, HEADS, KV_HEADS = 8, 6, 2  # of the operation whose bytes are counted


def splash_cycles(family: str, kind: str, length: int, block: int, is_fused: bool) -> list[int]:
    """Estimated cycles of its kernels, first the forward one, for all maps of one query head of one row."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    from MaxText.kernels import splash

    def causal(head, i, j, data_next, block_mask, mask_next, next_i=False):
        """What splash's own tables say of a causal mask; the simulator reads every table as zeros."""
        return (jnp.maximum(i, j) if next_i else jnp.minimum(i, j)), None, i >= j, i > j

    splash_attention_kernel._next_nonzero = causal
    maps, _, head_dim, width = KINDS[kind]
    kernel = splash_attention_kernel.make_splash_mqa_single_device(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * 2),
        block_sizes=splash.block_sizes(block, is_fused),
    )

    def both(q, k, v, d_context):
        context, back = jax.vjp(kernel, q, k, v)
        return context, back(d_context)

    mesh = _mesh(family)
    shapes = (2, length, head_dim), (length, head_dim), (length, width), (2, length, width)
    arrays = [jax.ShapeDtypeStruct(shape, "bfloat16", sharding=_replicated(mesh)) for shape in shapes]
    with jax.set_mesh(mesh):
        text = jax.jit(both).trace(*arrays).lower().compile().as_text() or ""
    calls = flash_blocks.kernel_calls(text)
    assert len(calls) == 2 + (not is_fused), f"{len(calls)} kernels"
    return [flash_blocks.cycles_of(call) * maps // 2 for call in calls]  # of two heads


def hbm_bytes(family: str, kind: str, length: int, block: int | None, is_fused: bool) -> int:
    """Bytes through HBM of the operation as the model calls it, both passes: ours, or splash in these blocks."""
    import jax
    import jax.numpy as jnp

    from MaxText import hardware, sharding
    from MaxText.aot import cost, hlo
    from MaxText.kernels import attention_flash, splash

    mesh = _mesh(family)
    maps, keys, head_dim, width = KINDS[kind]
    axes = {"batch_axes": sharding.BATCH_AXES, "head_axis": sharding.HEAD_AXIS, "interpret": False}

    def array(*sizes, dtype="bfloat16"):
        return jax.ShapeDtypeStruct((ROWS, length, *sizes), dtype, sharding=_replicated(mesh))

    def attend(q, k, v, weight, segments):
        ours = axes | {"chip": mesh.devices.flat[0].device_kind}
        if not block and maps == 2:
            return attention_flash.differential_flash(q, k, v, weight, segments, **ours)
        if not block:
            return attention_flash.attention_flash(q[:, :, 0], k[:, :, 0], v, segments, **ours)
        theirs = axes | {"soft_cap": None, "block": block, "has_fused_backward": is_fused}
        one, *others = (
            splash.attention_splash(q[:, :, i], k[:, :, i % keys], v, segments, **theirs) for i in range(maps)
        )
        for other in others:
            one = (one.astype(jnp.float32) - weight[..., None] * other.astype(jnp.float32)).astype(q.dtype)
        return one

    def both(q, k, v, weight, segments, d_context):
        context, back = jax.vjp(lambda *arrays: attend(*arrays, segments), q, k, v, weight)
        return context, back(d_context)

    arrays = array(maps, HEADS, head_dim), array(keys, KV_HEADS, head_dim), array(KV_HEADS, width)
    rest = array(HEADS, dtype="float32"), array(dtype="int32"), array(HEADS, width)
    with jax.set_mesh(mesh):
        text = jax.jit(both).trace(*arrays, *rest).lower().compile().as_text() or ""
    chip = hardware.find_chip(mesh.devices.flat[0].device_kind)
    assert chip
    return cost.account(hlo.parse(text), family, chip.hbm_bandwidth, dict(mesh.shape)).hbm_bytes


def _mesh(family: str):
    from MaxText import sharding
    from MaxText.aot import topologies

    return sharding.make_mesh((1, 1, 1), topologies.devices(topologies.parse(f"{family}-1"), num_slices=1))


def _replicated(mesh):
    from MaxText import sharding

    return sharding.replicated(mesh)


def _apart(call: str, *arguments: object) -> Any:
    """What a function of this file gives, in a process of its own; None where the compiler aborts."""
    command = [sys.executable, __file__, "--call", call, json.dumps(arguments)]
    with tempfile.TemporaryDirectory() as folder:
        simulated = flash_blocks.simulator(str(arguments[0]), folder) if call == "splash_cycles" else {}
        done = subprocess.run(command, env={**os.environ, **simulated}, capture_output=True, text=True)
    if done.returncode:
        print(f"{call} {arguments}: {done.stderr[-300:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def compare(family: str, kind: str, length: int, libtpu: str) -> dict[str, object]:
    """The record of one line."""
    from MaxText.kernels import flash_blocks as table

    candidates = [(min(block, length), is_fused) for block in BLOCKS if block <= length for is_fused in (False, True)]
    splash = {one: _apart("splash_cycles", family, kind, length, *one) for one in candidates}
    known = {one: cycles for one, cycles in splash.items() if cycles}
    best = min(known, key=lambda one: sum(known[one])) if known else candidates[0]
    (block, is_fused), least = best, known.get(best, [])
    maps, _, head_dim, width = KINDS[kind]
    shape = (flash_blocks.CHIPS[family], "bfloat16", maps, head_dim, width)
    ours = [round(table.cycles(which, shape, length) or 0) for which in ("forward", "backward")]
    of_ours = _apart("hbm_bytes", family, kind, length, None, False)
    of_splash = _apart("hbm_bytes", family, kind, length, block, is_fused)
    return {
        "chip": family,
        "attention": kind,
        "length": length,
        "cycles_of_a_head": ours,
        "splash_cycles_of_a_head": least,
        "splash_block": f"{block}{' fused' * is_fused}",
        "splash_all": {f"{b}{' fused' * f}": cycles for (b, f), cycles in known.items()},
        "ratio_cycles": round(sum(ours) / sum(least), 3) if least else None,
        "hbm_megabytes": of_ours and round(of_ours / 1e6),
        "splash_hbm_megabytes": of_splash and round(of_splash / 1e6),
        "ratio_hbm": round(of_ours / of_splash, 3) if of_ours and of_splash else None,
        "splash_libtpu": libtpu,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", help="append the lines to this file, too")
    parser.add_argument("--length", type=int, nargs="+", default=[2048])
    parser.add_argument("--libtpu", default=version("libtpu"), help="the version, where TPU_LIBRARY_PATH names another")
    parser.add_argument("--call", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from MaxText.aot import topologies

    topologies.prepare_environment(os.environ)
    if arguments.call:
        name, words = arguments.call
        print(json.dumps({"splash_cycles": splash_cycles, "hbm_bytes": hbm_bytes}[name](*json.loads(words))))
        return
    for family in flash_blocks.CHIPS:
        for kind in KINDS:
            for length in arguments.length:
                line = json.dumps(compare(family, kind, length, arguments.libtpu))
                print(line, flush=True)
                if arguments.out:
                    with open(arguments.out, "a") as file:
                        file.write(line + "\n")


if __name__ == "__main__":
    main()
