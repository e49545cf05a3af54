"""What must be so on every worker before a run is worth starting: devices, clock, disks, bucket, equal versions.

Each worker makes one probe, plain values; the probes of all are compared in one place, and all problems told at once.
The devices are asked of JAX itself, with all workers connected as they will be: what hangs here would hang there.
"""

import io
import json
import os
import shlex
import shutil
import socket
import tempfile
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from MaxText.launchers import gcloud, metadata, supervisor
from MaxText.launchers.gcloud import LaunchError

MAX_CLOCK_SKEW_SECONDS = 5.0
_JAX_TIMEOUT_SECONDS = 300

# Run by the Python that will train, with the path of the file to write.
_ASK_JAX = """
import importlib.metadata, json, os, platform, sys
import jax
if "JAX_PROCESS_COUNT" in os.environ:
    count, index = int(os.environ["JAX_PROCESS_COUNT"]), int(os.environ["JAX_PROCESS_ID"])
    jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], count, index)
packages = {str(d.metadata["Name"]).lower(): d.version for d in importlib.metadata.distributions()}
answer = {
    "devices": jax.device_count(), "local_devices": jax.local_device_count(), "kind": jax.devices()[0].device_kind,
    "versions": {"python": platform.python_version(), **packages},
}
open(sys.argv[1], "w").write(json.dumps(answer))
"""


def probe(place: metadata.Place, order: Mapping[str, Any], tree: str, stop: threading.Event) -> dict[str, Any]:
    """What this worker has.

    Args:
        order: names the run's `directory`, the `python` in it, a `bucket` URL to write to, and the `output_directory`
            of the command; the last two are empty for none.
        tree: the digest of the code.
    """
    jax, error = _ask_jax(order["python"], order["directory"], place.environment(), stop)
    return {
        "worker": place.label,
        "host": socket.gethostname(),
        "clock_skew": metadata.clock_skew(),
        "free_bytes": shutil.disk_usage(order["directory"]).free,
        "bucket_error": _write_to(order["bucket"], place.file_name) if order["bucket"] else "",
        "rename_error": rename_error(order["directory"], order["output_directory"]),
        "jax_error": error,
        "devices": jax.get("devices", 0),
        "local_devices": jax.get("local_devices", 0),
        "kind": jax.get("kind", ""),
        "versions": {"code": tree, **jax.get("versions", {})},
    }


def problems(probes: Sequence[Mapping[str, Any]], workers: int, chips: int, min_free_gb: float) -> list[str]:
    """What is wrong with the probes of all workers, in words; empty where all is well.

    Args:
        workers: how many there should be.
        chips: how many all of them have together; 0: any number is right.
    """
    found = []
    if len(probes) != workers:
        found.append(f"{len(probes)} of {workers} workers answered")
    for p in probes:
        who = f"worker {p['worker']} ({p['host']})"
        if p["jax_error"]:
            found.append(f"{who}: JAX does not start: {p['jax_error']}")
        elif chips and p["devices"] != chips:
            found.append(
                f"{who}: JAX sees {p['devices']} devices, {p['local_devices']} of them here, and this TPU has {chips}; "
                "is another process using the chips, or is a worker missing?"
            )
        if abs(p["clock_skew"]) > MAX_CLOCK_SKEW_SECONDS:
            found.append(f"{who}: the clock is {p['clock_skew']:+.1f} s off; sudo systemctl restart chrony")
        if p["free_bytes"] < min_free_gb * 1e9:
            found.append(
                f"{who}: {p['free_bytes'] / 1e9:.1f} GB of disk are free, fewer than --MIN_FREE_GB={min_free_gb:g}"
            )
        if p["bucket_error"]:
            found.append(f"{who}: cannot write to the bucket: {p['bucket_error']}")
        if p["rename_error"]:
            found.append(
                f"{who}: cannot rename a directory {p['rename_error']}; so a run names its finished checkpoints. A "
                "bucket must have a hierarchical namespace, or be mounted with --rename-dir-limit "
                "(docs/running.md, Buckets)"
            )
    return found + _differences([p for p in probes if not p["jax_error"]])


def summary(probes: Sequence[Mapping[str, Any]]) -> str:
    """All is well, in one line."""
    first = probes[0]
    jax = first["versions"].get("jax", "unknown")
    skew = max(abs(p["clock_skew"]) for p in probes)
    free = min(p["free_bytes"] for p in probes) / 1e9
    return (
        f"preflight: {len(probes)} worker(s), {first['devices']} x {first['kind']}, jax {jax}; "
        f"clocks within {skew:.1f} s, at least {free:.0f} GB free, versions equal"
    )


def rename_error(directory: str, output_directory: str) -> str:
    """Where a directory cannot be made, renamed and deleted on the mount that a command writes to, and why; else empty.

    Args:
        directory: in which the command runs.
        output_directory: as the command has it; the root's own disk, which can, is left alone.
    """
    if not output_directory:
        return ""
    path = Path(directory, os.path.expanduser(os.path.expandvars(output_directory))).resolve()
    try:
        path = next(place for place in (path, *path.parents) if place.is_dir())
        if next(place for place in (path, *path.parents) if place.is_mount()) == Path("/"):
            return ""
        with tempfile.TemporaryDirectory(prefix="preflight-", dir=path) as folder:
            partial = Path(folder, "partial")
            (partial / "state").mkdir(parents=True)
            (partial / "state" / "file").write_bytes(b"x")
            partial.rename(Path(folder, "whole"))
    except OSError as error:
        return f"below {path}: {error.strerror}"
    return ""


def _differences(probes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Packages, or the code, that not all workers have in the same version."""
    found = []
    for name in sorted({name for p in probes for name in p["versions"]}):
        workers = defaultdict(list)
        for p in probes:
            workers[p["versions"].get(name, "missing")].append(p["worker"])
        if len(workers) > 1:
            where = "; ".join(f"{version} on {', '.join(sorted(who))}" for version, who in sorted(workers.items()))
            found.append(f"{name} differs: {where}")
    return found


def _ask_jax(
    python: str, directory: str, environment: Mapping[str, str], stop: threading.Event
) -> tuple[dict[str, Any], str]:
    """What JAX says of itself, or why it does not."""
    with tempfile.TemporaryDirectory() as folder:
        answer, output = Path(folder) / "answer.json", io.BytesIO()
        words = ["timeout", "-k", "10", str(_JAX_TIMEOUT_SECONDS), python, "-c", _ASK_JAX, str(answer)]
        code = supervisor.run(shlex.join(words), directory, environment, output, stop)
        if code == 0:
            return json.loads(answer.read_text()), ""
    if code == 124:
        return {}, f"no answer within {_JAX_TIMEOUT_SECONDS} s; is the TPU in use, or a worker missing?"
    if code in (126, 127):
        return {}, f"{python} cannot be run in {directory}; does --SETUP make it? --PYTHON names another"
    return {}, (output.getvalue().decode(errors="replace").strip().splitlines() or [f"exit code {code}"])[-1][:300]


def _write_to(bucket: str, name: str) -> str:
    """Why an object cannot be written below this URL and deleted again; empty where it can."""
    url = f"{bucket}/preflight/{name}"
    with tempfile.NamedTemporaryFile() as file:
        try:
            gcloud.read(gcloud.upload(file.name, url))
            gcloud.read(gcloud.remove(url))
        except LaunchError as error:
            return str(error).splitlines()[-1].strip()
    return ""
