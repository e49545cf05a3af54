"""Compiles the step that training runs, for a TPU topology, and reports what the compiler made of it."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from ml_collections import FrozenConfigDict

from MaxText import compiler_options
from MaxText.aot import report, topologies
from MaxText.job import Job, lower, make_job


def compile_step(config: FrozenConfigDict) -> tuple[Job, jax.stages.Compiled, dict[str, Any]]:
    """The job on the config's topology, its compiled step, and the report.

    Raises:
        ValueError: an unknown topology, a config that does not fit it, or no compiler.
        jax.errors.JaxRuntimeError: the compiler refuses, for want of memory as a rule.
    """
    if not config.compile_topology:
        raise ValueError("compile_topology is not given; such as compile_topology=v5e-8 or v6e-1")
    topology = topologies.parse(config.compile_topology)
    job, _ = make_job(config, topologies.devices(topology)).settled(num_windows=None)
    lowered = lower(job)
    begin = time.perf_counter()
    compiled = lowered.compile(compiler_options={**compiler_options.options(topology.family)})
    return job, compiled, report.report(job, topology, compiled, time.perf_counter() - begin)


def run(config: FrozenConfigDict, emit: Callable[[str], None]) -> int:
    """Compiles, prints the report in words, and writes it as JSON; the exit code says whether the step fits."""
    job, compiled, found = compile_step(config)
    for line in report.describe(found):
        emit(line)
    path = job.directory / "compile" / f"{config.compile_topology}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    emit(f"The same as JSON: {path}")
    if config.compiled_trainstep_file:
        saved = Path(config.compiled_trainstep_file).expanduser()
        payload, _, _ = serialize_executable.serialize(compiled)
        saved.write_bytes(payload)
        emit(f"Executable: {saved} ({len(payload) / 2**20:.1f} MiB)")
    return 0 if found["memory"]["fits"] else 1
