"""Between text and tokens: prompts with and without a gap to fill, and text that grows token by token.

A token may end inside a character, and a stop string may lie across tokens: what might still change is held back.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from MaxText.input_pipeline.tokenizer import Tokenizer

_CONTEXT_TOKENS = 6  # of the prompt, because how a token reads may depend on the one before it
_INCOMPLETE = "\ufffd"
_GAP = ("fim_prefix", "fim_suffix", "fim_middle")


def prompt_ids(tokenizer: Tokenizer, text: str, suffix: str) -> list[int]:
    """The tokens of a prompt; with a suffix, of one that asks for what stands between the two.

    Raises:
        ValueError: there is no text at all, halves of characters, or a suffix but no tokens to ask with.

    Source: the order prefix, suffix, middle: Bavarian et al. 2022, arXiv:2207.14255, section 3.
    """
    try:
        (text + suffix).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{half!r} is no character, as prompts and suffixes are made of; leave it out") from None
    if not suffix:
        if not text:
            raise ValueError("the prompt is empty; give at least one character to go on with")
        return tokenizer.encode([text])[0]
    missing = [role for role in _GAP if role not in tokenizer.special_ids]
    if missing:
        raise ValueError(
            f"a suffix is given, but the tokenizer {tokenizer.name} has no token for {', '.join(missing)}; "
            "leave the suffix out, or use a model whose tokenizer has them"
        )
    before, after, middle = (tokenizer.special_ids[role] for role in _GAP)
    prefix_ids, suffix_ids = tokenizer.encode([text, suffix])
    return [before, *prefix_ids, after, *suffix_ids, middle]


def cut_around_gap(tokenizer: Tokenizer, ids: Sequence[int], room: int) -> list[int]:
    """At most `room` tokens of a prompt with a gap, the three that ask for it among them.

    The text before the gap loses its beginning; if that is not enough, the text after it loses its end.
    """
    at = ids.index(tokenizer.special_ids["fim_suffix"])
    excess = max(len(ids) - room, 0)
    of_prefix = min(excess, at - 1)
    end = len(ids) - 1 - (excess - of_prefix)
    return [ids[0], *ids[1 + of_prefix : end], ids[-1]]


def pieces(tokenizer: Tokenizer) -> Callable[[int], str]:
    """What gives a token's text as it reads after another one: where a text begins, decoders may drop a blank."""
    anchor = tokenizer.encode(["x"])[0]
    size = len(tokenizer.decode(anchor))
    return lambda token: tokenizer.decode([*anchor, token])[size:]


class Healer:
    """Takes back a prompt's last token, where text that went on would have been cut into tokens elsewhere.

    A tokenizer may join what ends the prompt with what follows: `:` and the newline with its indentation, say. The
    model never saw such a prompt's last token followed by that. So the token is left to the model, among all tokens
    that begin with its text; special ones have none.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    @functools.cached_property
    def _texts(self) -> list[str]:
        piece, sizes = pieces(self._tokenizer), self._tokenizer.token_bytes()
        return [piece(token) if size else "" for token, size in enumerate(sizes)]

    def __call__(self, prompt: Sequence[int]) -> tuple[Sequence[int], str, np.ndarray | None]:
        """The prompt to read, the end of its text that is to be written again, and with which tokens, bool [V].

        They are the prompt, "" and None where its last token stays.
        """
        *before, last = prompt
        end = self._texts[last]
        exact = self._tokenizer.decode(before[-1:]) + end == self._tokenizer.decode(prompt[-2:])
        if not before or not end or not exact or _INCOMPLETE in end:
            return prompt, "", None
        allowed = np.zeros(self._vocab_size, bool)
        allowed[: len(self._texts)] = [text.startswith(end) for text in self._texts]
        return (prompt, "", None) if allowed.sum() < 2 else (before, end, allowed)


class GrowingText:
    """The text of tokens that arrive one by one, up to the first stop string.

    Args:
        again: what the tokens repeat at their beginning; it is no part of the text.

    Attributes:
        text: all that is certain so far.
        stopped: whether a stop string was found; it is not part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str], again: str = ""):
        self.text, self.stopped = "", False
        self._again = len(again)  # characters
        self._tokenizer, self._stop = tokenizer, tuple(s for s in stop if s)
        self._ids = list(prompt[-_CONTEXT_TOKENS:])
        self._known = 0  # of _ids: these are there only because of what they do to the next ones
        self._read = len(self._ids)  # of _ids: the text of these is out
        self._held = ""  # may be the beginning of a stop string

    def add(self, token: int) -> str:
        """What is certain now that was not before."""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._known : self._read])
        after = self._tokenizer.decode(self._ids[self._known :])
        if after.endswith(_INCOMPLETE) or len(after) <= len(before):
            return ""
        self._known, self._read = self._read, len(self._ids)
        return self._release(after[len(before) :], last=False)

    def finish(self) -> str:
        """The rest: what was held back, and of an incomplete character the replacement sign."""
        before = self._tokenizer.decode(self._ids[self._known : self._read])
        after = self._tokenizer.decode(self._ids[self._known :])
        self._known = self._read = len(self._ids)
        return self._release(after[len(before) :], last=True)

    def _release(self, new: str, last: bool) -> str:
        if self.stopped:
            return ""
        skipped = min(self._again, len(new))
        self._again -= skipped
        self._held += new[skipped:]
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            keep = min(found)
        else:
            keep = len(self._held) - (0 if last else self._possible_stop())
        out, self._held = self._held[:keep], self._held[keep:]
        self.text += out
        return out

    def _possible_stop(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest
