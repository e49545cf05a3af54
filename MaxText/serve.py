"""Serves a run on this machine, as OpenAI's completions API: python MaxText/serve.py RUN [key=value ...]."""

import logging
import os
import sys

if __spec__ is None:  # run as a file: its folder is on the path, where the project's root must be
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

USAGE = """\
usage: python MaxText/serve.py RUN [serve_port=8000] [key=value ...]

RUN is a run's directory, one of its checkpoints, or a config. Keys: the sections Generation and Serving of
configs/base.yml; those of Generation are what a request gets that says nothing else."""


def main(argv: list[str]) -> int:
    """The exit code: 0 done, 1 failed, 2 a command that cannot be."""
    if not argv or {"--help", "-h"} & set(argv):
        print(USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    import jax

    from MaxText import pyconfig
    from MaxText.inference import runs, server

    try:
        run = runs.find(argv)
        loaded = runs.load(run, run.newest())
        server.serve(loaded, run.directory.name, lambda line: print(line, flush=True))
    except pyconfig.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
