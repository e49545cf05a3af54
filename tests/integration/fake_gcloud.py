"""A gcloud that keeps its cloud in a folder: it records every argv, and machines are folders where commands really run.

Machines keep to what the launchers rely on: a home of their own, a metadata server, a startup script at boot, SIGTERM
and then the end of everything when they are taken away. What gcloud itself does, as its source says, is kept too: a
lost connection makes it run the command again. Flags it does not know are errors.
"""

import argparse
import contextlib
import fcntl
import http.server
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

CLOUD = "FAKE_CLOUD"  # environment: the folder
METADATA = "FAKE_METADATA"  # environment: host:port of a MetadataServer
MACHINE = "FAKE_MACHINE"  # environment of what runs on a machine: its home
WORKERS = {"v5litepod-8": 1, "v6e-1": 1, "v6e-8": 1, "v5litepod-16": 4, "v6e-16": 4}
LOST_CONNECTION = 255


class Cloud:
    """The cloud in a folder."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    @contextlib.contextmanager
    def state(self) -> Iterator[dict]:
        """Its nodes and queued resources, to be read and changed."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = self.folder / "state.json"
            state = json.loads(path.read_text()) if path.exists() else {"nodes": {}, "queued": {}}
            yield state
            path.write_text(json.dumps(state))

    def calls(self, where: str = "calls") -> list[list[str]]:
        """Every argv so far, of the launcher or of the `machines`."""
        path = self.folder / f"{where}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def record(self, argv: list[str]) -> None:
        name = "machines.jsonl" if MACHINE in os.environ else "calls.jsonl"
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(argv) + "\n")

    def home(self, node: str, worker: int) -> pathlib.Path:
        return self.folder / "machines" / node / str(worker)

    def bucket(self, url: str) -> pathlib.Path:
        return self.folder / "buckets" / url.removeprefix("gs://")

    def add_node(self, name: str, accelerator_type: str) -> None:
        with self.state() as state:
            state["nodes"][name] = {"type": accelerator_type, "state": "READY"}
        for worker in range(WORKERS[accelerator_type]):
            shutil.rmtree(self.home(name, worker), ignore_errors=True)
            self.home(name, worker).mkdir(parents=True)

    def environment(self, node: str, worker: int) -> dict[str, str]:
        home = str(self.home(node, worker))
        metadata = f"{os.environ[METADATA]}/{node}/{worker}"
        return {**os.environ, "HOME": home, MACHINE: home, "GCE_METADATA_IP": metadata}

    def processes(self, node: str = "") -> list[int]:
        """The processes that run on the machines of this node, or on any."""
        wanted = f"{MACHINE}={self.folder / 'machines' / node}".encode()
        found = []
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if any(word.startswith(wanted) for word in (process / "environ").read_bytes().split(b"\0")):
                    found.append(int(process.name))
        return found

    def power_off(self, node: str, grace_seconds: float) -> None:
        """SIGTERM to each machine's main process, then the end of all its processes and of its disk."""
        for path in (self.folder / "machines" / node).glob("*/main.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        while self.processes(node) and time.monotonic() < deadline:
            time.sleep(0.02)
        shutil.rmtree(self.folder / "machines" / node, ignore_errors=True)
        while others := set(self.processes(node)) - {os.getpid()}:
            for pid in others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        if self.processes(node):  # the last one
            os.kill(os.getpid(), signal.SIGKILL)

    def preempt(self, name: str, grace_seconds: float) -> None:
        """Takes the slices of a queued resource away."""
        with self.state() as state:
            state["queued"][name]["state"] = "SUSPENDING"
            nodes = state["queued"][name]["nodes"]
        for node in nodes:
            self.power_off(node, grace_seconds)
        with self.state() as state:
            state["queued"][name]["state"] = "SUSPENDED"
            for node in nodes:
                del state["nodes"][node]


class MetadataServer(http.server.ThreadingHTTPServer):
    """What each machine asks about itself, at /node/worker/."""

    def __init__(self, cloud: Cloud):
        super().__init__(("127.0.0.1", 0), _Metadata)
        self.cloud = cloud
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert self.headers["Metadata-Flavor"] == "Google"
        _, node, worker, _, _, *rest = self.path.split("/")
        with self.server.cloud.state() as state:
            count = WORKERS[state["nodes"][node]["type"]]
            siblings = next((q["nodes"] for q in state["queued"].values() if node in q["nodes"]), [node])
        slices = f"MEGASCALE_SLICE_ID: '{siblings.index(node)}'\nMEGASCALE_NUM_SLICES: '{len(siblings)}'\n"
        answer = {
            "": "",
            "agent-worker-number": worker,
            "worker-network-endpoints": ",".join(["127.0.0.1"] * count),
            "tpu-env": f"NODE_ID: '{node}'\n" + (slices if len(siblings) > 1 else ""),
        }[rest[-1]]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *_: object) -> None:
        pass


def main(argv: list[str]) -> int:
    cloud = Cloud(pathlib.Path(os.environ[CLOUD]))
    cloud.record(["gcloud", *argv])
    for words, action in _ACTIONS.items():
        if tuple(argv[: len(words)]) == words:
            return action(cloud, argv[len(words) :])
    return _fail(f"Invalid choice: {argv}")


def _fail(message: str) -> int:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    return 1


def _parser(*flags: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in flags:
        parser.add_argument(flag, required=True)
    parser.add_argument("--quiet", action="store_true")
    return parser


def _config(cloud: Cloud, argv: list[str]) -> int:
    print({"project": "a-project", "compute/zone": "a-zone"}[argv[0]])
    return 0


def _list_nodes(cloud: Cloud, argv: list[str]) -> int:
    _parser("--format", "--project", "--zone").parse_args(argv)
    with cloud.state() as state:
        nodes = [
            {
                "name": f"projects/p/locations/z/nodes/{name}",
                "acceleratorType": node["type"],
                "state": node["state"],
                "networkEndpoints": [{"ipAddress": "127.0.0.1"}] * WORKERS[node["type"]],
            }
            for name, node in state["nodes"].items()
        ]
    print(json.dumps(nodes))
    return 0


def _scp(cloud: Cloud, argv: list[str]) -> int:
    parser = _parser("--worker", "--project", "--zone")
    parser.add_argument("--internal-ip", action="store_true")
    parser.add_argument("files", nargs="+")
    arguments = parser.parse_args(argv)
    *sources, target = arguments.files
    assert target.endswith(":") and not any(":" in source for source in sources)
    for source in sources:
        shutil.copy(source, cloud.home(target[:-1], int(arguments.worker)))
    return 0


def _ssh(cloud: Cloud, argv: list[str]) -> int:
    parser = _parser("--worker", "--command", "--project", "--zone")
    parser.add_argument("--internal-ip", action="store_true")
    parser.add_argument("--ssh-flag", action="append")
    parser.add_argument("node")
    arguments = parser.parse_args(argv)
    node, worker = arguments.node, int(arguments.worker)
    home = cloud.home(node, worker)
    for _ in range(10):
        code = _connect(arguments.command, home, cloud.environment(node, worker))
        if code != LOST_CONNECTION:
            return code
        print("Retrying: SSH command error: [/usr/bin/ssh] exited with return code [255].", flush=True)
    return code


def _connect(command: str, home: pathlib.Path, environment: dict[str, str]) -> int:
    """One connection: what is typed goes there, what is said there comes here; `drop` in the home cuts it."""
    child = subprocess.Popen(
        ["bash", "-c", command],
        cwd=home,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )

    def send() -> None:
        while os.read(0, 4096):
            pass
        child.stdin.close()

    def receive() -> None:
        with contextlib.suppress(ValueError, OSError):
            while piece := os.read(child.stdout.fileno(), 65536):
                os.write(1, piece)

    receiver = threading.Thread(target=receive, daemon=True)
    for thread in (threading.Thread(target=send, daemon=True), receiver):
        thread.start()
    while child.poll() is None:
        if (home / "drop").exists():
            (home / "drop").unlink()
            child.stdin.close()
            return LOST_CONNECTION
        time.sleep(0.02)
    receiver.join(5)
    return child.returncode


def _list_queued(cloud: Cloud, argv: list[str]) -> int:
    _parser("--format", "--project", "--zone").parse_args(argv)
    with cloud.state() as state:
        print(
            json.dumps(
                [
                    {"name": f"projects/p/locations/z/queuedResources/{name}", "state": {"state": queued["state"]}}
                    for name, queued in state["queued"].items()
                ]
            )
        )
    return 0


def _create_queued(cloud: Cloud, argv: list[str]) -> int:
    parser = _parser("--accelerator-type", "--runtime-version", "--metadata-from-file", "--project", "--zone")
    parser.add_argument("--node-id")
    parser.add_argument("--node-prefix")
    parser.add_argument("--node-count", type=int)
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("name")
    arguments = parser.parse_args(argv)
    script = pathlib.Path(arguments.metadata_from_file.removeprefix("startup-script=")).read_text()
    nodes = [arguments.node_id] if arguments.node_id else []
    nodes = nodes or [f"{arguments.node_prefix}-{number}" for number in range(arguments.node_count)]
    with cloud.state() as state:
        if arguments.name in state["queued"]:
            return _fail(f"ALREADY_EXISTS: {arguments.name}")
        state["queued"][arguments.name] = {"state": "ACTIVE", "nodes": nodes}
    for node in nodes:
        cloud.add_node(node, arguments.accelerator_type)
    for node in nodes:
        for worker in range(WORKERS[arguments.accelerator_type]):
            _boot(cloud, node, worker, script)
    return 0


def _boot(cloud: Cloud, node: str, worker: int, script: str) -> None:
    home = cloud.home(node, worker)
    (home / "startup.sh").write_text(script)
    with (home / "serial.log").open("wb") as output:
        process = subprocess.Popen(
            ["bash", "startup.sh"],
            cwd=home,
            env=cloud.environment(node, worker),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    (home / "main.pid").write_text(str(process.pid))


def _delete_queued(cloud: Cloud, argv: list[str]) -> int:
    parser = _parser("--project", "--zone")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("name")
    name = parser.parse_args(argv).name
    with cloud.state() as state:
        queued = state["queued"].pop(name, None)
        for node in queued["nodes"] if queued else ():
            state["nodes"].pop(node, None)
    if queued is None:
        return _fail(f"NOT_FOUND: {name}")
    for node in queued["nodes"]:
        cloud.power_off(node, grace_seconds=0)
    return 0


def _storage_cp(cloud: Cloud, argv: list[str]) -> int:
    parser = _parser()
    parser.add_argument("source")
    parser.add_argument("target")
    arguments = parser.parse_args(argv)
    if arguments.source.startswith("gs://"):
        shutil.copy(cloud.bucket(arguments.source), arguments.target)
        return 0
    target = cloud.bucket(arguments.target)
    if not cloud.bucket("/".join(arguments.target.split("/")[:3])).is_dir():
        return _fail(f"HTTPError 404: the bucket of {arguments.target} does not exist.")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    shutil.copy(arguments.source, partial)
    partial.rename(target)  # objects appear whole
    return 0


def _matching(cloud: Cloud, url: str) -> list[pathlib.Path]:
    bucket, _, pattern = url.removeprefix("gs://").partition("/")
    found = (cloud.folder / "buckets" / bucket).glob(pattern)
    return sorted(path for path in found if path.is_file() and path.suffix != ".partial")


def _storage_cat(cloud: Cloud, argv: list[str]) -> int:
    found = _matching(cloud, argv[0])
    if not found:
        return _fail(f"storage.cat) The following URLs matched no objects or files:\n{argv[0]}")
    for path in found:
        sys.stdout.write(path.read_text())
    return 0


def _storage_ls(cloud: Cloud, argv: list[str]) -> int:
    found = _matching(cloud, argv[0])
    if not found:
        return _fail("storage.ls) One or more URLs matched no objects.")
    for path in found:
        print(f"gs://{path.relative_to(cloud.folder / 'buckets')}")
    return 0


def _storage_rm(cloud: Cloud, argv: list[str]) -> int:
    parser = _parser()
    parser.add_argument("url")
    cloud.bucket(parser.parse_args(argv).url).unlink()
    return 0


_TPUS = ("compute", "tpus")
_ACTIONS = {
    ("config", "get"): _config,
    (*_TPUS, "tpu-vm", "list"): _list_nodes,
    (*_TPUS, "tpu-vm", "scp"): _scp,
    (*_TPUS, "tpu-vm", "ssh"): _ssh,
    (*_TPUS, "queued-resources", "list"): _list_queued,
    (*_TPUS, "queued-resources", "create"): _create_queued,
    (*_TPUS, "queued-resources", "delete"): _delete_queued,
    ("storage", "cp"): _storage_cp,
    ("storage", "cat"): _storage_cat,
    ("storage", "ls"): _storage_ls,
    ("storage", "rm"): _storage_rm,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
