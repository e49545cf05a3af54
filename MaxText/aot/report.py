"""What a compiled step needs and costs, as numbers and in words. Every time in it is an estimate, and is called one."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from MaxText import compiler_options, config_rules, flops, train_report
from MaxText.aot import cost, hlo
from MaxText.aot.topologies import Topology
from MaxText.job import Job

ROOT = str(Path(__file__).resolve().parents[2])
LARGEST = 10
_NO_ARRAY = {"tuple", "get-tuple-element", "bitcast", "while", "call", "conditional"}
_Array = tuple[str, str, tuple[int, ...]]  # the line that makes it, dtype, dimensions
TRUST = (
    "Estimated times are the compiler's cycle counts for matrix products, its simulator's for our Pallas kernels and "
    "published bandwidth for the rest; no TPU has confirmed them. What is known of them:"
)
CALIBRATION = (
    ("bfloat16 product of 4096 x 4096, v5e", "1,083,068 cycles counted, 1,080,195 simulated: 97% of the peak"),
    ("the same, v6e", "301,616 cycles counted, 279,025 simulated: 94% of the peak"),
    ("fusions with a matrix product", "0.98 to 1.4 x the simulator's cycles"),
    ("elementwise work and AdamW", "3 to 5 x the simulator's cycles: so bytes are counted instead"),
    (
        "collectives",
        "assumed: one at a time, in a ring over two of a chip's four links (100 GB/s on v5e, 200 on v6e); between "
        "slices 3.1 and 12.5 GB/s a chip",
    ),
    ("copies to the host's memory and back", "assumed: 16 GB/s a chip, as eight lanes of PCIe 4.0 have"),
    ("a kernel that only copies", "2 x too fast in the simulator: so its bytes are the least that a kernel takes"),
)


def report(job: Job, topology: Topology, compiled: jax.stages.Compiled, seconds: float) -> dict[str, Any]:
    """The numbers: memory, work, time; JSON values only."""
    text = compiled.as_text()
    assert text is not None
    module = hlo.parse(text)
    chip = topology.chip
    slices = dict(zip(job.mesh.axis_names, config_rules.slices(job.config), strict=True))
    within = {axis: size // slices[axis] for axis, size in job.mesh.shape.items()}
    spent = cost.account(module, topology.family, chip.hbm_bandwidth, within, slices)
    step = spent.matmul_seconds + spent.memory_seconds + spent.pallas_seconds + spent.exposed_seconds
    model_flops = train_report.model_flops_per_token(job.config) * job.tokens_per_step / job.mesh.size
    return {
        **_heading(job, topology, seconds),
        "memory": _memory(job, compiled, module, chip.hbm_bytes),
        "model_flops_per_device": model_flops,
        "peak_flops": chip.peak_flops,
        "hbm_bytes_per_step": spent.hbm_bytes,
        "plain_sum_megacycles": round(spent.plain_cycles / 1e6, 2),
        "estimated_seconds": {
            "matmul": spent.matmul_seconds,
            "memory": spent.memory_seconds,
            "pallas": spent.pallas_seconds,
            "communication": sum(c.seconds for c in spent.collectives.values()),
            "exposed_communication": spent.exposed_seconds,
            "step": step,
        },
        "bounds_seconds": {
            "flops": model_flops / chip.peak_flops,
            "hbm": least_hbm_bytes(job) / chip.hbm_bandwidth,
            "hbm_of_program": spent.hbm_bytes / chip.hbm_bandwidth,
        },
        "estimated_mfu": model_flops / chip.peak_flops / step,
        "estimated_tokens_per_second_per_device": job.tokens_per_step / job.mesh.size / step,
        "pallas_calls": spent.pallas_calls,
        "pallas_unknown": list(spent.pallas_unknown),
        "flags": {
            "compiler_options": compiler_options.options(topology.family, job.config.compile_xla_flags),
            **{name: os.environ[name] for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if name in os.environ},
        },
        "collectives": [
            {
                "kind": kind,
                "axes": axes,
                "count": c.count,
                "bytes": c.bytes,
                "seconds": c.seconds,
                "exposed": c.exposed_seconds,
            }
            for (kind, axes), c in sorted(spent.collectives.items())
        ],
    }


def refusal(job: Job, topology: Topology, error: str, seconds: float) -> dict[str, Any]:
    """The numbers of a step that the compiler refuses for want of HBM: by arithmetic, and what its error tells.

    Args:
        error: the compiler's, in which it may list its largest allocations.
    """
    memory = {"fits": False, "limit": topology.chip.hbm_bytes, "refused": error.splitlines()[0].rstrip(".")}
    return {
        **_heading(job, topology, seconds),
        "memory": memory | _state_bytes(job) | {"largest": allocations(error)},
    }


def allocations(error: str) -> list[dict[str, Any]]:
    """The allocations that the compiler lists where memory runs out, the largest first; empty where it lists none."""
    found = []
    for entry in re.split(r"\n\s*\d+\. Size: ", error)[1:]:
        size = re.match(r"([\d.]+)([KMG]?)", entry)
        array = re.search(r"Shape: (\w+\[[\d,]*\])", entry)
        source = re.search(r'source_file="([^"]*)" source_line=(\d+)', entry)
        name = re.search(r'op_name="([^"]*)"', entry)
        if size and array:
            place = f"{source[1].removeprefix(ROOT).lstrip('/')}:{source[2]}" if source else name[1] if name else ""
            scale = 2 ** {"": 0, "K": 10, "M": 20, "G": 30}[size[2]]
            found.append({"bytes": int(float(size[1]) * scale), "array": array[1], "source": place})
    return found[:LARGEST]


def _heading(job: Job, topology: Topology, seconds: float) -> dict[str, Any]:
    return {
        "topology": topology.name,
        "devices": job.mesh.size,
        "mesh": dict(job.mesh.shape),
        "parameters": flops.count_parameters(job.abstract_state.params).total,
        "tokens_per_step": job.tokens_per_step,
        "compile_seconds": round(seconds, 1),
    }


def describe(found: Mapping[str, Any]) -> list[str]:
    """The report in words."""
    lines = _describe_memory(found)
    return lines if "refused" in found["memory"] else lines + _describe_cost(found)


def _describe_memory(found: Mapping[str, Any]) -> list[str]:
    memory = found["memory"]
    refused = memory.get("refused")
    peak = refused or f"{_size(memory['peak'])} at the peak"
    temporary = "" if refused else f", temporary {_size(memory['temporary'])}"
    lines = [
        f"{found['topology']}: {found['devices']} devices, mesh "
        + " x ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
        + f"; compiled in {found['compile_seconds']} s",
        f"{found['parameters']:,} parameters; {found['tokens_per_step']:,} tokens a step",
        f"Memory per device: {'fits' if memory['fits'] else 'DOES NOT FIT'}: {peak}, of {_size(memory['limit'])}; "
        f"parameters {_size(memory['parameters'])}, optimizer {_size(memory['optimizer'])}, gradients "
        f"{_size(memory['gradients'])}{temporary}",
    ]
    if memory["largest"]:
        lines.append(f"The {len(memory['largest'])} largest arrays, which need not be alive at once:")
    lines += [f"{_size(b['bytes']):>12}  {b['array']}  {b['source']}" for b in memory["largest"]]
    if refused or memory["peak"] > 0.9 * memory["limit"]:
        lines.append(
            "To need less: remat_policy=full, a smaller per_device_batch_size with more gradient_accumulation_steps, "
            "a larger num_vocab_tiling, or more devices along fsdp"
        )
    return lines


def _describe_cost(found: Mapping[str, Any]) -> list[str]:
    seconds, bounds = found["estimated_seconds"], found["bounds_seconds"]
    rate = found["estimated_tokens_per_second_per_device"]
    lines = [
        f"Work per device: {found['model_flops_per_device'] / 1e12:.3f} TFLOP of the model, at "
        f"{found['peak_flops'] / 1e12:.0f} TFLOP/s (the denominator of MFU) at least {_ms(bounds['flops'])}; weights, "
        f"optimizer state and layer inputs through HBM once, at least {_ms(bounds['hbm'])}",
        f"Estimated step: {_ms(seconds['step'])}, {seconds['step'] / max(bounds['flops'], bounds['hbm']):.2f} x the "
        f"larger bound = matrix products {_ms(seconds['matmul'])} + memory {_ms(seconds['memory'])} + Pallas kernels "
        f"{_ms(seconds['pallas'])} + exposed communication {_ms(seconds['exposed_communication'])}; "
        f"{found['hbm_bytes_per_step'] / 1e9:.2f} GB through HBM, which alone take {_ms(bounds['hbm_of_program'])}",
        f"Estimated MFU {found['estimated_mfu']:.1%}, {rate:,.0f} tokens/s per device"
        + "".join(f"; of {kernel} only the bytes count" for kernel in found["pallas_unknown"]),
        f"Sum of the compiler's estimated cycles: {found['plain_sum_megacycles']} million, without Pallas kernels",
        *(
            f"Communication: {c['count']} x {c['kind']} over {c['axes']}: {_size(c['bytes'])}, estimated "
            f"{_ms(c['seconds'])}, exposed {_ms(c['exposed'])}"
            for c in found["collectives"]
        ),
    ]
    flags = found["flags"]["compiler_options"]
    lines.append("XLA options: " + (" ".join(f"{name}={value}" for name, value in flags.items()) or "the defaults"))
    lines += [f"{name}: {value}" for name, value in found["flags"].items() if name != "compiler_options"]
    return [*lines, TRUST, *(f"  {case}: {known}" for case, known in CALIBRATION)]


def least_hbm_bytes(job: Job) -> int:
    """What a step of one device must move through HBM, by arithmetic, whatever the compiler makes of it.

    Weights and optimizer state are read and written once, gradients written and read once, weights read once more for
    each backward and forward pass, and each layer's input written and read once.
    """
    config = job.config
    passes = config.gradient_accumulation_steps
    weights, optimizer = _device_bytes(job.abstract_state.params), _device_bytes(job.abstract_state.opt_state)
    tokens = job.tokens_per_step // job.mesh.size
    inputs = tokens * config.base_num_decoder_layers * config.base_emb_dim * jnp.dtype(config.dtype).itemsize
    return 2 * (weights + optimizer) + 2 * weights + 2 * passes * weights + 2 * inputs


def _memory(job: Job, compiled: jax.stages.Compiled, module: hlo.Module, limit: int) -> dict[str, Any]:
    stats, arrays = compiled.memory_analysis(), arrays_in_hbm(module)
    assert stats is not None
    return {
        "fits": stats.peak_memory_in_bytes <= limit,
        "limit": limit,
        "peak": stats.peak_memory_in_bytes,
        **_state_bytes(job),
        "temporary": stats.temp_size_in_bytes,
        "largest": _largest(arrays),
        "vocabulary_float32": vocabulary_float32(arrays, job.config.vocab_size),
    }


def _largest(arrays: Mapping[_Array, int]) -> list[dict[str, Any]]:
    """The largest arrays, each with the line that makes it; not all of them are alive at once."""
    ranked = sorted(arrays.items(), key=lambda item: -item[1])[:LARGEST]
    return [{"bytes": size, "array": _name(dtype, dims), "source": source} for (source, dtype, dims), size in ranked]


def vocabulary_float32(arrays: Mapping[_Array, int], vocab_size: int) -> dict[str, int]:
    """How many float32 arrays of each shape have a dimension as large as the vocabulary: all, not the largest ten."""
    wide = [_name(dtype, dims) for _, dtype, dims in arrays if dtype == "f32" and max(dims, default=0) >= vocab_size]
    return {name: wide.count(name) for name in sorted(set(wide))}


def arrays_in_hbm(module: hlo.Module) -> dict[_Array, int]:
    """The bytes of every array in HBM; several of one shape that one line makes count as one."""
    return {
        (module.source(instruction, ROOT), shape.dtype, shape.dims): shape.bytes
        for instruction, _ in module.scheduled()
        if instruction.opcode not in _NO_ARRAY
        for shape in instruction.shapes
        if shape.in_hbm
    }


def _name(dtype: str, dims: tuple[int, ...]) -> str:
    return f"{dtype}[{','.join(map(str, dims))}]"


def _state_bytes(job: Job) -> dict[str, int]:
    """Bytes on one device, by arithmetic; gradients are float32."""
    params = job.abstract_state.params
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), params)
    return {
        "parameters": _device_bytes(params),
        "optimizer": _device_bytes(job.abstract_state.opt_state),
        "gradients": _device_bytes(whole),
    }


def _device_bytes(tree: Any) -> int:
    """Bytes of a tree on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
