"""The notebook script with the oldest JAX and Flax it is for, which Colab ships, and with the newest there are.

Each pair is installed into an environment of its own, from the package index: tens of seconds.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests import support
from tests.train_10m_setup import NO_HUB, TINY_ARGUMENTS

PACKAGES = {"oldest": ["jax==0.7.2", "flax==0.11.0"], "newest": ["jax", "flax"]}
OTHERS = ["optax", "transformers", "datasets", "tqdm"]

TRAIN = """
import sys, train_10m
train_10m.LOCAL_BYTES //= 10
train_10m.main(sys.argv[1:])
print("Loaded:", train_10m.generate(*train_10m.load_checkpoint(), "def hello():").splitlines()[0])
"""

# The real library streams a file as it would a data set of the hub, from its beginning again when it ends.
STREAM = """
import json, train_10m
texts = [f"x_{i} = 'a file of more than a hundred characters'  " * 4 for i in range(5)]
with open("rows.jsonl", "w") as file:
    file.writelines(json.dumps({"content": text}) + "\\n" for text in ["too short", *texts])
train_10m.hub_problem = lambda: ""
train_10m.DATASETS = ({"path": "nobody/nothing"}, {"path": "json", "data_files": "rows.jsonl"})
tokenizer = train_10m.train_tokenizer(texts, 384)
tokenizer.pad_token = tokenizer.eos_token
batch = next(train_10m.load_data(train_10m.Config(), tokenizer))
for row, length in zip(batch["input_ids"], batch["length"]):
    print(tokenizer.decode(row[:length])[:3])
"""


@pytest.fixture(scope="module", params=PACKAGES)
def python(request, tmp_path_factory):
    """The interpreter of an environment with these packages and nothing else."""
    directory = tmp_path_factory.mktemp(request.param) / "venv"
    its_python = str(directory / "bin/python")
    base = sys.executable if request.param == "oldest" else newest_python()
    packages = PACKAGES[request.param] + OTHERS
    if uv := shutil.which("uv", path=str(pathlib.Path(sys.executable).parent)):  # seconds; setup.sh has installed it
        commands = [[uv, "venv", "--python", base, str(directory)]]
        commands += [[uv, "pip", "install", "--python", its_python, *packages]]
    else:
        commands = [[base, "-m", "venv", str(directory)], [its_python, "-m", "pip", "install", *packages]]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    yield its_python
    shutil.rmtree(directory)


def newest_python() -> str:
    """The newest Python here of those the project supports: the newest JAX needs 3.12 or newer."""
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    for minor in (13, 12):
        for candidate in (f"python3.{minor}", *map(str, pyenv.glob(f"versions/3.{minor}.*/bin/python"))):
            works = ["-c", "import venv"]  # one that pyenv does not offer in this folder is there and fails
            if shutil.which(candidate) and not subprocess.run([candidate, *works], capture_output=True).returncode:
                return candidate
    return sys.executable


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("program", [TRAIN, STREAM], ids=["trains", "streams"])
def test_the_script_works(python, tmp_path, user_environment, program):
    environment = user_environment | NO_HUB | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(support.ROOT)}
    environment.pop("XLA_FLAGS", None)  # other versions have other flags
    arguments = [*TINY_ARGUMENTS, "dtype=bfloat16", "num_steps=20", "log_every=10"]
    done = subprocess.run(
        [python, "-c", program, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if program is STREAM:
        assert "! Skipped: nobody/nothing" in done.stdout
        assert "Data: json, streaming" in done.stdout
        assert done.stdout.splitlines()[-8:] == [f"x_{i % 5}" for i in range(8)]
        return
    assert done.stdout.count("✓") == 7
    assert "Step 20, Loss: " in done.stdout
    generated = next(line for line in done.stdout.splitlines() if line.startswith("Generated: "))
    assert done.stdout.splitlines()[-1] == generated.replace("Generated: ", "Loaded: ")
    print(done.stdout.splitlines()[0], "works")
