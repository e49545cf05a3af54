"""What stands in a run directory beside metrics and checkpoints: the config, the environment, the tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

from MaxText import pyconfig
from MaxText.job import Job


def write(job: Job, info: dict[str, Any]) -> None:
    """Writes what the run is, once it is certain that it belongs to this directory."""
    files = {"config.yml": pyconfig.to_yaml(job.config), "environment.json": json.dumps(info, indent=1) + "\n"}
    for name, text in files.items():
        partial = job.directory / f".{name}.partial"
        partial.write_text(text)
        partial.replace(job.directory / name)
    _copy_tokenizer(Path(info["tokenizer"]).expanduser(), job.directory / "tokenizer")


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Keeps the tokenizer with the run, if it is a directory or a file and not the name of one on the hub."""
    if target.exists() or not source.exists() or source == Path():
        return
    partial = target.with_name(".tokenizer.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if source.is_dir():
        shutil.copytree(source, partial)
    else:
        partial.mkdir()
        shutil.copy(source, partial)
    partial.rename(target)
