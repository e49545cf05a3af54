"""Requests that come and go: each gets its own text, nothing is compiled twice, and every end is the right one."""

import email
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

from MaxText.inference import api, batcher, generate
from MaxText.input_pipeline import tokenizer
from tests import generation, support
from tests.generation import GREEDY, WARM, write


@pytest.fixture(scope="module")
def shared():
    made = generation.make_batcher()
    made.warm_up()
    return made


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A byte-level BPE, which joins a colon with the newline and the indentation after it."""
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer.train([file.read_text() for file in Path(email.__file__).parent.glob("*.py")], 700, folder)
    return tokenizer.load(str(folder))


@pytest.fixture
def compilations():
    """Counts programs that are compiled, or loaded as compiled before."""
    seen = []

    def note(name, _seconds, **_keywords):
        if name == "/jax/core/compile/jaxpr_trace_duration":
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield seen
    jax.monitoring.unregister_event_duration_listener(note)


PROMPTS = [list(range(5, 5 + size)) for size in (1, 2, 63, 64, 65, 80, 30, 3)]


@pytest.mark.parametrize("num_guesses", [0, 1])
def test_nothing_is_compiled_after_the_warm_up(words, compilations, num_guesses):
    """Neither for guesses, nor for prompts whose last token is taken back, nor for alternatives."""
    made = generation.make_batcher(num_guesses=num_guesses, mtp_num_layers=1, tokenizer=words, vocab_size=700)
    made.warm_up()
    before = len(compilations)
    jax.jit(lambda x: x + 1)(np.float32(1))
    assert len(compilations) == before + 1  # the counter works
    healed = set()
    for prompt in (*PROMPTS, words.encode(["def f(self):"])[0]):
        for heal, with_alternatives, sampling in itertools.product((False, True), (False, True), (GREEDY, WARM)):
            completions = [batcher.Completion(seed) for seed in range(5)]
            max_tokens = min(100 - len(prompt), 12)
            request = batcher.Request(prompt, max_tokens, sampling, (), completions, with_alternatives, heal)
            made.submit(request)
            healed.add(request.allowed is not None)
            made.run()
        write(made, prompt, range(5), 100 - len(prompt), WARM)
    assert len(compilations) == before + 1 and healed == {False, True}


def test_a_text_does_not_depend_on_its_batch_mates(shared):
    alone = [write(shared, prompt, [7], 15, WARM)[0] for prompt in PROMPTS]
    together = [batcher.Completion(7) for _ in PROMPTS]
    for prompt, completion in zip(PROMPTS, together, strict=True):
        shared.submit(batcher.Request(prompt, 15, WARM, (), [completion]))
    shared.run()
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert len({tuple(c.tokens) for c in alone}) == len(PROMPTS)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-5)


def test_more_completions_than_rows_read_the_prompt_once(shared):
    before = shared.counts.prompt_tokens
    completions = write(shared, PROMPTS[2], range(11), 20, WARM)
    assert shared.counts.prompt_tokens == before + 63
    assert len({tuple(c.tokens) for c in completions}) == 11
    assert [c.tokens for c in write(shared, PROMPTS[2], [4], 20, WARM)] == [completions[4].tokens]
    assert {c.finish_reason for c in completions} <= {"length", "stop"}


def test_a_text_may_fill_the_context(shared):
    for size in (1, 50, 99):
        (completion,) = write(shared, range(5, 5 + size), [3], 100 - size, WARM)
        assert completion.finish_reason == "stop" or len(completion.tokens) == 100 - size
    (long,) = write(shared, range(5, 25), [3], 80, GREEDY)
    (short,) = write(shared, range(5, 25), [3], 7, GREEDY)
    assert long.tokens[:7] == short.tokens and short.finish_reason == "length"


def test_too_long_is_refused(shared):
    with pytest.raises(ValueError, match="a prompt of 99 tokens and max_tokens=2: .* together at most 100"):
        shared.submit(batcher.Request([1] * 99, 2, GREEDY, (), [batcher.Completion(0)]))
    with pytest.raises(ValueError, match="prompt of 0 tokens"):
        shared.submit(batcher.Request([], 2, GREEDY, (), [batcher.Completion(0)]))
    assert shared.is_idle


def test_stop_strings_and_the_end_of_text(shared):
    (whole,) = write(shared, PROMPTS[6], [1], 40, WARM)
    middle = whole.text[5:8]
    (cut,) = write(shared, PROMPTS[6], [1], 40, WARM, [middle])
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(middle)]
    ended = [c for seed in range(40) for c in write(shared, [9], [seed], 60, WARM) if c.finish_reason == "stop"]
    assert ended and all(0 not in c.tokens and len(c.tokens) < 60 for c in ended)
    assert all(c.log_probability < sum(c.log_probabilities) for c in ended)  # the end itself counts


def test_pieces_of_text_arrive_as_they_are_written(shared):
    pieces = []
    completion = batcher.Completion(2, lambda piece, c: pieces.append((piece, c.finish_reason)))
    shared.submit(batcher.Request(PROMPTS[7], 30, WARM, (), [completion]))
    shared.run()
    assert "".join(piece for piece, _ in pieces) == completion.text
    assert len(pieces) > 5 and pieces[-1][1] == completion.finish_reason
    assert {reason for _, reason in pieces[:-1]} == {""}


def test_cancelled_requests_end_and_the_others_do_not_notice(shared):
    kept, gone, waiting = ([batcher.Completion(s) for s in range(n)] for n in (1, 3, 2))
    requests = [batcher.Request(PROMPTS[0], 60, WARM, (), each) for each in (kept, gone, waiting)]
    for request in requests:
        shared.submit(request)
    with jax.set_mesh(shared.program.mesh):
        shared.advance()
    assert shared.num_waiting == 2
    shared.cancel(requests[1])
    shared.cancel(requests[2])
    shared.run()
    assert "cancelled" in {c.finish_reason for c in gone} <= {"cancelled", "stop"}
    assert {c.finish_reason for c in waiting} == {"cancelled"} and not waiting[0].tokens
    assert all(len(c.tokens) <= batcher.STEPS for c in gone)
    assert kept[0].tokens == write(shared, PROMPTS[0], [0], 60, WARM)[0].tokens


def test_ids_without_a_token_are_never_written():
    made = generation.make_batcher(vocab_padding=250, context=40)
    hot = batcher.Sampling(50.0, 0, 1.0, 0.0)
    tokens = {token for c in write(made, [3], range(20), 30, hot) for token in c.tokens}
    assert tokens == {1, 2, 3, 4, 5}


def test_the_generator_keeps_the_order_groups_equal_prompts_and_cuts_long_ones(shared):
    config = generation.support.small_config(max_tokens=20, temperature=1.0, top_p=1.0, vocab_size=256)
    make = generate.Generator(shared, config, ["\n"])
    before = shared.counts.prompt_tokens
    prompts = [("abc", "", 1), ("abc", "", 2), ("x" * 200, "", 3), ("abc", "de", 1), ("p" * 100, "s" * 100, 1)]
    texts = make(prompts)
    assert shared.counts.prompt_tokens == before + 3 + 80 + 8 + 80
    assert make.num_cut == 2
    assert [make([prompt])[0] for prompt in prompts] == texts
    assert len(set(texts)) > 3 and not any("\n" in text for text in texts)


@pytest.mark.parametrize(("prefix", "suffix"), [("p" * 100, "s" * 100), ("p" * 5, "s" * 200), ("p" * 200, "s" * 5)])
def test_a_prompt_with_a_gap_that_is_cut_still_asks_for_it(shared, prefix, suffix):
    make = generate.Generator(shared, generation.support.small_config(max_tokens=20, vocab_size=256), [])
    prompt = make._request(prefix, suffix, [batcher.Completion(0)]).prompt
    assert (len(prompt), make.num_cut) == (80, 1)
    assert [token for token in prompt if token > 250] == [251, 252, 253] and (prompt[0], prompt[-1]) == (251, 253)


def test_the_best_of_several_are_the_likeliest_the_end_counted_as_a_token(shared):
    long, ended, cut = (batcher.Completion(seed) for seed in range(3))
    long.tokens, long.log_probability = [5] * 40, -44.0
    ended.tokens, ended.log_probability, ended.ended = [5, 5], -3.0, True
    cut.tokens, cut.log_probability = [5, 5], -2.6
    assert generate.best([long, cut, ended], 2) == [ended, long]
    assert generate.best([batcher.Completion(0)], 1)[0].mean_log_probability == 0
    completions = [c for seed in range(40) for c in write(shared, [9], [seed], 60, WARM)]
    for completion in completions:
        end = completion.log_probability - sum(completion.log_probabilities)
        assert completion.ended == (end < -1e-6) == (completion.finish_reason == "stop")
    assert {completion.ended for completion in completions} == {True, False}


def test_a_last_token_that_is_taken_back_is_counted_with_the_prompt(words):
    """What the first token repeats is in no text, no log-probability's piece, no offset, and costs no token."""
    made = generation.make_batcher(tokenizer=words, vocab_size=700)
    config, prompt, again = support.small_config(vocab_size=700), "def f(self):", "):"
    ids = words.encode([prompt])[0]
    assert words.decode(ids[-1:]) == again
    firsts = set()
    for seed, max_tokens in itertools.product(range(40), (1, 3)):
        body = {"prompt": prompt, "seed": seed, "max_tokens": max_tokens, "logprobs": 5, "temperature": 9, "top_p": 1}
        asked = api.parse(body, config, words, "m")
        made.submit(asked.requests[0])
        made.run()
        answer = api.Answers.to(asked, "m", words).whole()
        (choice,), logprobs = answer["choices"], answer["choices"][0]["logprobs"]
        count = answer["usage"]["completion_tokens"]
        assert answer["usage"]["prompt_tokens"] == len(ids)
        assert count == len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"])
        assert count == max_tokens or choice["finish_reason"] == "stop"
        if "\ufffd" not in choice["text"]:  # part of a character
            assert "".join(logprobs["tokens"]) == choice["text"]
            assert logprobs["text_offset"] == list(itertools.accumulate(map(len, logprobs["tokens"]), initial=0))[:-1]
        assert count == 0 or logprobs["tokens"][0]
        firsts.add(asked.requests[0].completions[0].repeated)
    assert firsts == {0, len(again)}


def test_rows_must_fit_the_mesh():
    made = generation.make_batcher()
    made.program.batch_shards = 3
    with pytest.raises(ValueError, match="decode_rows=4 are not divided by the 3 devices"):
        batcher.Batcher(made.program, made.weights, made.tokenizer, num_rows=4, context=10)
