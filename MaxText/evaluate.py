"""Scores checkpoints: python MaxText/evaluate.py RUN task=humaneval checkpoints=epochs [key=value ...]."""

import logging
import os
import sys

if __spec__ is None:  # run as a file: its folder is on the path, where the project's root must be
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

USAGE = """\
usage: python MaxText/evaluate.py RUN [task=humaneval|mbpp|infilling|heldout] [checkpoints=last|all|epochs|STEP] [...]
       python MaxText/evaluate.py branches RUN [as above: scores the run's decay branches, then as summary]
       python MaxText/evaluate.py summary RUN

RUN is a run's directory, one of its checkpoints, or a config. Keys: the sections Generation and Scoring checkpoints of
configs/base.yml. The same command goes on where it was interrupted."""


def main(argv: list[str]) -> int:
    """The exit code: 0 done, 1 failed, 2 a command that cannot be."""
    if not argv or {"--help", "-h"} & set(argv):
        print(USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    import jax

    from MaxText import pyconfig
    from MaxText.evaluation import checkpoints, score_report
    from MaxText.inference import runs

    def log(line: str) -> None:
        print(line, flush=True)

    try:
        if argv[0] in ("summary", "branches"):
            run = runs.find(argv[1:])
            if argv[0] == "branches":
                checkpoints.evaluate_branches(run, log)
            print("\n".join(score_report.summary(run.directory)))
        else:
            print(score_report.table(checkpoints.evaluate(runs.find(argv), log)))
    except pyconfig.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, jax.errors.JaxRuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
