"""The notebook script's model, loss, step, generation and checkpoint, in small."""

import dataclasses
import inspect
import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train_10m
from tests import train_10m_setup
from tests.train_10m_setup import TINY


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    with train_10m_setup.offline(monkeypatch, tmp_path):
        yield


@pytest.fixture
def tokenizer():
    return train_10m.load_tokenizer(TINY.vocab_size)


@pytest.fixture
def state():
    return train_10m.create_train_state(TINY)


def logits(state, tokens):
    return np.asarray(jax.jit(train_10m.PythonCodeModel(TINY).apply)({"params": state.params}, jnp.asarray(tokens)))


def test_the_config_and_the_signatures_are_the_seeds():
    names = ("vocab_size", "hidden_dim", "num_layers", "num_heads", "head_dim", "ffn_dim", "max_seq_len", "dropout")
    config = train_10m.Config()
    assert [getattr(config, name) for name in names] == [49152, 256, 6, 4, 64, 1024, 512, 0.0]
    assert config.dtype == jnp.bfloat16
    names = ("learning_rate", "warmup_steps", "total_steps", "weight_decay", "grad_clip", "beta1", "beta2")
    assert [getattr(config, name) for name in names] == [1e-3, 100, 5000, 0.1, 1.0, 0.9, 0.95]

    train, generate = inspect.signature(train_10m.train), inspect.signature(train_10m.generate)
    assert list(train.parameters) == ["config", "num_steps", "log_every"]
    assert [parameter.default for parameter in train.parameters.values()] == [config, 5000, 100]
    assert list(generate.parameters)[:5] == ["state", "tokenizer", "prompt", "max_tokens", "temperature"]
    assert [generate.parameters[name].default for name in ("max_tokens", "temperature")] == [50, 0.8]


def test_the_real_size_and_its_split():
    params = jax.eval_shape(lambda: train_10m.create_train_state(train_10m.Config())).params
    assert train_10m.count_parameters(params) == 18_287_872
    assert params.pop("embedding").size == 12_582_912
    assert train_10m.count_parameters(params) == 5_704_960
    attention = params["block_0"]["attention"]
    assert attention["query"]["kernel"].shape == (256, 4 * 64)
    assert attention["key"]["kernel"].shape == attention["value"]["kernel"].shape == (256, 64)


@pytest.mark.parametrize(
    ("name", "value"), [("num_layers", 0), ("ffn_dim", 1.5), ("beta1", "x"), ("head_dim", 7), ("dropout", 0.1)]
)
def test_a_wrong_config_is_an_error_in_words(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}: "):
        train_10m.Config(**{name: value})


def test_logits_have_the_shape_and_type_they_should_in_bfloat16_too(state):
    config = dataclasses.replace(TINY, dtype=jnp.bfloat16)
    tokens = jnp.zeros((2, 5), jnp.int32)
    found = train_10m.PythonCodeModel(config).apply({"params": state.params}, tokens)
    assert found.shape == (2, 5, TINY.vocab_size)
    assert found.dtype == jnp.float32
    assert np.allclose(found, logits(state, tokens), atol=0.02)


def test_no_token_sees_the_future_or_another_row(state):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, TINY.vocab_size, (2, TINY.max_seq_len))
    before = logits(state, tokens)
    tokens[0, 20] = (tokens[0, 20] + 1) % TINY.vocab_size
    after = logits(state, tokens)
    assert np.array_equal(before[0, :20], after[0, :20])
    assert np.array_equal(before[1], after[1])
    assert (before[0, 20:] != after[0, 20:]).any(axis=-1).all()


def test_rotary_embedding_turns_pairs_by_position_times_frequency():
    x = np.random.default_rng(0).normal(size=(2, 20, 3, 8)).astype(np.float32)
    found = np.asarray(train_10m.RotaryEmbedding(10000.0).apply({}, jnp.asarray(x)))
    angle = np.arange(20)[:, None] * 10000.0 ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[:, None]
    assert np.allclose(found, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-5)


def test_attention_knows_positions(state, monkeypatch):
    tokens = np.arange(TINY.max_seq_len)[None]
    before = logits(state, tokens)
    monkeypatch.setattr(train_10m.RotaryEmbedding, "__call__", lambda self, x: x)
    assert np.abs(before - logits(state, tokens)).max() > 1e-5


def test_loss_masks_padding_by_length_and_learns_the_end_of_file(state, tokenizer):
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    tokens = np.array([[5, 6, 7, end, end, end], [8, 9, 10, 11, 12, 13]], np.int32)
    batch = {"input_ids": jnp.asarray(tokens), "length": jnp.array([4, 6])}
    scores = np.asarray(jax.nn.log_softmax(logits(state, tokens[:, :-1])))
    chosen = np.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    expected = -(chosen[0, :3].sum() + chosen[1].sum()) / 8  # with the first of row 0's EOS, without its padding
    assert float(train_10m.compute_loss(state.params, TINY, batch)) == pytest.approx(expected, rel=1e-5)


def test_the_schedule_the_decay_and_what_is_decayed():
    """A constant gradient makes Adam's step the learning rate; none at all leaves the decay."""
    config = train_10m.Config(warmup_steps=10, total_steps=50)
    optimizer = train_10m.make_optimizer(config)
    params = {"matrix": jnp.zeros((1, 2)), "weight": jnp.zeros(2)}
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 0.1), params)
    opt_state, rates = optimizer.init(params), []
    for _ in range(60):
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        rates.append(-float(updates["weight"][0]))
    assert [rates[0], rates[5], rates[10]] == pytest.approx([0, 5e-4, 1e-3], abs=1e-7)
    assert [rates[30], rates[50], rates[59]] == pytest.approx([5.5e-4, 1e-4, 1e-4], rel=1e-3)

    ones, nothing = jax.tree.map(jnp.ones_like, params), jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(nothing, opt_state, ones)
    assert float(updates["matrix"][0, 0] - updates["weight"][0]) == pytest.approx(-0.1 * 1e-4, rel=1e-4)
    updates, _ = optimizer.update(nothing, optimizer.init(params), ones)
    assert float(updates["weight"][0]) == 0


def test_training_prints_learns_saves_and_compiles_once(capsys):
    train_10m.train_step.clear_cache()
    state = train_10m.train(TINY, num_steps=105, log_every=20)
    out = capsys.readouterr().out
    assert f"JAX version: {jax.__version__}\nDevices: [" in out
    assert "\nDevice count: 8\n" in out
    assert f"\nModel parameters: {train_10m.count_parameters(state.params):,}\n" in out
    lines = [line for line in out.splitlines() if line.startswith("Step ")]
    assert [line.split(",")[0] for line in lines] == [f"Step {step}" for step in (20, 40, 60, 80, 100, 105)]
    losses = [float(line.split("Loss: ")[1]) for line in lines]
    assert losses[0] == pytest.approx(math.log(TINY.vocab_size), abs=0.5)
    assert losses[-1] < losses[0] - 0.5
    assert int(state.step) == 105
    assert train_10m.train_step._cache_size() == 1
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    assert (train_10m_setup.checkpoint() / "state.msgpack").is_file()


def test_a_loss_that_is_not_finite_stops_and_saves_nothing():
    config = dataclasses.replace(TINY, learning_rate=1e30, warmup_steps=1)
    with pytest.raises(FloatingPointError, match="nothing was saved"):
        train_10m.train(config, num_steps=20, log_every=5)
    assert not train_10m_setup.checkpoint().exists()


def test_a_saved_model_generates_the_same_text_and_trains_on_the_same(tokenizer):
    state = train_10m.train(TINY, num_steps=5)
    text = train_10m.generate(state, tokenizer, "def f(x):", max_tokens=20)
    compiled = train_10m.sample_token._cache_size()
    loaded, its_tokenizer = train_10m.load_checkpoint()
    assert loaded.config == state.config
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(loaded), strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
    assert train_10m.generate(loaded, its_tokenizer, "def f(x):", max_tokens=20) == text
    assert train_10m.sample_token._cache_size() == compiled

    batch = next(train_10m.load_data(TINY, its_tokenizer))
    compiled = train_10m.train_step._cache_size()
    next_losses = [float(train_10m.train_step(s, batch)[1]) for s in (state, loaded)]
    assert next_losses[0] == next_losses[1]
    assert train_10m.train_step._cache_size() == compiled


def test_a_save_that_fails_leaves_the_checkpoint_before_it(state, tokenizer, monkeypatch):
    train_10m.save_checkpoint(state, tokenizer)
    saved = (train_10m_setup.checkpoint() / "state.msgpack").read_bytes()

    def full_disk(*_):
        raise OSError("no space left on device")

    other = state.replace(config=dataclasses.replace(TINY, seed=5))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr("pathlib.Path.write_bytes", full_disk)
        train_10m.save_checkpoint(other, tokenizer)
    assert train_10m.load_checkpoint()[0].config == TINY
    assert (train_10m_setup.checkpoint() / "state.msgpack").read_bytes() == saved
    train_10m.save_checkpoint(other, tokenizer)
    assert train_10m.load_checkpoint()[0].config == other.config


@pytest.mark.parametrize("name", ["checkpoint/", "./checkpoint", "checkpoint"])
def test_a_checkpoint_replaces_the_one_before_however_it_is_written(state, tokenizer, name):
    for seed in (0, 5):
        train_10m.save_checkpoint(state.replace(config=dataclasses.replace(TINY, seed=seed)), tokenizer, name)
    assert train_10m.load_checkpoint(name)[0].config.seed == 5
    assert [path.name for path in pathlib.Path().iterdir() if path.name.startswith("checkpoint")] == ["checkpoint"]


def test_a_folder_that_is_no_checkpoint_is_never_replaced(state, tokenizer, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years")
    with pytest.raises(ValueError, match=r"is no checkpoint; give a directory of its own, such as .*thesis/model"):
        train_10m.save_checkpoint(state, tokenizer, str(tmp_path / "thesis"))
    assert (tmp_path / "thesis/chapter.txt").read_text() == "years"


@pytest.mark.parametrize("error", [ConnectionError("the stream broke off"), KeyboardInterrupt()], ids=["error", "stop"])
def test_what_stops_the_training_does_not_lose_it(monkeypatch, capsys, error):
    batches = train_10m.load_data

    def breaks_off(config, tokenizer):
        yield from itertools.islice(batches(config, tokenizer), 3)
        raise error

    monkeypatch.setattr(train_10m, "load_data", breaks_off)
    with pytest.raises(type(error)):
        train_10m.train(TINY, num_steps=9, log_every=1)
    assert f"Stopped after step 3 ({type(error).__name__}); saved: " in capsys.readouterr().out
    assert int(train_10m.load_checkpoint()[0].step) == 3


def test_generation_compiles_once(state, tokenizer):
    train_10m.sample_token.clear_cache()
    long = "x = [1, 2, 3]\n" * 50  # far more tokens than the window
    for prompt in ("def f(x):", "", long):
        for temperature in (0.8, 1, 0):
            text = train_10m.generate(state, tokenizer, prompt, max_tokens=7, temperature=temperature)
            assert text.startswith(prompt)
    assert train_10m.sample_token._cache_size() == 1


def test_greedy_generation_is_the_most_likely_token_of_what_fits_in_the_window(state, tokenizer):
    for prompt in ("def f(x):", "import os\n" * 50):
        ids = tokenizer(prompt)["input_ids"]
        expected = []
        for _ in range(5):
            scores = logits(state, [(ids + expected)[-TINY.max_seq_len :]])[0, -1]
            expected.append(int(scores[: len(tokenizer)].argmax()))
        text = train_10m.generate(state, tokenizer, prompt, max_tokens=5, temperature=0)
        assert text == prompt + tokenizer.decode(expected)


def test_sampling_has_the_probabilities_of_the_temperature(state, tokenizer):
    prompt, temperature = np.zeros(TINY.max_seq_len, np.int32), 0.2

    def draw(count):
        return train_10m.sample_token(state.params, TINY, prompt, 3, len(tokenizer), temperature, 0, count)

    draws = np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(4000)))
    probabilities = np.asarray(jax.nn.softmax(logits(state, prompt[None])[0, 3] / temperature))
    found = np.bincount(draws, minlength=TINY.vocab_size) / len(draws)
    deviation = (found - probabilities) / np.sqrt(probabilities / len(draws))
    assert probabilities.max() > 10 / TINY.vocab_size  # not a temperature at which all are alike
    assert np.abs(deviation).max() < 5
    assert 0.8 < deviation.std() < 1.2


def test_only_tokens_of_the_tokenizer_are_generated(state, tokenizer):
    """The model's vocabulary may be larger than the tokenizer's."""
    params = state.params | {"embedding": state.params["embedding"].at[-1].set(100.0)}
    tokens = np.full(TINY.max_seq_len, TINY.vocab_size - 1, np.int32)
    assert int(train_10m.sample_token(params, TINY, tokens, 0, TINY.vocab_size, 0.0, 0, 0)) == TINY.vocab_size - 1
    assert int(train_10m.sample_token(params, TINY, tokens, 0, 300, 0.0, 0, 0)) < 300


def test_generation_stops_at_the_end_of_file_and_is_reproducible(state, tokenizer, monkeypatch):
    texts = [train_10m.generate(state, tokenizer, "def", temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    with pytest.raises(ValueError, match="temperature=-1"):
        train_10m.generate(state, tokenizer, "def", temperature=-1)

    a = tokenizer.convert_tokens_to_ids("a")
    tokens = iter([a, a, tokenizer.eos_token_id, a])
    monkeypatch.setattr(train_10m, "sample_token", lambda *_: jnp.array(next(tokens)))
    assert train_10m.generate(state, tokenizer, "def ") == "def aa"
    assert next(tokens) == a
