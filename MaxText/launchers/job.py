"""A job of its own: asks for slices, which run it from their startup script, and asks again when they are taken away.

The state of a job is in its bucket and in Google Cloud, not here: this process may be stopped, and the same command
goes on watching. Nothing is asked for twice, because the queued resource has the run's name.
"""

import json
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from MaxText.launchers import flags, gcloud, tpus, tree
from MaxText.launchers.gcloud import LaunchError
from MaxText.launchers.job_worker import Exits

DESCRIPTION = """\
Creates TPU slices (a queued resource), runs a command on all their workers, creates them again when they are preempted,
and deletes them at the end. Logs, and how each worker ended, go to the bucket.

  python3 MaxText/multihost_job.py --TPU_TYPE=v6e-8 --BUCKET_NAME=my-bucket --RUN_NAME=first \\
      --SETUP='bash setup.sh --device tpu && mkdir -p /bucket \\
               && gcsfuse --implicit-dirs --rename-dir-limit=200000 my-bucket /bucket' \\
      --COMMAND='.venv/bin/python MaxText/train.py configs/validate_10m.yml run_name=first \\
                 base_output_directory=/bucket/runs'

Checkpoints must lie in a bucket (docs/running.md, Buckets): the slices' own disks go with them. The same command again
goes on watching. The exit code is 0 when the command is complete."""

POLL_SECONDS = 30
_ATTEMPT = re.compile(r"/attempts/(\d+)/order\.json$", re.MULTILINE)
_LOST_NODE = ("PREEMPTED", "TERMINATED", "STOPPED")  # states of a node that does not come back by itself


def main(argv: Sequence[str]) -> int:
    """The exit code."""
    parser = flags.parser("multihost_job.py", DESCRIPTION)
    parser.add_argument("--TPU_TYPE", default="", help="v5e-8, v6e-1, v6e-256, ...: the slice")
    parser.add_argument("--NUM_SLICES", type=int, default=1, help="slices (1)")
    parser.add_argument("--VERSION", default="", help="runtime image (the one for TPU_TYPE)")
    parser.add_argument("--MAX_RESTARTS", type=int, default=100, help="restarts, of slices and of the command (100)")
    parser.add_argument("--CQR_EXTRA_ARGS", default="", help="more words for the request, such as --spot or --reserved")
    parser.add_argument("--WATCH", type=flags.boolean, default=True, help="stay, restart, delete at the end (true)")
    parser.add_argument(
        "--DELETE", type=flags.boolean, default=False, help="only delete the slices of RUN_NAME (false)"
    )
    arguments = parser.parse_args(argv)
    try:
        return _Job(arguments).run()
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nno longer watching; the job goes on, the same command watches again and --DELETE=true ends it")
        return 130


def startup_script(name: str, agent: str, archive: str, url: str) -> str:
    """What every worker runs when it boots, as the superuser.

    The agent gets a service of its own: what a startup script leaves running is not told of a shutdown (its unit has
    KillMode=process), and so could not save.
    """
    wanted = "\n".join(f"fetch {shlex.quote(f'{url}/{file}')} {file}" for file in (agent, archive, "order.json"))
    return f"""#!/bin/bash
export HOME="${{HOME:-/root}}" PATH="$PATH:/snap/bin"
mkdir -p "$HOME/{name}" && cd "$HOME/{name}" || exit 1
fetch() {{ until gcloud storage cp "$1" "$2" --quiet; do sleep 10; done; }}
{wanted}
run=(python3 {agent} job order.json)
if [[ -d /run/systemd/system ]]; then
  run=(systemd-run --unit={name} --collect --property=KillMode=mixed --property=TimeoutStopSec=90
    --property=After=network-online.target --setenv=HOME="$HOME" --setenv=PATH="$PATH"
    --working-directory="$PWD" "${{run[@]}}")
fi
exec "${{run[@]}}"
"""


class _Job:
    """One job: what it is, and where it stands."""

    def __init__(self, arguments: Any):
        self.arguments = arguments
        if arguments.DELETE and not arguments.RUN_NAME:
            raise LaunchError("--DELETE=true needs --RUN_NAME")
        self.name = arguments.RUN_NAME or flags.default_run_name()
        gcloud.check_name(self.name, "--RUN_NAME")
        self.gcloud = flags.place(arguments)
        self.directory = Path(arguments.LOG_DIR or f"outputs/launches/{self.name}").absolute()
        self.attempt = 0
        if arguments.DELETE:
            return
        if not (arguments.COMMAND and arguments.BUCKET_NAME):
            raise LaunchError("a job needs --COMMAND and --BUCKET_NAME")
        if arguments.NUM_SLICES < 1:
            raise LaunchError(f"--NUM_SLICES={arguments.NUM_SLICES}: at least 1")
        try:
            self.slice = tpus.find(arguments.TPU_TYPE)
            self.extra = shlex.split(arguments.CQR_EXTRA_ARGS)
        except ValueError as error:
            raise LaunchError(f"--TPU_TYPE or --CQR_EXTRA_ARGS: {error}") from error
        self.workers = arguments.NUM_SLICES * self.slice.workers
        self.url = flags.bucket_url(arguments.BUCKET_NAME, arguments.BUCKET_DIR, self.name)
        agent, archive = tree.agent(), tree.archive(Path(arguments.SCRIPT_DIR))
        # Made once: every restart runs the same code.
        self.files = {f"launch-{tree.digest(agent)}.pyz": agent, f"tree-{tree.digest(archive)}.tar.gz": archive}

    @property
    def attempt_url(self) -> str:
        """Where this attempt has its objects; an attempt is one time that the slices are asked for."""
        return f"{self.url}/attempts/{self.attempt:04d}"

    def run(self) -> int:
        """Asks for the slices if they are not there, and watches; the exit code."""
        if self.arguments.DELETE:
            self._change(self.gcloud.delete_queued_resource(self.name))
            return 0
        self._warn_of_lost_checkpoints()
        if self.arguments.dry_run:
            self._ask_for_slices()
            self._change(self.gcloud.delete_queued_resource(self.name))
            return 0
        orders = gcloud.list_objects(f"{self.url}/attempts/*/order.json")
        self.attempt = max(map(int, _ATTEMPT.findall(orders)), default=0)
        if self._state():
            print(f"{self.name} is there, attempt {self.attempt}: watching it", flush=True)
        elif self._ended() == 0:
            return 0
        else:
            self._ask_for_slices()
        return self._watch() if self.arguments.WATCH else 0

    def _warn_of_lost_checkpoints(self) -> None:
        """Says so where the command seems to write to the slices' own disks; a mount cannot be told from here."""
        directory = flags.output_directory(self.arguments.COMMAND)
        if self.arguments.MAX_RESTARTS and not directory.startswith(("/", "$", "~")):
            given = f"base_output_directory={directory}, no absolute path" if directory else "no base_output_directory"
            print(
                f"warning: --COMMAND has {given}: checkpoints on a slice's own disk are lost when it is preempted, and "
                "the restart begins at step 0. Mount a bucket in --SETUP and name it, such as "
                "base_output_directory=/bucket/runs (docs/running.md, Buckets)",
                file=sys.stderr,
                flush=True,
            )

    def _watch(self) -> int:
        """Waits for the end, and asks for new slices as often as they are taken away."""
        shown, lost = "", 0
        while True:
            try:
                state, code = self._state(), self._ended()
            except LaunchError as error:
                print(f"cannot ask just now, trying again: {error}", flush=True)
                time.sleep(POLL_SECONDS)
                continue
            if state != shown:
                print(f"{time.strftime('%H:%M:%S')} attempt {self.attempt}: {state or 'deleted'}", flush=True)
                shown = state
            if code is not None:
                self._delete()
                return code
            if state == "SUSPENDED":
                lost += 1
                if lost > self.arguments.MAX_RESTARTS:
                    raise LaunchError(f"the slices were lost {lost} times; raise --MAX_RESTARTS to go on")
                self._delete()  # as long as it is there, it takes up quota and its name
                self._ask_for_slices()
            elif state == "FAILED":
                self._delete()
                raise LaunchError("the request has failed and was deleted; Google Cloud's console says why")
            elif not state:
                raise LaunchError(f"somebody has deleted {self.name}; the same command asks for it again")
            else:
                time.sleep(POLL_SECONDS)

    def _state(self) -> str:
        """The state of the queued resource; empty where there is none. SUSPENDED too where only a node is lost."""
        state = gcloud.queued_resource_state(gcloud.read(self.gcloud.list_queued_resources()), self.name)
        if state == "ACTIVE":
            ours = re.compile(re.escape(self.name) + r"(-\d+)?")
            nodes = gcloud.nodes(gcloud.read(self.gcloud.list_nodes()))
            if any(ours.fullmatch(node.name) and node.state in _LOST_NODE for node in nodes):
                return "SUSPENDED"
        return state

    def _ended(self) -> int | None:
        """The exit code of the job where it has ended for good."""
        exits = Exits(self.attempt_url)
        if exits.failure is not None:
            worker, code = exits.failure["worker"], exits.failure["code"]
            print(f"worker {worker} failed with exit code {code}; the logs are in {self.attempt_url}/logs/", flush=True)
            return code
        if exits.complete(self.workers):
            print(f"complete; the logs are in {self.attempt_url}/logs/", flush=True)
            return 0
        return None

    def _ask_for_slices(self) -> None:
        """Sends what the workers need and asks for them."""
        self.attempt += 1
        wanted = f"{self.arguments.NUM_SLICES} x {self.slice.accelerator_type}"
        print(f"attempt {self.attempt}: asking for {wanted}", flush=True)
        agent, archive = self.files
        order = {
            "name": self.name,
            "url": self.attempt_url,
            "project": self.gcloud.project,
            "zone": self.gcloud.zone,
            "directory": "tree",
            "archive": archive,
            "tree": tree.digest(self.files[archive]),
            "devices": tpus.DEVICE_FILES,
            "lock_file": tpus.LOCK_FILE,
            "stop_holder": self.arguments.STOP_HOLDER,
            "setup": self.arguments.SETUP,
            "preflight": self.arguments.PREFLIGHT,
            "python": self.arguments.PYTHON,
            "bucket": self.attempt_url,
            "output_directory": flags.output_directory(self.arguments.COMMAND),
            "chips": self.arguments.NUM_SLICES * self.slice.chips,
            "min_free_gb": self.arguments.MIN_FREE_GB,
            "command": self.arguments.COMMAND,
            "max_restarts": self.arguments.MAX_RESTARTS,
            "poll_seconds": POLL_SECONDS,
        }
        sent = {**self.files, "order.json": json.dumps(order, indent=1).encode()}
        script = startup_script(self.name, agent, archive, self.attempt_url)
        if self.arguments.dry_run:
            print(f"# in {self.directory}, with startup.sh:\n{script}")
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            for name, content in {**sent, "startup.sh": script.encode()}.items():
                (self.directory / name).write_bytes(content)
        for name in sent:
            self._change(gcloud.upload(name, f"{self.attempt_url}/{name}"))
        version = self.arguments.VERSION or self.slice.runtime_version
        self._change(
            self.gcloud.create_queued_resource(
                self.name, self.slice.accelerator_type, version, self.arguments.NUM_SLICES, "startup.sh", self.extra
            )
        )

    def _delete(self) -> None:
        try:
            self._change(self.gcloud.delete_queued_resource(self.name))
        except LaunchError:
            if self._state():  # the last worker may have been faster
                raise

    def _change(self, argv: Sequence[str]) -> None:
        if self.arguments.dry_run:
            print(shlex.join(argv))
        else:
            gcloud.read(argv, self.directory if self.directory.is_dir() else None)
