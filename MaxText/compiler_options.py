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
    "v6e": {},
}


def options(family: str | None) -> dict[str, str]:
    """What to pass to `jax.jit`; nothing for a platform that the table does not know."""
    return {name: value for name, (value, _) in TABLE.get(family or "", {}).items()}
