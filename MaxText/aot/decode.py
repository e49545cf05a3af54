"""Compiles the steps of generation for a TPU topology, and sets the compiler's estimate beside what memory allows.

A step must read every weight of its products and every place of the memories that may be seen: at the published
bandwidth that takes the least time there can be, the roofline. The compiler's cycles of a product do not count the
weights it waits for, so the estimate is never less than what the program's own bytes take.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from MaxText import compiler_options, config_rules, schedule_plan, sharding
from MaxText.aot import cost, hlo, topologies
from MaxText.inference import batcher, weights
from MaxText.inference.program import Program, Rows


def compile_steps(config: FrozenConfigDict) -> dict[str, Any]:
    """The report on `decode_rows` rows with memories of max_target_length places; JSON values only.

    Raises:
        ValueError: an unknown topology, a config that does not fit it, or no compiler.
        jax.errors.JaxRuntimeError: the compiler refuses, for want of memory as a rule.
    """
    if not config.compile_topology:
        raise ValueError("compile_topology is not given; such as compile_topology=v5e-1 or v6e-1")
    topology = topologies.parse(config.compile_topology)
    sizes = [config[key] for key in config_rules.MESH_KEYS]
    mesh = sharding.make_mesh(sizes, topologies.devices(topology, num_slices=1))
    program = Program(config, mesh, config.speculative_tokens)
    with jax.set_mesh(mesh):
        params = weights.abstract_params(config, program.model, mesh)
        read = jax.eval_shape(weights.layer_by_layer, params)
        rows = jax.eval_shape(lambda: program.empty_rows(config.decode_rows, config.max_target_length))
        placed = [_placed(tree, mesh) for tree in (read, rows)]
        lowered = program.write.lower(*placed, batcher.STEPS)
    begin = time.perf_counter()
    options = compiler_options.options(topology.family, config.compile_xla_flags)
    compiled = lowered.compile(compiler_options={**options})
    return _report(config, topology, mesh, compiled, read, rows, time.perf_counter() - begin)


def _placed(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """On one device everything lies there; on more, as the program's own constraints put it."""
    everywhere = sharding.replicated(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), tree)


def _report(
    config: FrozenConfigDict,
    topology: topologies.Topology,
    mesh: jax.sharding.Mesh,
    compiled: jax.stages.Compiled,
    read: weights.Weights,
    rows: Rows,
    seconds: float,
) -> dict[str, Any]:
    text, stats, chip = compiled.as_text(), compiled.memory_analysis(), topology.chip
    assert text is not None and stats is not None
    spent = cost.account(hlo.parse(text), topology.family, chip.hbm_bandwidth, dict(mesh.shape))
    computing = spent.matmul_seconds + spent.memory_seconds + spent.exposed_seconds
    step = max(computing, spent.hbm_bytes / chip.hbm_bandwidth) / batcher.STEPS
    rest = read.rest if config.logits_via_embedding else {**read.rest, "token_embedder": None}  # of it only rows
    weight_bytes, memory_bytes = _bytes((rest, read.layers)), _bytes(rows.memories.layers)
    least = (weight_bytes + memory_bytes) / chip.hbm_bandwidth
    return {
        "topology": topology.name,
        "rows": config.decode_rows,
        "places": config.max_target_length,
        "guesses": config.speculative_tokens,
        "compile_seconds": round(seconds, 1),
        "fits": stats.peak_memory_in_bytes <= chip.hbm_bytes,
        "peak_bytes": stats.peak_memory_in_bytes,
        "weight_bytes": weight_bytes,
        "memory_bytes": memory_bytes,
        "hbm_bytes_per_step": spent.hbm_bytes / batcher.STEPS,
        "computing_seconds_per_step": computing / batcher.STEPS,
        "estimated_seconds_per_step": step,
        "roofline_seconds_per_step": least,
        "estimated_tokens_per_second": config.decode_rows / step,
        "roofline_tokens_per_second": config.decode_rows / least,
    }


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def run(config: FrozenConfigDict, emit: Callable[[str], None]) -> int:
    """Compiles, prints the report in words, and writes it as JSON; the exit code says whether the program fits."""
    found = compile_steps(config)
    step, least = found["estimated_seconds_per_step"], found["roofline_seconds_per_step"]
    emit(
        f"{found['topology']}: {found['rows']} rows of {found['places']:,} places, {found['guesses']} guesses; "
        f"compiled in {found['compile_seconds']} s; {found['peak_bytes'] / 2**30:.2f} GiB at the peak, "
        f"{'fits' if found['fits'] else 'DOES NOT FIT'}"
    )
    emit(
        f"Estimated step: {1e3 * step:.2f} ms, {found['estimated_tokens_per_second']:,.0f} tokens/s: computing "
        f"{1e3 * found['computing_seconds_per_step']:.2f} ms, beside {found['hbm_bytes_per_step'] / 1e9:.2f} GB of HBM"
    )
    emit(
        f"Roofline: {found['weight_bytes'] / 1e9:.2f} GB of weights and {found['memory_bytes'] / 1e9:.2f} GB of "
        f"memories take at least {1e3 * least:.2f} ms, {found['roofline_tokens_per_second']:,.0f} tokens/s; the "
        f"estimate reaches {least / step:.0%} of that. No TPU has confirmed it"
    )
    name = f"decode-{config.compile_topology}-{config.decode_rows}.json"
    path = Path(schedule_plan.run_directory(config)) / "compile" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    emit(f"The same as JSON: {path}")
    return 0 if found["fits"] else 1
