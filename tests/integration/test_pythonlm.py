"""PythonLM as a user has it, small: epochs by themselves, a decay branch, export to transformers and back."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from MaxText import checkpointing, hf_directory, job
from MaxText.inference import runs
from MaxText.input_pipeline import loader
from tests import support

KEYS = {
    "run_name": "run",
    "steps": "auto",
    "num_epoch": 2,
    "base_emb_dim": 32,
    "base_num_decoder_layers": 2,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "head_dim": 8,
    "base_mlp_dim": 64,
    "vocab_size": 640,
    "vocab_padding": 128,
    "max_target_length": 64,
    "original_max_position_embeddings": 64,
    "per_device_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "dropout_rate": 0.1,
    "embedded_corpus_bytes": 200_000,
    "tokenizer_path": "",
    "checkpoint_period": 5,
    "max_num_checkpoints_to_keep": 1,
    "eval_interval": 1000,
    "eval_steps": 2,
    "enable_tensorboard": "false",
}


def command(script: str, *words: object) -> list[str]:
    return [sys.executable, str(support.ROOT / "MaxText" / script), *map(str, words)]


def train_command(directory: pathlib.Path, **keys: object) -> list[str]:
    cache = support.ROOT / ".pytest_cache"
    keys = KEYS | {"base_output_directory": directory, "jax_cache_dir": cache / "jax_pythonlm"} | keys
    keys |= {"data_cache_directory": directory / "data"}
    return command("train.py", support.ROOT / "configs/pythonlm_tiny.yml", *(f"{k}={v}" for k, v in keys.items()))


def run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300, cwd="/")


def opened_run(directory: pathlib.Path, *settings: str):
    """(the job that reads a run's newest checkpoint, its parameters as numpy arrays)."""
    run = runs.find([str(directory), *settings])
    config = run.config(run.newest())
    opened = job.make_job(config, jax.devices()[:1])
    step = run.step_directory(run.newest())
    return opened, jax.device_get(checkpointing.restore_params(step, opened.abstract_state, config.to_dict()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(the directory above the run, what the run printed)."""
    directory = tmp_path_factory.mktemp("pythonlm")
    # A tokenizer of fewer entries than the model has, as with Qwen's: made first, from the same files.
    done = run(train_command(directory, vocab_size=512, vocab_padding=0, steps=1, run_name="first", num_epoch=-1))
    assert done.returncode == 0, done.stderr
    done = run(train_command(directory, tokenizer_path=directory / "first" / "tokenizer"))
    assert done.returncode == 0, done.stderr
    return directory, done.stdout


def steps(directory: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir())


def fingerprint(directory: pathlib.Path) -> dict[str, str]:
    files = [path for path in directory.rglob("*") if path.is_file() and "branches" not in path.parts]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_epochs_decide_the_steps_and_every_epoch_is_kept(finished):
    directory, printed = finished
    line = next(line for line in printed.splitlines() if line.startswith("steps=auto: 2 epochs x "))
    windows = int(line.split(" x ")[1].split()[0].replace(",", ""))
    last = 2 * windows // 32
    assert line.endswith(f"= {last}") and last > 12
    assert "learning_rate=auto: 3e-4 x sqrt(1.5e9 / " in printed
    assert steps(directory / "run") == [windows // 32, last]
    info = runs.find([str(directory / "run")]).info(last)
    assert (info["config"]["steps"], info["config"]["learning_rate"]) == (last, 1e-3)


def test_a_branch_decays_and_leaves_the_run_alone(finished):
    directory, _ = finished
    run_directory = directory / "run"
    start = steps(run_directory)[0]
    before = fingerprint(run_directory)
    keys = {"tokenizer_path": directory / "first" / "tokenizer", "branch_decay_from": start}
    keys["wsd_decay_steps_fraction"] = 0.2
    done = run(train_command(directory, **keys))
    assert done.returncode == 0, done.stderr
    length = start + round(start / 4)
    assert f"a run of {length:,} that decays" in done.stdout
    assert fingerprint(run_directory) == before
    branch = run_directory / "branches" / f"{start}-{length}"
    assert length in steps(branch)
    records = [json.loads(line) for line in (branch / "metrics/metrics.jsonl").read_text().splitlines()]
    rates = [record["learning/current_learning_rate"] for record in records if "learning/loss" in record]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(1e-3) and rates[-1] < 3e-4
    done = run(train_command(directory, **keys | {"branch_decay_from": 10_000}))
    assert done.returncode == 1 and "not in the stable phase" in done.stderr


def test_exported_it_is_the_same_model_in_transformers(finished, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    directory, _ = finished
    out = tmp_path / "exported"
    done = run(command("export_hf.py", directory / "run", out))
    assert done.returncode == 0, done.stderr
    opened, params = opened_run(directory / "run", "dtype=float32")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(theirs).__name__ == "DiffLlamaForCausalLM"
    assert not any(report.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = np.array([tokenizer("def add(first, second):\n    return first + second\n")["input_ids"]], np.int32)
    ones = np.ones_like(ids)
    with jax.set_mesh(opened.mesh):
        inputs = jax.device_put((ids, np.arange(ids.size, dtype=np.int32)[None], ones))
        ours = jax.jit(lambda params, inputs: opened.model.merge(params).logits(*inputs))(params, inputs)
    with torch.no_grad():
        logits = theirs.float()(torch.tensor(ids)).logits.numpy()
    assert logits.shape[-1] == 512  # without the ids that no token has
    np.testing.assert_allclose(np.asarray(ours)[..., :512], logits, atol=1e-4)
    card = (out / "README.md").read_text()
    records = map(json.loads, (directory / "run" / "metrics/metrics.jsonl").read_text().splitlines())
    bits = [record["eval/bits_per_byte"] for record in records if "eval/bits_per_byte" in record][-1]
    for words in ("DiffLlamaForCausalLM", f"bits per byte | {bits:.4f} |", "| Code | commit ", "Python files of"):
        assert words in card
    assert "not measured" not in card


def test_the_export_has_the_held_out_loss_that_evaluate_tells(finished, tmp_path):
    """From training to the weights in transformers, on the same batches, each document by itself."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    directory, _ = finished
    settings = ["dtype=float32", "eval_steps=2", "eval_per_device_batch_size=4"]
    done = run(command("evaluate.py", directory / "run", "task=heldout", *settings))
    assert done.returncode == 0, done.stderr
    (scores,) = directory.glob("run/evaluation/*/scores.jsonl")
    record = json.loads(scores.read_text())
    assert run(command("export_hf.py", directory / "run", tmp_path)).returncode == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).float()
    trained = runs.find([str(directory / "run")])
    data = loader.open_datasets(trained.config(trained.newest(), with_data=True), print).evaluation
    nll = count = 0.0
    for step in range(2):
        batch = data.batch(step, 4, slice(0, 4))
        for row, segments in enumerate(batch["inputs_segmentation"]):
            for segment in set(segments.tolist()) - {0}:
                document = {
                    name: torch.tensor(values[row][segments == segment][None]) for name, values in batch.items()
                }
                with torch.no_grad():
                    logits = theirs(document["inputs"].long()).logits.transpose(1, 2)
                losses = torch.nn.functional.cross_entropy(logits, document["targets"].long(), reduction="none")
                weights = document["targets_segmentation"] > 0
                nll, count = nll + float(losses[weights].sum()), count + float(weights.sum())
    assert count > 300
    assert record["scores"]["loss"] == pytest.approx(nll / count, abs=1e-4)


def test_reading_it_back_is_exact_and_training_starts_from_it(finished, tmp_path):
    directory, _ = finished
    out = tmp_path / "exported"
    assert run(command("export_hf.py", directory / "run", out)).returncode == 0
    opened, params = opened_run(directory / "run")
    jax.tree.map(np.testing.assert_array_equal, hf_directory.read(out, opened.config, opened.model.params), params)
    keys = {"tokenizer_path": directory / "first" / "tokenizer", "load_parameters_path": out, "run_name": "second"}
    done = run(train_command(directory, **keys, num_epoch=-1, steps=1, learning_rate=1e-9, dropout_rate=0.0))
    assert done.returncode == 0, done.stderr
    assert f"Starting from the weights in {out}" in done.stdout

    def heldout(name: str) -> float:
        records = map(json.loads, (directory / name / "metrics/metrics.jsonl").read_text().splitlines())
        return [record["eval/avg_loss"] for record in records if "eval/avg_loss" in record][-1]

    assert heldout("second") == pytest.approx(heldout("run"), abs=2e-3)
    done = run(train_command(directory, **keys | {"run_name": "third", "base_mlp_dim": 32}, num_epoch=-1, steps=1))
    assert done.returncode == 1 and "intermediate_size: 64 there, 32 here" in done.stderr


def test_what_cannot_be_exported_is_said(tmp_path):
    assert run(command("export_hf.py")).returncode == 2
    done = run(command("export_hf.py", tmp_path / "nothing", tmp_path / "out"))
    assert done.returncode == 1 and "is no run" in done.stderr
    config = support.small_config(attention_type="differential_v2", use_qk_norm=True, base_num_kv_heads=2)
    with pytest.raises(ValueError, match=r"differential_v2.*standard and differential.*use_qk_norm"):
        hf_directory.write(tmp_path, config, {}, "float32", None)
