"""The notebooks: what is kept is what their scripts say, with its outputs; and they run from first cell to last."""

import subprocess
import sys

import nbformat
import pytest

from notebooks import build
from tests import support

# What must be among the outputs of each: that it did what it is for.
SHOWN = {
    "train_10m": ("✓ Loss is not NaN", "Step 200, Loss: ", "Checkpoint saved: ", "def fibonacci(n):"),
    "train_colab": (
        "exit code 75: stopped, can be resumed",
        "Resuming after step ",
        "completed step: 1500",
        "bits per byte\n     500 ",
        "image/png",
    ),
}


def outputs(notebook):
    """All that the cells gave, as text; of pictures their type."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", output
            found.append(output.get("text", "") + " ".join(output.get("data", {})))
    return "".join(found)


def test_every_notebook_is_tested():
    assert set(SHOWN) == set(build.NAMES) == {path.stem for path in build.FOLDER.glob("*.ipynb")}


@pytest.mark.parametrize("name", SHOWN)
def test_the_notebook_kept_is_the_one_its_script_makes(name):
    kept, made = nbformat.read(build.FOLDER / f"{name}.ipynb", as_version=4), build.make(name)
    for one, other in zip(kept.cells, made.cells, strict=True):
        assert one.cell_type == other.cell_type
        assert one.source == other.source, f"run notebooks/build.py {name} and keep what it writes"
    nbformat.validate(kept)


@pytest.mark.parametrize("name", SHOWN)
def test_the_notebook_kept_shows_a_whole_run_and_not_the_machine(name):
    kept = nbformat.read(build.FOLDER / f"{name}.ipynb", as_version=4)
    counts = [cell.execution_count for cell in kept.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    shown = outputs(kept)
    assert [text for text in SHOWN[name] if text not in shown] == []
    assert [path for path in ("/tmp/", "/root/", "/home/", str(support.ROOT)) if path in shown] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_the_notebook_runs(name, tmp_path, user_environment):
    command = [sys.executable, "notebooks/build.py", name, "--output", str(tmp_path)]
    user_environment.pop("XLA_FLAGS", None)  # a notebook computes longer than it compiles
    done = subprocess.run(command, cwd=support.ROOT, env=user_environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    shown = outputs(nbformat.read(tmp_path / f"{name}.ipynb", as_version=4))
    assert [text for text in SHOWN[name] if text not in shown] == []


def test_a_cell_that_fails_fails_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    (tmp_path / "cells_bad.py").write_text("# %% [markdown]\n# # Title\n#\n# Text\n\n# %%\nprint(1)\n\n# %%\n1 / 0\n")
    notebook = build.make("bad")
    assert [cell.source for cell in notebook.cells] == ["# Title\n\nText", "print(1)", "1 / 0"]
    command = [
        sys.executable,
        "-c",
        "import sys; from notebooks import build; build.FOLDER = build.pathlib.Path(sys.argv[1]);build.main(['bad'])",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=support.ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr
    assert not (tmp_path / "bad.ipynb").exists()
