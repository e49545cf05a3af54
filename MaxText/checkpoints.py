"""Looks at checkpoints: python MaxText/checkpoints.py {list,verify,inspect} <run directory, or one step of it>."""

import os
import sys

if __spec__ is None:  # run as a file: its folder is on the path, where the project's root must be
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main(argv: list[str]) -> int:
    """The exit code: 0, or 1 where a checkpoint is damaged or there is none, or 2 for a wrong command."""
    from MaxText import checkpoint_report

    return checkpoint_report.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
