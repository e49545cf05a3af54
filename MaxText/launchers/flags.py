"""The flags that both launchers have, with the names users of MaxText know; every value is one word, --NAME=value."""

import argparse
import getpass
import re
import time

from MaxText.launchers import gcloud
from MaxText.launchers.gcloud import LaunchError

_BUCKET = re.compile(r"[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9]")
_OUTPUT_DIRECTORY = re.compile(r"""\bbase_output_directory=["']?([^\s"';&|]+)""")


def parser(program: str, text: str) -> argparse.ArgumentParser:
    """The parser of the flags that both launchers have."""
    result = argparse.ArgumentParser(
        prog=program, description=text, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--COMMAND", default="", help="what every worker runs, as bash reads it, in its copy of SCRIPT_DIR")
    add("--SETUP", default="bash setup.sh", help="what every worker runs before that; empty for nothing (%(default)s)")
    add("--SCRIPT_DIR", default=".", help="the tree to send (%(default)s)")
    add("--RUN_NAME", default="", help="names the tree's folder on the workers (your name and the time)")
    add("--PROJECT", default="", help="Google Cloud project (gcloud's)")
    add("--ZONE", default="", help="Google Cloud zone (gcloud's)")
    add("--BUCKET_NAME", default="", help="a bucket the workers can write to")
    add("--BUCKET_DIR", default="", help="a directory in that bucket")
    add("--PREFLIGHT", type=boolean, default=True, help="check devices, clocks, disks, bucket and versions (true)")
    add("--PYTHON", default=".venv/bin/python", help="the Python with JAX to check, seen from the tree (%(default)s)")
    add("--MIN_FREE_GB", type=float, default=5.0, help="free disk every worker must have (%(default)s)")
    add("--STOP_HOLDER", type=boolean, default=False, help="end the process that holds a worker's TPU (false)")
    add("--LOG_DIR", default="", help="where logs go (outputs/launches/RUN_NAME)")
    add("--dry-run", action="store_true", help="print the exact commands; run only those that change nothing")
    return result


def boolean(text: str) -> bool:
    """The value of a true-or-false flag."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def default_run_name() -> str:
    """A name for this launch that no other has, legal as the name of a TPU."""
    user = re.sub(r"[^a-z0-9]+", "-", getpass.getuser().lower()).strip("-")
    return f"{user if user[:1].isalpha() else 'run'}-{time.strftime('%Y-%m-%d-%H-%M-%S')}"


def bucket_url(name: str, directory: str, run_name: str) -> str:
    """The URL below which a run has its objects; empty where no bucket is given.

    Raises:
        LaunchError: it cannot be one.
    """
    if not name:
        return ""
    if not _BUCKET.fullmatch(name):
        raise LaunchError(f"--BUCKET_NAME={name!r} cannot be a bucket: give its name without gs://, such as my-bucket")
    path = "/".join(part for part in (*directory.split("/"), run_name) if part)
    if re.search(r"[*?\[\]#\x00-\x1f\x7f]", path):
        raise LaunchError(f"{path!r} in a bucket: gcloud takes * ? [ ] # for patterns; choose another --BUCKET_DIR")
    return f"gs://{name}/{path}"


def output_directory(command: str) -> str:
    """The base_output_directory in a command, as bash has it to expand; empty where the command names none."""
    match = _OUTPUT_DIRECTORY.search(command)
    return match[1] if match else ""


def place(arguments: argparse.Namespace, **settings: bool) -> gcloud.Gcloud:
    """gcloud in the project and zone of the flags, or of its own settings."""
    project = arguments.PROJECT or gcloud.setting("project", "--PROJECT")
    zone = arguments.ZONE or gcloud.setting("compute/zone", "--ZONE")
    return gcloud.Gcloud(project, zone, **settings)
