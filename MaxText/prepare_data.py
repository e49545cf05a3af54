"""Prepares data for training: python MaxText/prepare_data.py configs/x.yml source=... out=...; see docs/data.md."""

import logging
import os
import sys

if __spec__ is None:  # run as a file: its folder is on the path, where the project's root must be
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main(argv: list[str]) -> int:
    """The exit code: 0 complete, 75 interrupted and restartable, 1 failed, 2 a config that cannot be."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if argv[:1] == ["inspect"]:
        from MaxText.preparation import inspection

        return inspection.main(argv[1:])
    from MaxText import pyconfig

    config = pyconfig.config_or_exit_code(pyconfig.with_run_name(argv, "prepare_data"), os.environ)
    if isinstance(config, int):
        return config

    from MaxText.preparation import preparing

    try:
        return preparing.prepare(config, lambda line: print(line, flush=True))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 75


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
