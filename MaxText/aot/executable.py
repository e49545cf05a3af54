"""A compiled training step in a file: train_compile.py writes it, and train.py loads it instead of compiling.

A line of JSON says what was compiled and by which versions, the executable follows. A run whose own step is another one
says how it differs and compiles. The executable is code and is run: load no file that you did not make.
"""

import hashlib
import importlib.util
import json
import re
from importlib import metadata
from pathlib import Path

import jax
from jax.experimental import serialize_executable

from MaxText import compiler_options, hardware, kernels
from MaxText.job import Job


def save(path: Path, job: Job, lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> int:
    """Writes the job's compiled step; the size of the executable in bytes."""
    payload, _, _ = serialize_executable.serialize(compiled)
    head = {"executable": hashlib.sha256(payload).hexdigest(), "of": identity(job, lowered)}
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(json.dumps(head).encode() + b"\n" + payload)
    partial.replace(path)
    return len(payload)


def load_or_compile(job: Job, lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, list[str]]:
    """The job's step, from `compiled_trainstep_file` where that holds this very step, and in words where it is from."""
    name = job.config.compiled_trainstep_file
    if not name:
        return lowered.compile(), []
    try:
        return _load(Path(name).expanduser(), job, lowered), [f"The step was not compiled but loaded from {name}"]
    except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
        return lowered.compile(), [f"compiled_trainstep_file={name} was not used, and the step was compiled: {error}"]


def _load(path: Path, job: Job, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The step in the file.

    Raises:
        ValueError: it is damaged, or another step than the job's; with what differs.
        OSError: it cannot be read.
        jax.errors.JaxRuntimeError: the devices do not take it.
    """
    line, _, payload = path.read_bytes().partition(b"\n")
    try:
        head = json.loads(line)
        digest, saved = head["executable"], dict(head["of"])
    except (ValueError, KeyError, TypeError):
        raise ValueError("it is no file of train_compile.py") from None
    if hashlib.sha256(payload).hexdigest() != digest:
        raise ValueError("it is damaged")
    for what, mine in identity(job, lowered).items():
        if saved.get(what) != mine:
            raise ValueError(f"{what} of its step: {saved.get(what)}; of this run's: {mine}")
    devices = list(job.mesh.devices.flat)
    trees = jax.tree.structure(lowered.args_info), lowered.out_tree
    return serialize_executable.deserialize_and_load(
        payload, *trees, backend=devices[0].client, execution_devices=devices
    )


def versions() -> str:
    """What a compiled program depends on beside itself: JAX and its compilers."""
    packages = [name for name in ("jax", "jaxlib", "libtpu") if importlib.util.find_spec(name)]
    return ", ".join(f"{name} {metadata.version(name)}" for name in packages)


def identity(job: Job, lowered: jax.stages.Lowered) -> dict[str, str]:
    """What two steps that compile to the same executable have in common; the program holds all that the config says."""
    devices = job.mesh.devices
    kind = devices.flat[0].device_kind
    chip = hardware.find_chip(kind)
    options = compiler_options.options(chip.name if chip else None, job.config.compile_xla_flags)
    return {
        "the topology": f"{kind}, {' x '.join(map(str, devices.shape))}",
        "the versions": versions(),
        "the compiler options": " ".join(f"{name}={value}" for name, value in options.items()),
        "the program": digest(lowered.as_text()),
    }


def digest(program: str) -> str:
    """Of a lowered program; of its kernels the sources, because a kernel's body holds paths of this machine."""
    sources = sorted(path for path in Path(kernels.__path__[0]).iterdir() if path.suffix in (".py", ".json"))
    parts = [re.sub(r"\\22body\\22: \\22[^\\]*", "", program).encode(), *(path.read_bytes() for path in sources)]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
