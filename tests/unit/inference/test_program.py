"""Generation with memories is the same model as without: logits, choices, and what the heads guess."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxText import models
from MaxText.inference import program, weights
from tests import generation, support

YARN = {"rope_factor": 4, "original_max_position_embeddings": 16}
MODELS = {
    "standard, one key head": {"base_num_kv_heads": 1, **YARN},
    "standard, grouped": {"base_num_kv_heads": 2, "use_qk_norm": "true"},
    "differential": {"attention_type": "differential", "base_num_kv_heads": 4, **YARN},
    "differential_v2": {"attention_type": "differential_v2", "base_num_kv_heads": 2, "logits_via_embedding": "false"}
    | YARN,
}
LENGTHS = (37, 9, 18)  # of texts that are packed into one row of 64


@functools.cache
def model_of(**keys):
    config = support.small_config(**{"max_target_length": 64, "initializer_range": 0.3} | keys)
    made = program.Program(config, support.mesh_of(), config.mtp_num_layers)
    params = jax.jit(lambda key: models.initial_params(config, key))(jax.random.key(0))
    return config, made, params, weights.unstacked(jax.tree.map(jnp.copy, params))


def packed(texts, length):
    """One row with all the texts, as in training."""
    ids = np.concatenate([*texts, np.zeros(length - sum(map(len, texts)), np.int32)])
    positions = np.concatenate([np.arange(len(text)) for text in texts] + [np.arange(length - sum(map(len, texts)))])
    segments = np.concatenate([np.full(len(text), i + 1) for i, text in enumerate(texts)] + [np.zeros(64)])[:length]
    return ids[None].astype(np.int32), positions[None].astype(np.int32), segments[None].astype(np.int32)


@pytest.mark.parametrize("name", MODELS)
def test_logits_with_memories_are_those_of_the_packed_texts_without(name):
    config, made, params, cut = model_of(**MODELS[name])
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, config.vocab_size, size).astype(np.int32) for size in LENGTHS]
    with jax.set_mesh(made.mesh):
        whole = made.model.merge(params)
        full = np.asarray(jax.jit(whole.logits)(*packed(texts, 64)))[0]

        @jax.jit
        def piece(memories, tokens, first):
            state, memories = made.extend(cut, memories, tokens, first)
            return whole.scores(whole.decoder.decoder_norm(state)), memories

        memories = made.empty_rows(3, 48).memories.layers
        first, logits = np.zeros(3, np.int32), [[], [], []]
        # A prompt with padding behind it, single tokens, and a few at once; shorter texts run out of tokens.
        for size in (8, 1, 1, 4, 8, 8, 8):
            tokens = [
                np.resize(np.append(text[at : at + size], [7] * size), size)
                for text, at in zip(texts, first, strict=True)
            ]
            scores, memories = piece(memories, np.stack(tokens), first)
            for row, text in enumerate(texts):
                count = min(size, len(text) - first[row])
                logits[row] += list(np.asarray(scores[row, :count]))
                first[row] += count
        ends = np.cumsum(LENGTHS)
        for row, (begin, end) in enumerate(zip(ends - LENGTHS, ends, strict=True)):
            got = np.stack(logits[row])
            assert len(got) == min(LENGTHS[row], 38)
            np.testing.assert_allclose(got, full[begin:end][: len(got)], atol=1e-4, rtol=1e-4)


def greedy_without_memories(made, params, prompt, count):
    """The texts' next tokens, and what head k thinks at each place, from the whole forward pass."""
    length = made.config.max_target_length
    whole = made.model.merge(params)

    @jax.jit
    def ids(tokens):
        targets = jnp.roll(tokens, -1, axis=1)
        one = jnp.ones_like(tokens)
        arguments = (tokens, jnp.arange(length)[None], one)
        heads = whole.of_all_heads(*arguments, targets, one.astype(jnp.float32), None)
        return jnp.stack([jnp.argmax(whole.scores(hidden), axis=-1)[0] for hidden in heads])

    with jax.set_mesh(made.mesh):
        text = list(prompt)
        for _ in range(count):
            padded = np.array([text + [0] * (length - len(text))], np.int32)
            text.append(int(ids(padded)[0, len(text) - 1]))
        return text[len(prompt) :], np.asarray(ids(np.array([text + [0] * (length - len(text))], np.int32)))


@pytest.mark.parametrize(
    ("attention_type", "block"), [*((a, "true") for a in models.ATTENTION_TYPES), ("standard", "false")]
)
def test_what_the_first_head_guesses_is_what_it_says_without_memories(attention_type, block):
    keys = {
        "attention_type": attention_type,
        "base_num_kv_heads": 2,
        "mtp_num_layers": 1,
        "mtp_transformer_block": block,
    }
    _, made, params, cut = model_of(**keys)
    prompt = list(range(3, 14))
    text, by_head = greedy_without_memories(made, params, prompt, 12)
    with jax.set_mesh(made.mesh):
        memories = made.read(cut, np.array([prompt + [0] * 6], np.int32))
        settings = program.Settings(np.float32(0), np.int32(0), np.float32(1), np.float32(0), np.uint32(0))
        one = (settings, np.bool_(False), np.ones(made.config.vocab_size, bool))
        rows = made.empty_rows(2, 64)
        rows = made.place(rows, memories, np.int32(1), np.int32(10), np.int32(prompt[-1]), one)
        written = []
        while len(written) < 8:
            rows, steps = made.write(cut, rows, 1)
            written += np.asarray(steps.tokens)[0, 1, : int(steps.num[0, 1])].tolist()
            # The newest token stands at place 11 + len(written) - 1; the head read it one place before.
            assert int(rows.guesses[1, 0]) == by_head[1, 11 + len(written) - 2]
        assert written == text[: len(written)]


@pytest.mark.parametrize("num_guesses", [1, 3])
@pytest.mark.parametrize("sampling", [generation.GREEDY, generation.WARM])
def test_guessing_changes_the_number_of_steps_and_not_the_text(num_guesses, sampling):
    keys = {"vocab_size": 5, "mtp_num_layers": 3, "initializer_range": 0.3, "attention_type": "differential_v2"}
    plain = generation.make_batcher(num_rows=8, **keys)
    guessing = generation.make_batcher(num_rows=8, num_guesses=num_guesses, **keys)
    for prompt in ([3], [1, 2, 3, 4, 2], [4, 4, 1], [2, 2, 2]):
        without = generation.write(plain, prompt, range(8), 40, sampling)
        with_guesses = generation.write(guessing, prompt, range(8), 40, sampling)
        assert [c.tokens for c in with_guesses] == [c.tokens for c in without]
        both = ([c.log_probability for c in each] for each in (with_guesses, without))
        np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-4)
    assert plain.counts.tokens_per_step == 1
    assert 1.03 < guessing.counts.tokens_per_step < 1 + num_guesses


def test_guessing_keeps_the_distribution():
    """Three tokens after a prompt, against their exact probabilities: chi-squared over all there are."""
    keys = {"vocab_size": 5, "mtp_num_layers": 1, "initializer_range": 0.3, "vocab_padding": 1}
    made = generation.make_batcher(num_rows=256, num_guesses=1, **keys)
    num = 2048
    found = generation.write(made, [2, 3], range(num), 3, generation.WARM)
    counts = collections.Counter((*c.tokens, *([0] if c.finish_reason == "stop" else [])) for c in found)
    config, _, params, _ = model_of(**{"base_num_kv_heads": 2} | keys)
    whole = models.abstract(config).merge(params)

    @jax.jit
    def chances(tokens):
        scores = whole.logits(tokens, jnp.arange(8)[None], jnp.ones_like(tokens))
        return jax.nn.softmax(scores[0])

    expected = {(): 1.0}
    with jax.set_mesh(support.mesh_of()):
        for place in range(3):
            for text in [text for text in expected if len(text) == place and 0 not in text]:
                ids = np.array([[2, 3, *text, 0, 0, 0, 0, 0, 0][:8]], np.int32)
                share = np.asarray(chances(ids))[1 + place]
                chance = expected.pop(text)
                expected |= {(*text, token): chance * share[token] for token in range(4)}
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
    assert set(counts) <= set(expected)
    squared = sum((counts[text] - num * p) ** 2 / (num * p) for text, p in expected.items() if num * p > 1)
    degrees = len(expected) - 1
    assert squared < degrees + 4 * np.sqrt(2 * degrees)  # by chance about once in ten thousand
    assert made.counts.tokens_per_step > 1.05


def test_more_guesses_than_heads_are_refused():
    config = support.small_config(mtp_num_layers=1)
    with pytest.raises(ValueError, match="speculative_tokens=2, but the model has mtp_num_layers=1 heads"):
        program.Program(config, support.mesh_of(), 2)


def test_matrices_are_loaded_in_the_dtype_of_the_arithmetic():
    config = support.small_config(dtype="bfloat16", mtp_num_layers=1)
    made = program.Program(config, support.mesh_of(), 0)
    leaves = jax.tree_util.tree_leaves_with_path(weights.abstract_params(config, made.model, made.mesh))
    dtypes = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in leaves}
    assert {str(dtype) for path, dtype in dtypes.items() if "scale" in path} == {"float32"}
    assert {str(dtype) for path, dtype in dtypes.items() if "scale" not in path} == {"bfloat16"}
    assert len(list(itertools.chain(dtypes))) > 10
