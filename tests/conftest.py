"""What every test runs under: 8 CPU devices, rank promotion an error, array shapes checked, compiled programs kept.

The settings are environment variables, because JAX reads them when it is imported and most tests of data and
configuration never import it. Subprocesses that should see what a user sees take `user_environment` instead: all of
it but the optimizing compiler, which those that need it ask for by removing XLA_FLAGS.
"""

import importlib.util
import os
import pathlib
import sys
from importlib.metadata import version

import jaxtyping
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

TEST_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    # Most of a test's time is LLVM optimizing programs that run once, on a few numbers.
    # With the older emitters the step of PythonLM's test compiles in 3.5 s, with those through MLIR in 6.0.
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false",
    # A largest size makes JAX lock the folder, so that parallel workers can share it.
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"),
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}

# The workers of pytest-xdist inherit the environment with the additions, so what was added is noted there too.
_ADDED = os.environ.setdefault("TESTS_ADDED", " ".join(sorted(TEST_ENVIRONMENT.keys() - os.environ.keys()))).split()
os.environ.update({name: TEST_ENVIRONMENT[name] for name in _ADDED})

# Of the tests only, because what they start should have what a user has.
sys.path.append(str(ROOT / ".venv" / "torch"))

# Annotations such as Float[Array, "B T D"] become checks, here only: at run time they cost nothing.
jaxtyping.install_import_hook("MaxText", "beartype.beartype")


@pytest.fixture
def user_environment() -> dict[str, str]:
    """The environment without what this file added to it, for subprocesses that stand for a user's command.

    But for XLA_FLAGS: their programs are small and run once, too. A test of what users compile removes it.
    """
    added = {*_ADDED, "TESTS_ADDED", "PYTHONPATH"} - {"XLA_FLAGS"}
    return {name: value for name, value in os.environ.items() if name not in added}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    torch = f"PyTorch {version('torch')}" if importlib.util.find_spec("torch") else "no PyTorch: parity tests skipped"
    terminalreporter.write_line(
        f"JAX {version('jax')} on {os.environ['JAX_PLATFORMS']}, {os.environ['JAX_NUM_CPU_DEVICES']} CPU devices; "
        f"shapes checked by beartype {version('beartype')}; {torch}"
    )
