"""One launch at a time in a run directory: a lock of the operating system, that ends with the process that holds it.

The file says who holds it. It is never deleted, and need not be: after a kill, even of the machine, nobody holds it.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

NAME = ".lock"


class RunIsLocked(OSError):
    """Another launch is at work in the run directory."""


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Holds the run directory, which is made if need be.

    Raises:
        RunIsLocked: another process holds it; says which.
        OSError: it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / NAME).open("a+")
    except OSError as error:
        raise OSError(
            f"cannot write the run directory {directory}: {error}; set base_output_directory to one that can be written"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunIsLocked(
                f"{directory} is in use by {_described(file.read())}: one launch at a time. Stop that one, which saves "
                "what it has, or use another run_name"
            ) from None
        except OSError as error:  # some file systems of networks and buckets have no locks
            print(f"WARNING: {directory} cannot be locked ({error}); start no second launch", file=sys.stderr)
        file.truncate(0)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
        file.write(json.dumps(holder) + "\n")
        file.flush()
        yield


def _described(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has not said who it is"
