"""prepare_data.py and train.py as a user runs them: a Parquet and a JSONL file become a mixture that is trained on."""

import email
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from MaxText.input_pipeline import tokenizer
from tests.support import ROOT, SMALL


@pytest.mark.slow
def test_prepare_then_train_on_a_mixture_with_fim(tmp_path, user_environment):
    texts = [path.read_text() for path in sorted(Path(email.__file__).parent.glob("*.py"))]
    tokenizer.train(texts, 400, tmp_path / "bpe")
    rows = [{"content": text} for text in texts]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[::2]), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1::2]))
    environment = {**user_environment, "JAX_PLATFORMS": "cpu"}

    def run(program: str, **settings: object) -> str:
        keys = [f"{key}={value}" for key, value in settings.items()]
        command = [sys.executable, str(ROOT / "MaxText" / program), str(ROOT / "configs/base.yml"), *keys]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    settings = {"tokenizer_path": "bpe", "vocab_size": 512, "held_out_one_in": 3, "prepare_workers": 1}
    for source, out in (("parquet:a.parquet", "a"), ("jsonl:b.jsonl", "b")):
        said = run("prepare_data.py", source=source, out=out, decontaminate="", **settings)
        assert f"grain_train_files={out}/train grain_eval_files={out}/heldout" in said
    train = {
        "vocab_size": 512, "dataset_type": "grain", "grain_train_files": "a/train,3;b/train,1", "fim_rate": 0.5,
        "grain_eval_files": "a/heldout", "steps": 4, "max_target_length": 64, "enable_tensorboard": "false",
        "checkpoint_period": 2, "base_output_directory": "runs",
    }  # fmt: skip
    said = run("train.py", **SMALL | train)
    assert "completed step: 4" in said and "Completed eval" in said and "parquet:a.parquet" in said
    assert "The run is complete" in run("train.py", **SMALL | train)
