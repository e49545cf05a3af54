"""Continues a prompt: python MaxText/decode.py RUN prompt="def fibonacci(n):" [key=value ...] [--interactive]."""

import logging
import os
import sys

if __spec__ is None:  # run as a file: its folder is on the path, where the project's root must be
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

USAGE = """\
usage: python MaxText/decode.py RUN prompt="def fibonacci(n):" [key=value ...] [--interactive]

RUN is a run's directory, one of its checkpoints, or a config. Keys: the section Generation of configs/base.yml."""


def main(argv: list[str]) -> int:
    """The exit code: 0 done, 1 failed, 2 a command that cannot be."""
    interactive = "--interactive" in argv
    words = [word for word in argv if word != "--interactive"]
    if not words or {"--help", "-h"} & set(words):
        print(USAGE, file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    import jax

    from MaxText import pyconfig
    from MaxText.inference import console, runs

    try:
        run = runs.find(words)
        step = run.newest()
        if not interactive and not run.config(step).prompt:
            print(f'error: no prompt is given; add prompt="..." or --interactive\n\n{USAGE}', file=sys.stderr)
            return 2
        loaded = runs.load(run, step)
        print(f"{run.step_directory(step)} on {jax.devices()[0].device_kind}", file=sys.stderr)
        console.run(loaded, interactive, lambda piece: print(piece, end="", flush=True), input)
    except pyconfig.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
