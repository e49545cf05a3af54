"""Chooses the flash kernels' blocks by the compiler's static schedule: python benchmarks/flash_blocks.py [--write].

Needs the TPU compiler (bash setup.sh --tpu-compiler) and no TPU; about fifteen minutes on one core. Every figure is an
estimate of the compiler's simulator. Each shape is a process of its own: the compiler aborts on what it cannot do. The
simulator of libtpu 0.0.42.1 takes ten gigabytes and more for two maps on v6e; TPU_LIBRARY_PATH names a newer libtpu.so.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CHIPS = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite"}
# maps, keys for them, head dim, value width: validate_10m, standard heads, differential attention V1 and V2.
SHAPES = ((1, 1, 64, 64), (1, 1, 128, 128), (2, 2, 128, 256), (2, 1, 128, 128))
CANDIDATES = {
    512: ((512, 512, 128), (512, 512, 256), (512, 512, 512)),
    2048: ((512, 512, 256), (1024, 512, 256), (1024, 512, 512), (1024, 1024, 512)),
}
_HEADS = 2  # query heads of the measured program, which share a key/value head


def measure(family: str, shape: tuple[int, int, int, int], length: int) -> None:
    """Prints one JSON line for each candidate: blocks, estimated cycles and VMEM bytes of both kernels."""
    import jax
    import jax.numpy as jnp

    from MaxText import sharding
    from MaxText.aot import topologies
    from MaxText.kernels import flash

    devices = topologies.devices(topologies.parse(f"{family}-1"), num_slices=1)
    mesh = sharding.make_mesh((1, 1, 1), devices)
    maps, keys, head_dim, width = shape

    def array(*sizes: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype), sharding=sharding.replicated(mesh))

    rows = array(1, _HEADS, length, width)
    inputs = [array(1, _HEADS, maps, length, head_dim), array(1, 1, keys, length, head_dim), array(1, 1, length, width)]
    weight = array(1, _HEADS, 1, length, dtype="float32") if maps == 2 else None
    for sizes in CANDIDATES[length]:
        plan = flash.Plan(flash.Blocks(*sizes), flash.Blocks(*sizes), 100 * 2**20, interpret=False)

        def both(q, k, v, weight, segment_ids, d_context, plan=plan):
            attend = lambda *arrays: flash.flash(*arrays, segment_ids, plan)  # noqa: E731
            context, back = jax.vjp(attend, q, k, v, weight)
            return context, back(d_context)

        with jax.set_mesh(mesh):
            traced = jax.jit(both).trace(*inputs, weight, array(1, 1, length, dtype="int32"), rows)
            text = traced.lower().compile().as_text() or ""
        found = {name: _of_kernel(text, f"flash_{maps}_{name}") for name in ("forward", "backward")}
        print(json.dumps({"blocks": sizes, **found}), flush=True)


def _of_kernel(text: str, kernel: str) -> dict[str, int]:
    """Estimated cycles of one query head, and VMEM bytes, of the call of that kernel."""
    (call,) = (call for call in kernel_calls(text) if call.startswith("%") and kernel in call.split("=")[0])
    vmem = re.search(r'"used_scoped_memory_configs":\[[^\]]*?"size":"(\d+)"', call)
    assert vmem, call[-2000:]
    return {"cycles": cycles_of(call) // _HEADS, "vmem": int(vmem[1])}


def kernel_calls(text: str) -> list[str]:
    """The calls of Pallas kernels in a program, without the kernels."""
    instructions = re.split(r"\n  (?=%|ROOT)", re.sub(r'"body":"[^"]*"', "", text))
    return [instruction for instruction in instructions if "tpu_custom_call" in instruction]


def cycles_of(call: str) -> int:
    """What the simulator estimates for a call."""
    cycles = re.search(r'"bundle_analysis_data":\{[^}]*"estimated_cycles":"(\d+)"', call)
    assert cycles, call[-2000:]
    return int(cycles[1])


def simulator(family: str, folder: str) -> dict[str, str]:
    """The environment that makes the compiler simulate its kernels; what it dumps goes to the folder."""
    flags = [f"--xla_jf_dump_static_llo_profile_to={folder}"]
    if family == "v5e":  # the simulator knows no copies from where the compiler would put small operands
        flags.append("--xla_vf_vmem_memory_space_assignment=false")
    return {"LIBTPU_INIT_ARGS": " ".join(flags)}


def best_of(family: str, shape: tuple[int, int, int, int], length: int) -> dict[str, object]:
    """The row of the table for that shape, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [family, json.dumps(shape), str(length)]
        done = subprocess.run(
            [sys.executable, __file__, "--measure", *arguments],
            env={**os.environ, **simulator(family, folder)},
            capture_output=True,
            text=True,
        )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not found:
        raise RuntimeError(f"{family} {shape} {length}: {done.stderr[-2000:]}")
    row: dict[str, object] = {"chip": CHIPS[family], "dtype": "bfloat16"}
    row |= dict(zip(("maps", "keys", "head_dim", "width"), shape, strict=True)) | {"length": length}
    for which in ("forward", "backward"):
        for one in found:
            print(family, shape, length, one["blocks"], which, one[which], flush=True)
        chosen = min((one for one in found if one[which]["cycles"]), key=lambda one: one[which]["cycles"])
        row[which] = {"blocks": chosen["blocks"], **chosen[which]}
    return row


def _key(row: dict[str, object]) -> str:
    return json.dumps([row[name] for name in ("chip", "dtype", "maps", "keys", "head_dim", "width", "length")])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write each row into MaxText/kernels/flash_blocks.json")
    parser.add_argument("--measure", nargs=3, metavar=("FAMILY", "SHAPE", "LENGTH"), help=argparse.SUPPRESS)
    parser.add_argument("--family", action="append", choices=CHIPS, help="only this one")
    parser.add_argument("--shape", action="append", type=json.loads, help="only this one, such as [1,1,128,128]")
    arguments = parser.parse_args()
    from MaxText.aot import topologies
    from MaxText.kernels import flash_blocks

    topologies.prepare_environment(os.environ)
    if arguments.measure:
        family, shape, length = arguments.measure
        measure(family, tuple(json.loads(shape)), int(length))
        return 0
    table = {_key(row): row for row in json.loads(flash_blocks.PATH.read_text())}
    for family in arguments.family or CHIPS:
        for shape in arguments.shape or SHAPES:
            for length in CANDIDATES:
                row = best_of(family, tuple(shape), length)
                table[_key(row)] = row
                if arguments.write:
                    lines = ",\n".join(f" {json.dumps(row)}" for _, row in sorted(table.items()))
                    flash_blocks.PATH.write_text(f"[\n{lines}\n]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
