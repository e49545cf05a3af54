"""The XLA options that each generation of TPU is compiled with: one table, each entry with its effect.

The training step carries them (`jax.jit(..., compiler_options=...)`), so that what runs and what is compiled for a TPU
that is not there are one program, whatever the environment says.
"""

from collections.abc import Mapping

# family -> option -> (value, effect)
TABLE: dict[str, dict[str, tuple[str, str]]] = {
    "v5e": {
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": (
            "1000000",
            "under fsdp, weights arrive in all-gathers beside matrix products and not in chains of permutes; without "
            "fsdp nothing changes (validate_10m: 12.97 million cycles with it and without)",
        ),
    },
    "v6e": {
        "xla_tpu_scoped_vmem_limit_kib": (
            "65536",
            "half of VMEM for one operation, and not a quarter: products read their operands less often. PythonLM on "
            "v6e-1, full remat, 2,732 -> 2,331 ms estimated, 1.07B standard 261 -> 250, validate_10m as before; "
            "compilation takes 1.7 to 2.5 times as long",
        ),
    },
}


def of_one_run(platform: str, environ: Mapping[str, str]) -> dict[str, str]:
    """What to pass to `jax.jit` for a program that runs once, unless XLA_FLAGS say something of it.

    On a CPU LLVM's first level of optimization: validate_10m's first state is compiled in 0.9 s and not in 2.0, and
    made in the same 0.24 s, bit for bit.
    """
    option = "xla_backend_optimization_level"
    return {option: "1"} if platform == "cpu" and option not in environ.get("XLA_FLAGS", "") else {}


def options(family: str | None, flags: str) -> dict[str, str]:
    """What to pass to `jax.jit`: the table's for this family, if it knows it, and over them the words of `flags`.

    Args:
        flags: name=value, with or without two dashes, spaces between them.
    """
    table = {name: value for name, (value, _) in TABLE.get(family or "", {}).items()}
    return table | dict(word.removeprefix("--").split("=", 1) for word in flags.split())
