"""A data set of the hub, prepared as a user does it: streamed, at a revision, and from the cache without a hub."""

import email
import json
import subprocess
import sys
from pathlib import Path

import pytest

from MaxText.input_pipeline import tokenizer
from tests.integration.fake_hub import Hub, serving
from tests.support import ROOT

OLD, NEW = "b" * 40, "a" * 40
SETTINGS = ("vocab_size=512", "tokenizer_path=bpe", "held_out_one_in=3", "prepare_workers=1", "decontaminate=")


@pytest.mark.slow
def test_a_data_set_of_the_hub_at_a_revision_and_from_the_cache(tmp_path, user_environment):
    texts = [path.read_text() for path in sorted(Path(email.__file__).parent.glob("*.py"))]
    tokenizer.train(texts, 400, tmp_path / "bpe")
    lines = [json.dumps({"content": text, "max_stars_repo_path": "a.py"}).encode() + b"\n" for text in texts]
    versions = {OLD: lines[:15], NEW: lines[5:]}
    files = {commit: {"data/python/train.jsonl": b"".join(part)} for commit, part in versions.items()}
    for commit, content in files.items():
        (tmp_path / f"{commit}.jsonl").write_bytes(content["data/python/train.jsonl"])
    revisions = {"main": OLD, "v1": OLD}
    environment = {**user_environment, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}

    def prepare(**outs: str) -> str:
        """Prepares from each source into the folder of its name, all in one process; what it says."""
        config = str(ROOT / "configs/base.yml")
        lines = [[config, f"source={source}", f"out={out}", *SETTINGS] for out, source in outs.items()]
        program = f"from MaxText import prepare_data\nfor line in {lines}: prepare_data.main(line)"
        command = [sys.executable, "-c", program]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        return result.stdout + result.stderr

    def shards(out: str) -> list[bytes]:
        return [path.read_bytes() for path in sorted((tmp_path / out).rglob("*.array_record"))]

    python = "hf:bigcode/the-stack/data/python"
    with serving(Hub("bigcode/the-stack", revisions, files)) as hub:
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        said = prepare(old=f"jsonl:{OLD}.jsonl", new=f"jsonl:{NEW}.jsonl", main=python)
        assert f"SOURCE: {python}@{OLD}" in said, said
        assert shards("main") == shards("old") != shards("new")
        assert json.loads((tmp_path / "main/train/manifest.json").read_text())["source"] == f"{python}@{OLD}"
        revisions["main"] = NEW  # someone pushes
        said = prepare(main=python, v9=f"{python}@v9", v1=f"{python}@v1")
        assert "holds data of another source" in said and "Revision 'v9' doesn't exist" in said, said
        assert shards("v1") == shards("old")
        load = "import datasets; datasets.load_dataset('bigcode/the-stack', split='train')"
        subprocess.run([sys.executable, "-c", load], env=environment, check=True, timeout=120)
    said = prepare(cached="hf:bigcode/the-stack", tag="hf:bigcode/the-stack@v1", none=f"{python},hf:codeparrot/clean")
    assert f"SOURCE: hf:bigcode/the-stack@{NEW}" in said, said
    assert shards("cached") == shards("new")
    assert f"the cache holds commit {NEW} and revision v1 was asked for" in said, said
    assert "Connection refused" in said and "finds bigcode/the-stack whole only, not its data/python" in said, said
    assert "hf:codeparrot/clean: FileNotFoundError" in said, said
