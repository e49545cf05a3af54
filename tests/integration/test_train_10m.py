"""The notebook script as a user runs it, offline; and beside the main trainer: the same ten losses."""

import json
import re
import subprocess
import sys

import flax.traverse_util
import jax
import numpy as np
import pytest

import train_10m
from MaxText import hf_weights, pyconfig
from tests import support
from tests.train_10m_setup import NO_HUB, TINY_ARGUMENTS

SCRIPT = support.ROOT / "train_10m.py"
# The same with a tenth of the local files, which are most of the seconds of a small run.
FEW_FILES = "import sys, train_10m; train_10m.LOCAL_BYTES //= 10; train_10m.main(sys.argv[1:])"
STEP = re.compile(r"^Step (\d+), Loss: (\d+\.\d{4})$", re.MULTILINE)


@pytest.fixture
def run(tmp_path, user_environment):
    """Runs the script or a program, as a user without a hub; gives what it printed."""
    environment = user_environment | NO_HUB | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(support.ROOT)}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(support.ROOT / ".pytest_cache/jax_train_10m")

    def run(*arguments, program="", expect=0, **extra):
        command = [sys.executable, *(["-c", program] if program else [str(SCRIPT)]), *arguments]
        done = subprocess.run(
            command, env=environment | extra, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout if expect == 0 else done.stderr

    return run


def losses(out):
    return {int(step): float(loss) for step, loss in STEP.findall(out)}


@pytest.mark.slow
def test_the_script_runs_to_its_end_offline_and_its_checkpoint_goes_on(run):
    out = run(*TINY_ARGUMENTS, "num_steps=60", "log_every=20")
    order = [
        "JAX version: ",
        "Devices: [",
        "Device count: 1",
        "NO TOKENIZER FROM THE HUGGING FACE HUB: http://127.0.0.1:9",
        "✓ Tokenizer works",
        "NO DATA FROM THE HUGGING FACE HUB",
        "✓ Data loads",
        "✓ Model initialized: ",
        "✓ Forward pass works",
        "✓ Loss computes: ",
        "✓ Training step works",
        "Model parameters: ",
        "Step 20, Loss: ",
        "Step 60, Loss: ",
        "Checkpoint saved: checkpoint_10m",
        "Prompt: def hello():\nGenerated: def hello():",
    ]
    places = [out.find(text) for text in order]
    assert -1 not in places, order[places.index(-1)]
    assert places == sorted(places)
    assert list(losses(out)) == [20, 40, 60]
    assert losses(out)[60] < losses(out)[20]

    load = "import train_10m as t; print(t.generate(*t.load_checkpoint(), 'def hello():'))"
    assert run(program=load) == out.split("Generated: ")[1]


@pytest.mark.slow
def test_two_runs_print_the_same(run):
    settings = [*TINY_ARGUMENTS, "dtype=bfloat16", "num_steps=30", "log_every=5"]
    one, other = (run(*settings, program=FEW_FILES).split("Model initialized")[1] for _ in range(2))
    assert len(losses(one)) == 6
    timed = re.compile("Trained 30 steps in .*")
    assert timed.sub("", one) == timed.sub("", other)


def test_a_hub_that_never_answers_costs_seconds(run):
    """An address of the documentation range: packets to it vanish."""
    ask = "import time, train_10m as t; t0 = time.time(); print(t.hub_problem(), t.hub_problem(), time.time() - t0)"
    out = run(program=ask, HF_ENDPOINT="http://192.0.2.1")
    assert out.count("192.0.2.1") == 2
    assert float(out.split()[-1]) < train_10m.HUB_SECONDS + 3


@pytest.mark.slow
def test_eight_devices_have_the_losses_of_one(run):
    settings = [*TINY_ARGUMENTS, "num_steps=30", "log_every=10"]
    one = run(*settings, "batch_size_per_device=8", program=FEW_FILES)
    eight = run(*settings, "batch_size_per_device=1", program=FEW_FILES, JAX_NUM_CPU_DEVICES="8")
    assert "Device count: 8" in eight
    assert losses(eight) == pytest.approx(losses(one), abs=2e-4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [("num_stps=5", "num_steps, log_every, vocab_size"), ("num_steps", "name=value"), ("num_layers=two", "num_layers")],
)
def test_a_wrong_setting_is_an_error_in_words(run, setting, message):
    assert message in run(setting, expect=1)


@pytest.mark.slow
def test_pasted_into_a_notebook_cell_it_waits_and_the_seeds_calls_work(run):
    """As IPython runs a cell: in a namespace that is __main__ and has get_ipython."""
    small = {"vocab_size: int = 49152": "384", "hidden_dim: int = 256": "32", "num_layers: int = 6": "1"}
    small |= {"ffn_dim: int = 1024": "64", "max_seq_len: int = 512": "32", "LOCAL_BYTES = 20_000_000": "2_000_000"}
    source = SCRIPT.read_text()
    for line, value in small.items():
        assert line in source
        source = source.replace(line, f"{line.split('=')[0]}= {value}")
    notebook = """
import json, sys
get_ipython = object()
exec(compile(json.loads(sys.argv[1]), "cell", "exec"), globals())
print("CELL 3")
validate_pipeline()  # Should show all ✓
state = train(num_steps=7)  # Quick test
exec(compile(json.loads(sys.argv[1]), "cell", "exec"), globals())  # the cell run again
print("CELL 4")
print(generate(state, tokenizer, "def fibonacci(n):"))
"""
    out = run(json.dumps(source), program=notebook)
    assert out.startswith("CELL 3\n")
    assert "✓ Training step works" in out
    assert "Step 7, Loss: " in out
    assert "CELL 4\ndef fibonacci(n):" in out


# Hugging Face's names in a layer -> ours.
NAMES = {
    "self_attn.q_proj": "attention.query.kernel",
    "self_attn.k_proj": "attention.key.kernel",
    "self_attn.v_proj": "attention.value.kernel",
    "self_attn.o_proj": "attention.out.kernel",
    "mlp.gate_proj": "feed_forward.gate.kernel",
    "mlp.up_proj": "feed_forward.up.kernel",
    "mlp.down_proj": "feed_forward.down.kernel",
    "input_layernorm": "attention_norm.weight",
    "post_attention_layernorm": "feed_forward_norm.weight",
}


def our_params(weights):
    """Hugging Face's flat dict of [out, in] matrices as the script's tree of [in, out] ones."""
    flat = {
        ("embedding",): weights.pop("model.embed_tokens.weight"),
        ("norm", "weight"): weights.pop("model.norm.weight"),
    }
    for name, array in weights.items():
        layer, part = re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.weight", name).groups()
        flat[(f"block_{layer}", *NAMES[part].split("."))] = array.T
    return flax.traverse_util.unflatten_dict(flat)


def their_batch(tokens, lengths):
    """The main trainer's form of a batch: one document a row, known by its segment, then padding."""
    segments = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    parts = {"": tokens, "_position": positions, "_segmentation": segments}
    inputs = {f"inputs{name}": array[:, :-1] for name, array in parts.items()}
    return inputs | {f"targets{name}": array[:, 1:] for name, array in parts.items()}


@pytest.mark.slow
@pytest.mark.parametrize("whole_schedule", [False, True], ids=["as it is", "ten steps the whole schedule"])
def test_ten_steps_are_those_of_the_main_trainer(monkeypatch, whole_schedule):
    """validate_10m.yml in float32, the same weights and batches; only batch and vocabulary are smaller, on one device.

    In its own schedule ten steps are all warm-up; the other has the cosine's whole length and a decay one can see.
    """
    length, rows, vocab_size = 64, 2, 8192
    keys = {"dtype": "float32", "max_target_length": length, "per_device_batch_size": rows, "vocab_size": vocab_size}
    changed = {}
    if whole_schedule:
        keys |= {"learning_rate_schedule_steps": 10, "warmup_steps_fraction": 0.2, "adam_weight_decay": 20}
        changed = {"total_steps": 10, "warmup_steps": 2, "weight_decay": 20.0}
    arguments = [f"{key}={value}" for key, value in keys.items()]
    theirs = pyconfig.initialize([str(support.ROOT / "configs/validate_10m.yml"), *arguments], {})
    changed |= {"max_seq_len": length, "batch_size_per_device": rows, "vocab_size": vocab_size}
    ours = train_10m.Config(dtype="float32", **changed)
    trainer = support.Trainer(theirs, support.mesh_of())
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    monkeypatch.setattr(train_10m, "sharding", lambda *_: one_device)
    with jax.numpy_rank_promotion("allow"):
        state = train_10m.create_train_state(ours)
        params = our_params(hf_weights.to_hugging_face(jax.device_get(trainer.state.params)))
        assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, state.params)
        state = state.replace(params=jax.device_put(params, one_device))

        rng = np.random.default_rng(0)
        found, expected = [], []
        for _ in range(10):
            tokens = (rng.random((rows, length + 1)) ** 4 * ours.vocab_size).astype(np.int32)
            lengths = rng.integers(length // 2, length + 2, rows).astype(np.int32)
            metrics = trainer(their_batch(tokens, lengths))
            expected.append(metrics["learning/loss"])
            state, loss = train_10m.train_step(state, {"input_ids": tokens, "length": lengths})
            found.append(float(loss))
    assert expected[-1] < expected[0] - 0.01
    assert metrics["learning/raw_grad_norm"] > 1  # so that clipping is compared too
    assert found == pytest.approx(expected, abs=1e-4)
