"""Compiles the step that training runs, for a TPU topology, and reports what the compiler made of it."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from MaxText import train_report
from MaxText.aot import executable, report, sweep, topologies
from MaxText.job import Job, lower, make_job


def run(config: FrozenConfigDict, arguments: Sequence[str], emit: Callable[[str], None]) -> int:
    """Compiles, prints the report in words, and writes it as JSON; the exit code says whether the step fits.

    Args:
        arguments: the command line that gave the config; a sweep repeats it.

    Raises:
        ValueError: an unknown topology, a config that does not fit it, or no compiler.
        jax.errors.JaxRuntimeError: the compiler refuses, and not for want of memory.
    """
    if config.sweep:
        return _sweep(config, arguments, emit)
    topology, slices = _topology(config), config.compile_topology_num_slices
    job, lowered = lowered_step(config)
    compiled, found = _compiled(job, lowered, topology)
    for line in report.describe(found):
        emit(line)
    name = f"{config.compile_topology}-{slices}slices" if slices > 1 else config.compile_topology
    path = job.directory / "compile" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    emit(f"The same as JSON: {path}")
    if compiled is not None and config.compiled_trainstep_file:
        saved = Path(config.compiled_trainstep_file).expanduser()
        size = executable.save(saved, job, lowered, compiled)
        emit(f"Executable: {saved} ({size / 2**20:.1f} MiB); train.py with the same keys loads it")
    return 0 if found["memory"]["fits"] else 1


def lowered_step(config: FrozenConfigDict) -> tuple[Job, jax.stages.Lowered]:
    """The job on the topology of the config, and its step before it is compiled; errors as for `run`."""
    devices = topologies.devices(_topology(config), config.compile_topology_num_slices)
    job, _ = make_job(config, devices).settled(num_windows=None)
    return job, lower(job)


def _compiled(
    job: Job, lowered: jax.stages.Lowered, topology: topologies.Topology
) -> tuple[jax.stages.Compiled | None, dict[str, Any]]:
    """The step and the report; no step where memory does not suffice."""
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not re.search(r"RESOURCE_EXHAUSTED.*memory (on|in memory space) hbm", str(error), re.IGNORECASE):
            raise
        return None, report.refusal(job, topology, str(error), time.perf_counter() - begin)
    return compiled, report.report(job, topology, compiled, time.perf_counter() - begin)


def _topology(config: FrozenConfigDict) -> topologies.Topology:
    if not config.compile_topology:
        raise ValueError("compile_topology is not given; such as compile_topology=v5e-8 or v6e-1")
    return topologies.parse(config.compile_topology)


def _sweep(config: FrozenConfigDict, arguments: Sequence[str], emit: Callable[[str], None]) -> int:
    directory = Path(config.base_output_directory).expanduser() / config.run_name
    folder = directory / "compile" / f"sweep-{config.compile_topology}-{sweep_digest(config)}"
    return sweep.run(config, arguments, folder, _topology(config).chips, emit)


def sweep_digest(config: FrozenConfigDict) -> str:
    """What the results of a sweep hang on beside the swept values: the other keys, versions, the commit if known."""
    values = {key: value for key, value in config.to_dict().items() if key != "sweep"}
    basis = [values, executable.versions(), train_report.git_commit(report.ROOT)]
    return hashlib.sha256(json.dumps(basis, sort_keys=True, default=str).encode()).hexdigest()[:8]
