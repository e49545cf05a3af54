"""Trains a tokenizer: python MaxText/train_tokenizer.py configs/x.yml source=... out=...; see docs/data.md."""

import logging
import os
import sys

if __spec__ is None:  # run as a file: its folder is on the path, where the project's root must be
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main(argv: list[str]) -> int:
    """The exit code: 0 complete, 1 failed, 2 a config that cannot be."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    from MaxText import pyconfig

    config = pyconfig.config_or_exit_code(pyconfig.with_run_name(argv, "train_tokenizer"), os.environ)
    if isinstance(config, int):
        return config

    from MaxText.preparation import tokenizer_training

    try:
        return tokenizer_training.train(config, lambda line: print(line, flush=True))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
