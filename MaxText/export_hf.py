"""Exports a model for Hugging Face's transformers: python MaxText/export_hf.py RUN OUT; --help says more."""

import logging
import os
import sys

if __spec__ is None:  # run as a file: its folder is on the path, where the project's root must be
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main(argv: list[str]) -> int:
    """The exit code: 0 exported, 1 the run or the directory cannot be used, 2 the command is not understood."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # files are read and written: no accelerator is needed
    from MaxText import hf_export

    try:
        return hf_export.main(argv, print)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
