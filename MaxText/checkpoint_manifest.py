"""What makes a checkpoint trustworthy: a manifest with the size and sha256 of every file in it, written last.

Orbax checks the index of its arrays but not their bytes, so a flipped bit in a weight would pass unseen. Everything is
on the disk (fsync) before the manifest is, and the manifest before the directory gets its name.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

NAME = "manifest.json"
_FORMAT = 1
_THREADS = 4  # hashing releases the interpreter's lock


class Damaged(OSError):
    """A checkpoint that is not what its manifest says, or has none."""


def write(directory: Path, step: int) -> None:
    """Gives the finished directory its manifest; when it returns, all of it is on the disk."""
    paths = _files(directory)
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        records = dict(zip(paths, pool.map(lambda name: _record(directory / name, sync=True), paths), strict=True))
    body = {"format": _FORMAT, "step": step, "files": records}
    for folder in {directory, *(path.parent for path in map(directory.joinpath, paths))}:
        sync(folder)
    partial = directory / f"{NAME}.partial"
    with partial.open("w") as file:
        json.dump(body | {"sha256": _digest(body)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(directory / NAME)
    sync(directory)


def read(directory: Path) -> dict[str, Any]:
    """The manifest: {"step": ..., "files": {name: {"bytes": ..., "sha256": ...}}}.

    Raises:
        Damaged: it is missing or not what was written.
    """
    path = directory / NAME
    try:
        manifest = json.loads(path.read_text())
        digest = manifest.pop("sha256")
        good = manifest["format"] == _FORMAT and digest == _digest(manifest)
    except FileNotFoundError:
        raise Damaged(f"{directory} has no {NAME}: writing it was never finished") from None
    except (ValueError, KeyError, TypeError, AttributeError, IsADirectoryError, NotADirectoryError):
        good, manifest = False, {}
    if not good:
        raise Damaged(f"{path} is damaged: it is not what was written")
    return manifest


def verify(directory: Path, hashes: bool = True) -> dict[str, Any]:
    """The manifest of a directory that is exactly what was written; reads every byte of it if `hashes`.

    Raises:
        Damaged: it is not; names every file that is wrong, and how.
    """
    manifest = read(directory)
    if str(manifest["step"]) != directory.name and directory.name.isdecimal():
        raise Damaged(f"{directory} is step {manifest['step']}, says its {NAME}")
    there, listed = set(_files(directory)) - {NAME}, manifest["files"]
    wrong = [f"{name} is missing" for name in sorted(listed.keys() - there)]
    wrong += [f"{name} does not belong to it" for name in sorted(there - listed.keys())]
    check: Callable[[str], str] = lambda name: _difference(directory / name, listed[name], hashes)  # noqa: E731
    names = sorted(listed.keys() & there)
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        wrong += [f"{name} {words}" for name, words in zip(names, pool.map(check, names), strict=True) if words]
    if wrong:
        raise Damaged(f"{directory} is damaged: {'; '.join(wrong)}")
    return manifest


def steps_in(directory: Path) -> list[int]:
    """The steps below a directory, the newest first; links are not followed."""
    paths = directory.iterdir() if directory.is_dir() else ()
    steps = [path.name for path in paths if path.name.isdecimal() and path.is_dir() and not path.is_symlink()]
    return sorted(map(int, steps), reverse=True)


def sync(directory: Path) -> None:
    """Makes the names in a directory durable, where the file system can."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # file systems over a network may not know how
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(directory: Path) -> list[str]:
    """Everything that is no directory, and empty directories with a slash: both must be as they were."""
    found = []
    for folder, folders, names in os.walk(directory):
        relative = Path(folder).relative_to(directory)
        found += [str(relative / name) for name in names if name != NAME or folder != str(directory)]
        if not folders and not names:
            found.append(f"{relative}/")
    return sorted(found)


def _record(path: Path, sync: bool = False) -> dict[str, Any]:
    if path.is_dir():
        return {"bytes": 0, "sha256": ""}
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def _difference(path: Path, listed: dict[str, Any], hashes: bool) -> str:
    try:
        size = path.stat().st_size if path.is_file() else 0
        if size != listed["bytes"]:
            return f"has {size:,} bytes and not {listed['bytes']:,}"
        return "has other bytes than were written" if hashes and _record(path)["sha256"] != listed["sha256"] else ""
    except OSError as error:  # a disk that fails
        return f"cannot be read: {error.strerror}"


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
