"""Runs a command on TPU VMs that are there: send the tree, make the workers ready, preflight, run, bring back the logs.

Each step is one gcloud connection per worker. Everything a step needs goes into one JSON word, so that of all that the
user gives nothing is read by a shell but the command itself.
"""

import json
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from MaxText.launchers import everywhere, flags, gcloud, preflight, tpus, tree, worker
from MaxText.launchers.gcloud import LaunchError, Node, Worker

DESCRIPTION = """\
Runs a command on all workers of TPU VMs that exist already.

  python3 MaxText/multihost_runner.py --TPU_PREFIX=my-tpu \\
      --COMMAND='.venv/bin/python MaxText/train.py configs/validate_10m.yml run_name=first'

The exit code is that of the worker that failed first; 75: interrupted and saved, the same command goes on."""


def main(argv: Sequence[str]) -> int:
    """The exit code."""
    parser = flags.parser("multihost_runner.py", DESCRIPTION)
    parser.add_argument(
        "--TPU_PREFIX", required=True, help="the TPU, or what comes before -0, -1, ... of several slices"
    )
    parser.add_argument("--USE_EXISTING_FOLDER", type=flags.boolean, default=False, help="send no tree: it is there")
    parser.add_argument("--INTERNAL_IP", type=flags.boolean, default=False, help="connect inside the network (false)")
    arguments = parser.parse_args(argv)
    try:
        return _Launch(arguments).run()
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def find_nodes(all_nodes: Sequence[Node], prefix: str) -> list[Node]:
    """The TPU of that name, or the slices named prefix-0, prefix-1, ... in this order.

    Raises:
        LaunchError: there is none, or one is missing or not ready.
    """
    exact = [node for node in all_nodes if node.name == prefix]
    numbered = {}
    for node in all_nodes:
        match = re.fullmatch(re.escape(prefix) + r"-(\d+)", node.name)
        if match:
            numbered[int(match[1])] = node
    found = exact or [numbered[number] for number in sorted(numbered)]
    if not found:
        there = ", ".join(node.name for node in all_nodes) or "none at all"
        raise LaunchError(
            f"--TPU_PREFIX={prefix}: no TPU is named so, or {prefix}-0, {prefix}-1, ...; there is {there}"
        )
    if not exact and sorted(numbered) != list(range(len(numbered))):
        raise LaunchError(f"a slice is missing: of {prefix}-N, the numbers {sorted(numbered)} are there")
    for node in found:
        if node.state != "READY" or not node.workers:
            raise LaunchError(f"{node.name} is {node.state or 'in no state'}; it must be READY, with workers")
        if node.accelerator_type != found[0].accelerator_type:
            both = f"{node.name} is a {node.accelerator_type} and {found[0].name} a {found[0].accelerator_type}"
            raise LaunchError(f"{both}: slices must be equal")
    return found


class _Launch:
    """One launch: who takes part, and the steps."""

    def __init__(self, arguments: Any):
        self.arguments = arguments
        name = arguments.RUN_NAME or flags.default_run_name()
        if not arguments.COMMAND and not arguments.PREFLIGHT:
            raise LaunchError("there is nothing to do: give --COMMAND, or --PREFLIGHT=true for the checks alone")
        if name in (".", "..") or re.search(r"[/\0]", name) or name.startswith("~"):
            raise LaunchError(f"--RUN_NAME={name!r} is not a plain name of a folder")
        if arguments.USE_EXISTING_FOLDER and not arguments.RUN_NAME:
            raise LaunchError("--USE_EXISTING_FOLDER=true needs --RUN_NAME, which names the folder")
        self.gcloud = flags.place(arguments, internal_ip=arguments.INTERNAL_IP)
        self.directory = Path(arguments.LOG_DIR or f"outputs/launches/{name}").absolute()
        self.nodes = find_nodes(gcloud.nodes(gcloud.read(self.gcloud.list_nodes())), arguments.TPU_PREFIX)
        self.workers = [
            Worker(slice_id, index, node.name)
            for slice_id, node in enumerate(self.nodes)
            for index in range(node.workers)
        ]
        archive = b"" if arguments.USE_EXISTING_FOLDER else tree.archive(Path(arguments.SCRIPT_DIR))
        agent = tree.agent()
        self.agent = f"launch-{tree.digest(agent)}.pyz"
        self.files = {self.agent: agent}
        if archive:
            self.files[f"tree-{tree.digest(archive)}.tar.gz"] = archive
        self.order = {
            "launch": str(time.time_ns()),
            "directory": name,
            "archive": next((file for file in self.files if file != self.agent), ""),
            "tree": tree.digest(archive) if archive else "",
            "devices": tpus.DEVICE_FILES,
            "lock_file": tpus.LOCK_FILE,
            "stop_holder": arguments.STOP_HOLDER,
            "setup": arguments.SETUP,
            "python": arguments.PYTHON,
            "bucket": flags.bucket_url(arguments.BUCKET_NAME, arguments.BUCKET_DIR, name),
            "output_directory": flags.output_directory(arguments.COMMAND),
            "command": arguments.COMMAND,
        }

    def run(self) -> int:
        """Takes the steps; the exit code."""
        kind, size = self.nodes[0].accelerator_type, sum(map(len, self.files.values()))
        print(f"{len(self.nodes)} slice(s) of {kind}, {len(self.workers)} worker(s)")
        print(f"sending {size / 1e6:.1f} MB; logs in {self.directory}", flush=True)
        if self.arguments.dry_run:
            print(f"# in {self.directory}:")
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            for name, content in self.files.items():
                (self.directory / name).write_bytes(content)
        # One connection first: it makes the ssh key, if there is none, which others must not do at the same time.
        for workers in (self.workers[:1], self.workers[1:]):
            code = self._step("copy", {w: self.gcloud.copy(list(self.files), w) for w in workers}).code
            if code:
                return code
        code = self._on_workers("prepare").code
        if code == 0 and self.arguments.PREFLIGHT:
            code = self._preflight()
        if code == 0 and self.arguments.COMMAND:
            code = self._on_workers("run").code
            if code == 75:
                print("interrupted, and what was done is saved: the same command goes on", flush=True)
        return code

    def _preflight(self) -> int:
        outcome = self._on_workers("probe", keep=worker.PROBE)
        if outcome.code or self.arguments.dry_run:
            return outcome.code
        probes = [json.loads(outcome.kept[worker]) for worker in self.workers]
        try:
            chips = len(self.nodes) * tpus.find(self.nodes[0].accelerator_type).chips
        except ValueError as error:
            print(f"preflight: the number of devices is not checked: {error}")
            chips = 0
        problems = preflight.problems(probes, len(self.workers), chips, self.arguments.MIN_FREE_GB)
        if problems:
            raise LaunchError("preflight:\n  " + "\n  ".join(problems))
        print(preflight.summary(probes), flush=True)
        return 0

    def _on_workers(self, verb: str, keep: str = "") -> everywhere.Outcome:
        words = ["python3", self.agent, verb, json.dumps(self.order)]
        return self._step(verb, {worker: self.gcloud.ssh(words, worker) for worker in self.workers}, keep)

    def _step(self, name: str, commands: dict[Worker, list[str]], keep: str = "") -> everywhere.Outcome:
        if self.arguments.dry_run:
            for argv in commands.values():
                print(shlex.join(argv))
            return everywhere.Outcome({}, None, {})
        if commands:
            print(f"{name}: {len(commands)} worker(s)", flush=True)
        return everywhere.run(name, commands, self.directory, keep)
