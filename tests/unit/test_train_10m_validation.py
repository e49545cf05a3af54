"""The notebook script's validate_pipeline(): its ticks, and for each check that fails what, why and what to do."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import pytest

import train_10m
from tests import train_10m_setup
from tests.train_10m_setup import TINY


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    with train_10m_setup.offline(monkeypatch, tmp_path):
        yield


def test_every_check_passes_and_the_ticks_are_the_seeds(capsys):
    train_10m.validate_pipeline(TINY)
    lines = capsys.readouterr().out.splitlines()
    ticks = [line for line in lines if line.startswith("✓ ")]
    parameters = train_10m.count_parameters(train_10m.create_train_state(TINY).params)
    assert ticks[:3] == ["✓ Tokenizer works", "✓ Data loads", f"✓ Model initialized: {parameters:,} params"]
    assert ticks[3] == "✓ Forward pass works"
    assert float(ticks[4].removeprefix("✓ Loss computes: ")) == pytest.approx(math.log(TINY.vocab_size), abs=0.2)
    assert ticks[5:] == ["✓ Training step works", "✓ Loss is not NaN"]
    assert f"JAX version: {jax.__version__}" in lines
    assert "Device count: 8" in lines
    assert any(line.startswith("! No TPU") for line in lines)
    assert train_10m.tokenizer is not None
    assert not train_10m_setup.checkpoint().exists()


def raises(message):
    def function(*_, **__):
        raise RuntimeError(message)

    return function


def narrow_model(config, model=train_10m.PythonCodeModel):
    """One that leaves out a token."""
    return types.SimpleNamespace(init=model(config).init, apply=lambda *given: model(config).apply(*given)[..., 1:])


def with_nan_weights(state, batch):
    nan = jax.tree.map(lambda leaf: leaf * jnp.nan, state.params)
    return state.replace(step=state.step + 1, params=nan), jnp.float32(1)


# What is broken -> (what of the script is replaced and by what, the failure's first line, the cause, part of the cure).
BROKEN = {
    "no device": ({"print_device_info": raises("TPU in use")}, "Devices are not available", "TPU in use", "restart"),
    "tokenizer": ({"load_tokenizer": raises("401")}, "Tokenizer does not work", "401", "huggingface_hub.login()"),
    "data": ({"load_data": raises("gated")}, "Data does not load", "gated", "HF_HUB_OFFLINE=1"),
    "model": ({"make_optimizer": raises("bad")}, "Model cannot be initialized", "bad", "batch_size_per_device"),
    "forward": ({"PythonCodeModel": narrow_model}, "Forward pass does not work", "shape (8, 32, 383)", "components"),
    "loss": ({"compute_loss": lambda *_: jnp.float32(1)}, "Loss is wrong", "a fresh model guesses", "compute_loss"),
    "NaN loss": ({"compute_loss": lambda *_: jnp.float32(jnp.nan)}, "Loss is wrong", "nan", "compute_loss"),
    "step": ({"train_step": lambda state, _: (state, 1.0)}, "Training step does not work", "counts 0", "train_step"),
    "NaN after the step": (
        {"train_step": lambda state, _: (state.replace(step=1), math.nan)},
        "Loss or weights are not finite",
        "nan",
        "learning_rate",
    ),
    "NaN weights": (
        {"train_step": with_nan_weights},
        "Loss or weights are not finite",
        "NaN or infinity",
        "learning_rate",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_check_that_fails_says_what_why_and_what_to_do_and_stops(monkeypatch, capsys, broken):
    replaced, failure, cause, cure = BROKEN[broken]
    config = dataclasses.replace(TINY, seed=1 + list(BROKEN).index(broken))  # nothing compiled before serves
    for name, replacement in replaced.items():
        monkeypatch.setattr(train_10m, name, replacement)
    with pytest.raises(RuntimeError, match=f"validate_pipeline stopped: {failure}"):
        train_10m.validate_pipeline(config)
    *before, what, why, what_to_do = capsys.readouterr().out.splitlines()
    assert what == f"✗ {failure}"
    assert why.startswith("  Cause: ")
    assert cause in why
    assert what_to_do.startswith("  Cure: ")
    assert cure in what_to_do
    assert not any(line.startswith("✗") for line in before)


def test_an_old_jax_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(jax, "__version_info__", (0, 6, 2))
    with pytest.raises(RuntimeError):
        train_10m.validate_pipeline(TINY)
    out = capsys.readouterr().out
    assert "is older than 0.7.2" in out
    assert 'pip install -U "jax[tpu]"' in out


def test_a_kaggle_session_with_one_of_eight_cores_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(RuntimeError):
        train_10m.validate_pipeline(TINY)
    out = capsys.readouterr().out
    assert "Kaggle gave 1 of the 8 TPU cores" in out
    assert "start another" in out
