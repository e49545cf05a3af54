"""The XLA options that each generation of TPU is compiled with: one table, each entry with its effect.

The training step carries them (`jax.jit(..., compiler_options=...)`), so that what runs and what is compiled for a TPU
that is not there are one program, whatever the environment says.
"""

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
            "v6e-1 2,732 -> 2,331 ms estimated, 1.07B standard 261 -> 250, validate_10m as before; compilation takes "
            "1.7 to 2.5 times as long",
        ),
    },
}


def options(family: str | None, flags: str) -> dict[str, str]:
    """What to pass to `jax.jit`: the table's for this family, if it knows it, and over them the words of `flags`.

    Args:
        flags: name=value, with or without two dashes, spaces between them.
    """
    table = {name: value for name, (value, _) in TABLE.get(family or "", {}).items()}
    return table | dict(word.removeprefix("--").split("=", 1) for word in flags.split())
