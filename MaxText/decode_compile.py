"""Compiles generation for a TPU without one: python MaxText/decode_compile.py configs/x.yml compile_topology=v6e-1."""

import logging
import os
import sys

if __spec__ is None:  # run as a file: its folder is on the path, where the project's root must be
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main(argv: list[str]) -> int:
    """The exit code: 0 it fits, 1 it does not or cannot be compiled, 2 a config that cannot be."""
    from MaxText import pyconfig
    from MaxText.aot import topologies

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    topologies.prepare_environment(os.environ)
    config = pyconfig.config_or_exit_code(argv, os.environ)
    if isinstance(config, int):
        return config

    import jax

    from MaxText.aot import decode

    try:
        return decode.run(config, print)
    except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
