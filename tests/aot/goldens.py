"""What the TPU compiler made of each config when someone last looked: python -m tests.aot.goldens [CASE] rewrites it.

In `goldens.txt`, one paragraph for each config and topology; the test compares them and shows the difference. Each says
which step it is of, as `compiled_trainstep_file` does: of that one the same compiler makes the same again, so it is
compiled only when the step has changed, or with LONG_TESTS=1.
"""

import difflib
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests import support
from tests.aot import flash_kernels

PATH = Path(__file__).with_name("goldens.txt")
ENVIRONMENT = flash_kernels.ENVIRONMENT
CASES: dict[str, tuple[str, ...]] = {
    "validate_10m on v5e-8": ("configs/validate_10m.yml", "compile_topology=v5e-8"),
    "pythonlm_1b on v6e-1": ("configs/pythonlm_1b.yml", "compile_topology=v6e-1"),
    "pythonlm_1b on v5e-8": ("configs/pythonlm_1b_v5e8.yml", "compile_topology=v5e-8"),
}
FLASH = "the flash kernels"


IDENTITY = """
import json, os, sys
from MaxText import pyconfig
from MaxText.aot import topologies
topologies.prepare_environment(os.environ)
from MaxText.aot import compile, executable
job, lowered = compile.lowered_step(pyconfig.initialize(sys.argv[1:], os.environ))
print(json.dumps(executable.identity(job, lowered)))
"""


def step(case: str) -> str:
    """The line that names the step before it is compiled: its topology, the compiler, the program; and our account."""
    command = [sys.executable, "-c", IDENTITY, *CASES[case]]
    done = subprocess.run(command, cwd=support.ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    readers = sorted([*(support.ROOT / "MaxText/aot").glob("*.py"), Path(__file__)])
    account = hashlib.sha256(b"".join(path.read_bytes() for path in readers)).hexdigest()[:8]
    return f"  the step: {', '.join(value for value in found.values() if value)}; accounted for by {account}"


def compiled(case: str) -> dict[str, Any]:
    """The report of train_compile.py, which runs as a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "MaxText/train_compile.py", *CASES[case], f"base_output_directory={folder}"]
        done = subprocess.run(command, cwd=support.ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        reports = list(Path(folder).glob("*/compile/*.json"))
        if not reports:
            raise RuntimeError(f"{case}: {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        return json.loads(reports[0].read_text())


def facts(case: str, found: dict[str, Any]) -> list[str]:
    """The lines of one paragraph but that of the step: what a change of sharding, memory or kernels would alter."""
    memory = found["memory"]
    if "refused" in memory:
        return [f"{case}: does not fit: {memory['refused']}"]
    lines = [
        f"{case}: {'fits' if memory['fits'] else 'does not fit'}, {_size(memory['peak'])} at the peak",
        *(f"  {c['count']} x {c['kind']} over {c['axes']}, {_size(c['bytes'])}" for c in found["collectives"]),
        *(f"  {times} x {kernel}" for kernel, times in sorted(found["pallas_calls"].items())),
    ]
    for array, count in memory["vocabulary_float32"].items():
        lines.append(f"  as large as the vocabulary: {count} x {array}")
    return [*lines, *sorted(f"  large: {b['array']} from {_place(b['source'])}" for b in memory["largest"])]


def paragraph(case: str) -> list[str]:
    """What there is to record.

    Raises:
        RuntimeError: the step was changed while it was compiled.
    """
    before, lines = step(case), facts(case, compiled(case))
    if step(case) != before:
        raise RuntimeError(f"{case}: the step was changed while it was compiled; nothing is recorded of it")
    return [*lines, before]


def _size(size: int) -> str:
    """To three digits: less would hide an array, more would change with every edit."""
    return f"{size / 2**30:.3g} GiB"


def _place(source: str) -> str:
    """The file, or the array of the state; what the compiler added itself has names that mean nothing."""
    return source.rsplit(":", 1)[0] if ".py:" in source or source.startswith("state.") else "the compiler"


def recorded() -> dict[str, list[str]]:
    """The paragraphs of the file, by case."""
    paragraphs = [block.splitlines() for block in PATH.read_text().split("\n\n")] if PATH.exists() else []
    return {lines[0].partition(":")[0]: lines for lines in paragraphs if lines}


def difference(old: list[str], new: list[str]) -> str:
    """What was and what is, in lines."""
    return "\n".join(difflib.unified_diff(old, new, "recorded", "now", lineterm="", n=99))


def main() -> None:
    paragraphs = recorded()
    for case in sys.argv[1:] or (FLASH, *CASES):
        new = flash_kernels.compiled(case) if case == FLASH else paragraph(case)
        print(difference(paragraphs.get(case, []), new) or f"{case}: as recorded", flush=True)
        paragraphs[case] = new
        PATH.write_text(
            "\n\n".join("\n".join(paragraphs[name]) for name in (FLASH, *CASES) if name in paragraphs) + "\n"
        )


if __name__ == "__main__":
    main()
