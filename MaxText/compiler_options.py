"""The XLA options that each generation of TPU is compiled with: one table, each entry with its effect.

The training step carries them (`jax.jit(..., compiler_options=...)`), so that what runs and what is compiled for a TPU
that is not there are one program, whatever the environment says.
"""

# family -> option -> (value, effect)
TABLE: dict[str, dict[str, tuple[str, str]]] = {"v5e": {}, "v6e": {}}


def options(family: str | None) -> dict[str, str]:
    """What to pass to `jax.jit`; nothing for a platform that the table does not know."""
    return {name: value for name, (value, _) in TABLE.get(family or "", {}).items()}
