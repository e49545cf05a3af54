"""Published figures of the chips this project runs on: peak FLOP/s, memory, bandwidth.

Input is JAX's `device_kind`; output a `Chip`, or None for a chip the table does not know, so that a caller measures
instead of guessing. Peaks are dense bfloat16 without sparsity.
"""

import dataclasses
import functools
import time
from collections.abc import Collection
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator as JAX sees it: a device."""

    name: str
    peak_flops: float  # dense bfloat16 FLOP/s
    hbm_bytes: int
    hbm_bandwidth: float  # bytes/s
    source: str


_GIB = 1024**3

# Keyed by the beginning of `jax.Device.device_kind`, in lower case; the first match wins.
CHIPS = {
    "tpu v5 lite": Chip("v5e", 197e12, 16 * _GIB, 819e9, "Google Cloud TPU v5e system architecture"),
    "tpu v5e": Chip("v5e", 197e12, 16 * _GIB, 819e9, "Google Cloud TPU v5e system architecture"),
    "tpu v6 lite": Chip("v6e", 918e12, 32 * _GIB, 1638e9, "Google Cloud TPU v6e system architecture"),
    "tpu v6e": Chip("v6e", 918e12, 32 * _GIB, 1638e9, "Google Cloud TPU v6e system architecture"),
    "nvidia h200": Chip("h200", 989e12, 141 * 10**9, 4.8e12, "NVIDIA H200 data sheet, dense bfloat16"),
    "nvidia h100 80gb hbm3": Chip("h100", 989e12, 80 * 10**9, 3.35e12, "NVIDIA H100 data sheet, SXM, dense bfloat16"),
    "nvidia a100": Chip("a100", 312e12, 80 * 10**9, 2.0e12, "NVIDIA A100 data sheet, dense bfloat16"),
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip of that name, or None where no published figure is known."""
    kind = device_kind.lower()
    return next((chip for prefix, chip in CHIPS.items() if kind.startswith(prefix)), None)


def cpu_multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has matrix units for bfloat16 (Intel AMX), so that it beats float32; Linux only."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False


def measure_matmul_flops(dtypes: Collection[str], size: int = 768) -> float:
    """FLOP/s of a square product, summed in float32, on the default device: the best try of the best dtype."""
    import jax
    import jax.numpy as jnp

    multiply = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    seconds = []
    for dtype in dtypes:
        x = jnp.ones((size, size), dtype)
        jax.block_until_ready(multiply(x, x))
        for _ in range(6):
            begin = time.perf_counter()
            jax.block_until_ready(multiply(x, x))
            seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)
