"""What `checkpoints.py` says of a run's checkpoints. Changes nothing, and needs no accelerator.

`list` compares names and sizes with the manifest, `verify` every byte; `inspect` shows what is in one: where the run
stood, on which data and code, what its config changes, and its arrays.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from MaxText import checkpoint_manifest, config_files
from MaxText.checkpoint_manifest import Damaged


def main(argv: list[str]) -> int:
    """The exit code of the command."""
    parser = argparse.ArgumentParser("checkpoints.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("verb", choices=("list", "verify", "inspect"))
    parser.add_argument("path", type=Path, help="a run directory, its checkpoints/, or one step of it")
    arguments = parser.parse_args(argv)
    steps = _step_directories(arguments.path.expanduser().absolute())
    if not steps:
        print(f"there are no checkpoints in {arguments.path}")
        return 1
    if arguments.verb == "inspect":
        return _inspect(steps[0])
    return max([_line(step, hashes=arguments.verb == "verify") for step in steps])


def _step_directories(path: Path) -> list[Path]:
    """The steps that a path means, the newest first."""
    if path.name.isdecimal() and path.is_dir():
        return [path]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    return [folder / str(step) for step in checkpoint_manifest.steps_in(folder)]


def _line(step: Path, hashes: bool) -> int:
    """Prints one checkpoint's line; 1 if it is damaged."""
    try:
        manifest = checkpoint_manifest.verify(step, hashes)
    except Damaged as error:
        print(f"{step.name:>12}  DAMAGED  {error}")
        return 1
    size = sum(record["bytes"] for record in manifest["files"].values())
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((step / checkpoint_manifest.NAME).stat().st_mtime))
    state = "every byte is as written" if hashes else "complete"
    print(f"{step.name:>12}  {size / 1e9:8.3f} GB  {made}  {len(manifest['files'])} files, {state}")
    return 0


def _inspect(step: Path) -> int:
    if _line(step, hashes=False):
        return 1
    record = json.loads((step / "config.json").read_text())
    config, defaults = record.pop("config"), config_files.manual()
    print("\n".join(f"{name}: {value}" for name, value in record.items()))
    print(f"data: {json.loads((step / 'data.json').read_text())}")
    changed = {key: value for key, value in config.items() if key not in defaults or defaults[key].default != value}
    print("config, where it is not the default: " + " ".join(f"{key}={value}" for key, value in changed.items()))
    for name, shape, dtype in _arrays(step / "state"):
        print(f"  {name}  {dtype}{list(shape)}")
    return 0


def _arrays(state: Path) -> list[tuple[str, Any, Any]]:
    """Name, shape and dtype of every array."""
    import orbax.checkpoint as ocp
    from jax import tree_util

    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(state).item_metadata.tree
    named = tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return [(tree_util.keystr(path, simple=True, separator="."), leaf.shape, leaf.dtype) for path, leaf in named]
