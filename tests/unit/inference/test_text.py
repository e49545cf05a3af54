"""Text that grows: stop strings across tokens, characters across tokens, and prompts with a gap."""

import email
import random
from pathlib import Path

import pytest

from MaxText.inference import text
from MaxText.input_pipeline import tokenizer as tokenizers
from tests.generation import ByteTokenizer


class PieceTokenizer(ByteTokenizer):
    """Tokens of several bytes, some ending inside a character."""

    pieces = (
        b"def",
        b"\n",
        b"\ndef",
        b" x",
        b"\xc3",
        b"\xa9",
        b"\xf0\x9f",
        b"\x98",
        b"\x80d",
        b"e",
        b"f\nclass",
        b"\xff",
    )

    def decode(self, ids):
        return b"".join(self.pieces[id_] for id_ in ids).decode(errors="replace")

    def encode(self, texts):
        return [[0] for _ in texts]


def grown(tokenizer, ids, stop=(), prompt=()):
    growing = text.GrowingText(tokenizer, prompt, stop)
    out = []
    for id_ in ids:
        out.append(growing.add(id_))
        if growing.stopped:
            break
    return growing, [*out, growing.finish()]


def test_pieces_are_the_text_whatever_the_tokens():
    tokenizer = PieceTokenizer()
    choose = random.Random(0)
    for _ in range(300):
        ids = choose.choices(range(12), k=choose.randrange(12))
        prompt = choose.choices(range(4), k=choose.randrange(9))
        growing, out = grown(tokenizer, ids, prompt=prompt)
        assert "".join(out) == growing.text == tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]


def test_a_character_comes_when_it_is_whole():
    growing, out = grown(PieceTokenizer(), [3, 6, 7, 8, 4, 5])
    assert out == [" x", "", "", "\U0001f600d", "", "é", ""]
    growing, out = grown(PieceTokenizer(), [3, 6])
    assert out == [" x", "", "\ufffd"]


@pytest.mark.parametrize(
    ("ids", "stop", "expected"),
    [
        ([3, 2, 3], ["\ndef"], [" x", "", ""]),
        ([3, 1, 0, 3], ["\ndef"], [" x", "", "", ""]),
        ([3, 1, 9, 3], ["\ndef"], [" x", "", "\ne", " x", ""]),
        ([1, 0, 3], ["\ndef x", "def"], ["", "\n", ""]),
        ([3, 10, 3], ["\nclass"], [" x", "f", ""]),
        ([3, 1], ["\ndef"], [" x", "", "\n"]),
        ([3, 6, 7, 8], ["\U0001f600"], [" x", "", "", "", ""]),
    ],
)
def test_a_text_ends_before_the_first_stop(ids, stop, expected):
    growing, out = grown(PieceTokenizer(), ids, stop)
    assert out == expected
    assert growing.stopped == ("".join(out) != PieceTokenizer().decode(ids))


def test_what_is_told_is_never_part_of_a_stop():
    tokenizer, choose = PieceTokenizer(), random.Random(1)
    for _ in range(300):
        ids = choose.choices(range(12), k=10)
        stop = [tokenizer.decode(choose.choices(range(4), k=2)), "f\nc"]
        growing, out = grown(tokenizer, ids, stop)
        whole = tokenizer.decode(ids)
        first = min((at for s in stop if (at := whole.find(s)) >= 0), default=len(whole))
        # Among several stops the one that is complete first counts; it may begin later.
        assert whole.startswith(growing.text) and not any(s in growing.text for s in stop)
        assert len(growing.text) >= first


def test_a_prompt_with_a_gap():
    tokenizer = ByteTokenizer()
    assert text.prompt_ids(tokenizer, "ab", "") == [97, 98]
    assert text.prompt_ids(tokenizer, "ab", "c") == [251, 97, 98, 252, 99, 253]
    assert text.prompt_ids(tokenizer, "", "c") == [251, 252, 99, 253]
    with pytest.raises(ValueError, match="the prompt is empty"):
        text.prompt_ids(tokenizer, "", "")
    tokenizer.special_ids = {"fim_prefix": 251}
    with pytest.raises(ValueError, match="tokenizer bytes has no token for fim_suffix, fim_middle"):
        text.prompt_ids(tokenizer, "ab", "c")


@pytest.mark.parametrize(
    ("prefix", "suffix", "room", "expected"),
    [
        ("abcd", "efgh", 11, "<abcd|efgh>"),
        ("abcd", "efgh", 9, "<cd|efgh>"),
        ("abcd", "efgh", 7, "<|efgh>"),
        ("abcd", "efgh", 5, "<|ef>"),
        ("a", "efghij", 6, "<|efg>"),
        ("", "efgh", 3, "<|>"),
    ],
)
def test_a_prompt_with_a_gap_keeps_what_asks_for_it(prefix, suffix, room, expected):
    tokenizer = ByteTokenizer()
    ids = text.cut_around_gap(tokenizer, text.prompt_ids(tokenizer, prefix, suffix), room)
    assert "".join({251: "<", 252: "|", 253: ">"}.get(id_, chr(id_)) for id_ in ids) == expected


def test_a_last_token_that_text_may_go_on_with_is_left_to_the_model():
    heal = text.Healer(PieceTokenizer(12), 14)
    prompt, again, allowed = heal([3, 0, 1])
    assert (prompt, again, list(allowed.nonzero()[0])) == ([3, 0], "\n", [1, 2])
    for stays in ([3, 0, 2], [1], [3, 5], [3, 11]):  # no longer one, nothing before it, not a whole character
        assert heal(stays) == (stays, "", None)
    growing = text.GrowingText(PieceTokenizer(), [3, 0], ["\nde"], "\n")
    assert [growing.add(2), growing.add(3), growing.finish()] == ["def", " x", ""]


@pytest.fixture(scope="module", params=["BPE", "SentencePiece"])
def trained(request, tmp_path_factory):
    """A tokenizer that was trained; SentencePiece's, by default, drops the blank that a text begins with."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [file.read_text() for file in Path(email.__file__).parent.glob("*.py")]
    if request.param == "BPE":
        tokenizers.train(texts, 700, folder)
        return tokenizers.load(str(folder))
    import sentencepiece

    lines = iter([line for text in texts for line in text.splitlines() if line])
    options = {"vocab_size": 700, "byte_fallback": True, "eos_id": 2, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=str(folder / "sp"), **options)
    with pytest.warns(UserWarning, match="does not reproduce text exactly"):
        return tokenizers.load(str(folder / "sp.model"))


@pytest.mark.filterwarnings("ignore:builtin type .*Swig:DeprecationWarning")
def test_whatever_a_healed_prompt_goes_on_with_its_text_stays(trained):
    """A token that is allowed begins with the prompt's last piece, blank and all; special tokens are no text."""
    heal, healed = text.Healer(trained, trained.vocab_size), 0
    for prompt in ("import email", "x = self", "def f(self, header", "return ", "if a <", "a = b", "for"):
        ids = trained.encode([prompt])[0]
        before, again, allowed = heal(ids)
        whole = trained.decode(ids)
        if allowed is None:
            assert before == ids
            continue
        assert allowed[ids[-1]] and not allowed[trained.eos_id]
        for token in allowed.nonzero()[0].tolist():
            assert trained.decode([*before, token]).startswith(whole), (prompt, again)
            growing = text.GrowingText(trained, before, (), again)
            assert whole + growing.add(token) + growing.finish() == trained.decode([*before, token])
            healed += 1
    assert healed > 8
