"""Encodes ASCII texts from a dictionary of words: the same ids as the tokenizer itself, several times as fast.

In: a `tokenizers` backend and texts. Out: ids, or None for a text that the tokenizer has to encode. Where a regular
expression cuts text into words and tokens stay inside words, a word has the same ids everywhere; Python's `re` cuts
ASCII faster than the tokenizer's engine, and code repeats its words. What is not known to be equal is left alone.
"""

import array
import json
import re
from typing import Any

MAX_WORDS = 1_000_000  # then the dictionary begins anew: about 200 MB
_SPELLED = {byte: 256 + byte for byte in range(33)} | {127: 289}  # how byte-level pieces spell ASCII; all else as it is
SAMPLE = "def f(x1, *_):\r\n\treturn x['a']  # it's 10%\x1c\n\n\n    \x0c  \n!!\n\ty +=-1;\"\"\"\n   z \n \t"


class WordCache:
    """The words of one tokenizer. Threads may share it: a dictionary is only ever added to, or left for another."""

    def __init__(self, backend: Any):
        self._backend = backend
        self._words: dict[str, bytes] = {}
        self._pattern = _pattern_of(backend)
        added = backend.get_added_tokens_decoder().values()
        self._unbreakable = [token.content for token in added if not token.special]  # these are found in any text
        if self._pattern is not None and self._ids(SAMPLE) != backend.encode(SAMPLE, add_special_tokens=False).ids:
            self._pattern = None

    def encode(self, text: str) -> list[int] | None:
        """The ids of the text; None if it cannot be taken word by word."""
        if self._pattern is None or not text.isascii() or any(token in text for token in self._unbreakable):
            return None
        return self._ids(text)

    def _ids(self, text: str) -> list[int] | None:
        assert self._pattern is not None
        words = self._pattern.findall(text)
        if len("".join(words)) != len(text):
            return None
        known = self._words
        tokenize = self._backend.model.tokenize
        for word in set(words):  # not less known.keys(), which walks through all of known
            if word not in known:
                tokens = tokenize(word.translate(_SPELLED))
                known[word] = array.array("i", [token.id for token in tokens]).tobytes()
        if len(known) > MAX_WORDS:
            self._words = {}
        return array.array("i", b"".join(map(known.__getitem__, words))).tolist()


def _pattern_of(backend: Any) -> re.Pattern[str] | None:
    """The expression that cuts ASCII text as this tokenizer does; None if it is not known to be one expression."""
    if backend.normalizer is not None and type(backend.normalizer).__name__ not in (
        "NFC",
        "NFKC",
    ):  # ASCII stays as it is
        return None
    if type(backend.model).__name__ != "BPE" or backend.model.dropout or backend.pre_tokenizer is None:
        return None
    steps = json.loads(backend.pre_tokenizer.__getstate__()).get("pretokenizers", [])  # without the whole vocabulary
    if len(steps) != 2:
        return None
    split, byte_level = steps
    if (
        split["type"] != "Split"
        or split["behavior"] != "Isolated"
        or split["invert"]
        or "Regex" not in split["pattern"]
    ):
        return None
    if byte_level["type"] != "ByteLevel" or byte_level["use_regex"] or byte_level["add_prefix_space"]:
        return None
    text = re.sub(r"\[(?:\\.|[^\]])*\]", lambda match: _ascii(match[0], ""), split["pattern"]["Regex"])
    text = _ascii(text, "[]")
    try:
        pattern = re.compile(text, re.ASCII)
    except re.error:
        return None
    return None if pattern.groups or re.search(r"\\[pP]", text) else pattern


def _ascii(text: str, brackets: str) -> str:
    """Properties of Unicode as ranges of ASCII, in these brackets."""
    opening, closing = brackets[:1], brackets[1:]
    letters = text.replace(r"\p{L}", f"{opening}A-Za-z{closing}")
    return letters.replace(r"\p{N}", f"{opening}0-9{closing}")
