"""Bodies of OpenAI's completions API as requests to the batcher, and completions as its answers.

What is not understood is refused, with the field's name: nothing that was asked for is left out in silence.
"""

import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import FrozenConfigDict

from MaxText.inference import generate, text
from MaxText.inference.batcher import Completion, Request, Sampling
from MaxText.inference.sampling import TOP_LOGPROBS
from MaxText.input_pipeline.tokenizer import Tokenizer, num_token_ids

MAX_COMPLETIONS = 128  # of one request
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
DEFAULT_MAX_TOKENS = 16  # as OpenAI's
# Accepted where they change nothing.
_NEUTRAL = {"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "echo": False}


class Refused(ValueError):
    """A body that cannot be answered; `field` is what is wrong with it."""

    def __init__(self, message: str, field: str | None, status: int = 400):
        super().__init__(message)
        self.field, self.status = field, status

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients expect errors."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": None}}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A body that was understood.

    Attributes:
        prompts: one request for each.
        shown: how many of a prompt's completions are answered with, the best first if there are more.
        logprobs: alternatives to tell for each token; None = no log-probabilities at all.
    """

    requests: tuple[Request, ...]
    shown: int
    stream: bool
    with_usage: bool
    logprobs: int | None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(request.prompt) for request in self.requests)


def parse(body: Any, config: FrozenConfigDict, tokenizer: Tokenizer, model: str) -> Asked:
    """What a body asks for.

    Raises:
        Refused: it is not understood.
    """
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object", None)
    fields = dict(body)

    def take(name: str, default: Any, kind: type | tuple[type, ...], holds: Callable[[Any], bool], rule: str) -> Any:
        value = fields.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not holds(value):
            raise Refused(f"{name}={_short(value)}: must be {rule}", name)
        return value

    number = (int, float)
    wanted = take("model", model, str, bool, "a name")
    if wanted != model:
        raise Refused(f"the model {_short(wanted)} is not here; there is {model}", "model", 404)
    max_tokens = take("max_tokens", DEFAULT_MAX_TOKENS, int, lambda v: v >= 1, "a whole number, at least 1")
    shown = take("n", 1, int, lambda v: 1 <= v <= MAX_COMPLETIONS, f"from 1 to {MAX_COMPLETIONS}")
    written = take("best_of", shown, int, lambda v: shown <= v <= MAX_COMPLETIONS, f"from n to {MAX_COMPLETIONS}")
    default = generate.sampling_of(config)
    sampling = Sampling(
        float(take("temperature", default.temperature, number, lambda v: 0 <= v <= 100, "from 0 to 100")),
        take("top_k", default.top_k, int, lambda v: 0 <= v < 2**31, "a whole number, at least 0"),
        float(take("top_p", default.top_p, number, lambda v: 0 < v <= 1, "greater than 0 and at most 1")),
        float(take("min_p", default.min_p, number, lambda v: 0 <= v <= 1, "from 0 to 1")),
    )
    seed = take("seed", None, int, lambda v: abs(v) < 2**63, "a whole number of 64 bits")
    logprobs = take("logprobs", None, int, lambda v: 0 <= v <= TOP_LOGPROBS, f"from 0 to {TOP_LOGPROBS}")
    stream = take("stream", False, bool, lambda _: True, "true or false")
    options = take("stream_options", {}, dict, lambda _: True, "an object")
    suffix = take("suffix", "", str, lambda _: True, "text")
    stop = _stops(fields.pop("stop", None))
    prompts = _prompts(fields.pop("prompt", None), suffix, tokenizer, num_token_ids(config))
    if stream and written > shown:
        raise Refused("best_of greater than n cannot be streamed", "best_of")
    for name, neutral in _NEUTRAL.items():
        if fields.pop(name, None) not in (None, neutral):
            raise Refused(f"{name} is not supported", name)
    fields.pop("user", None)
    if fields:
        raise Refused(f"unknown field {', '.join(map(_short, fields))}", next(iter(fields)))
    seeds = (random.getrandbits(32) if seed is None else seed for _ in prompts)
    requests = tuple(
        Request(
            prompt=ids,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            completions=[Completion(first + i) for i in range(written)],
            with_alternatives=bool(logprobs),
            heal=is_text and not suffix,
        )
        for (ids, is_text), first in zip(prompts, seeds, strict=True)
    )
    return Asked(requests, shown, stream, bool(options.get("include_usage")), logprobs)


def _short(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 60 else told[:57] + "..."


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARACTERS for s in stops)
    if not good or len(stops) > MAX_STOPS:
        raise Refused(f"stop: must be text, or a list of at most {MAX_STOPS}, of 1 to {MAX_STOP_CHARACTERS}", "stop")
    return tuple(stops)


def _prompts(value: Any, suffix: str, tokenizer: Tokenizer, num_ids: int) -> list[tuple[list[int], bool]]:
    """Of text, a list of texts, tokens, or a list of lists of tokens: the tokens, and whether they were text."""

    def is_tokens(x: Any) -> bool:
        return isinstance(x, list) and bool(x) and all(type(i) is int and 0 <= i < num_ids for i in x)

    given = value if isinstance(value, list) and not is_tokens(value) else [value]
    if not given or len(given) > MAX_COMPLETIONS or not all(isinstance(x, str) or is_tokens(x) for x in given):
        rule = f"text, tokens below {num_ids}, or a list of at most {MAX_COMPLETIONS} of either"
        raise Refused(f"prompt={_short(value)}: must be {rule}", "prompt")
    if suffix and not all(isinstance(x, str) for x in given):
        raise Refused(
            "suffix goes with a prompt of text; one of tokens must hold the tokens that ask for a gap", "suffix"
        )
    try:
        return [(text.prompt_ids(tokenizer, x, suffix), True) if isinstance(x, str) else (x, False) for x in given]
    except ValueError as error:
        raise Refused(str(error), "suffix" if suffix else "prompt") from error


@dataclasses.dataclass(frozen=True)
class Piece:
    """News of a completion: a piece of its text, and what it had come to by then."""

    index: int
    completion: Completion
    text: str
    num_tokens: int
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Answers:
    """Makes the bodies of the answer to one request."""

    asked: Asked
    model: str
    tokenizer: Tokenizer
    id: str
    created: int

    @classmethod
    def to(cls, asked: Asked, model: str, tokenizer: Tokenizer) -> "Answers":
        """Answers with a new id."""
        return cls(asked, model, tokenizer, f"cmpl-{random.getrandbits(64):016x}", int(time.time()))

    def whole(self) -> dict[str, Any]:
        """Everything at once."""
        choices = []
        for request in self.asked.requests:
            completions = request.completions
            if len(completions) > self.asked.shown:
                completions = generate.best(completions, self.asked.shown)
            for completion in completions:
                everything = completion.text, len(completion.tokens), completion.finish_reason
                choices.append(self._choice(Piece(len(choices), completion, *everything), 0))
        return self._body(choices) | {"usage": self.usage()}

    def part(self, piece: Piece, told: int) -> dict[str, Any]:
        """One piece of a stream; `told` tokens of its completion were told before."""
        return self._body([self._choice(piece, told)])

    def only_usage(self) -> dict[str, Any]:
        """The last piece of a stream, where it is wanted."""
        return self._body([]) | {"usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """How many tokens were read and written."""
        written = sum(len(c.tokens) for request in self.asked.requests for c in request.completions)
        read = self.asked.prompt_tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _choice(self, piece: Piece, told: int) -> dict[str, Any]:
        logprobs = self._logprobs(piece.completion, told, piece.num_tokens)
        return {"index": piece.index, "text": piece.text, "finish_reason": piece.finish_reason or None} | logprobs

    def _body(self, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        kind = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return kind | {"choices": list(choices)}

    def _logprobs(self, completion: Completion, begin: int, end: int) -> dict[str, Any]:
        if self.asked.logprobs is None:
            return {"logprobs": None}
        alone = text.pieces(self.tokenizer)

        def piece(place: int, token: int) -> str:
            return alone(token)[0 if place else completion.repeated :]

        tokens = list(itertools.starmap(piece, enumerate(completion.tokens[:end])))
        offsets = list(itertools.accumulate(map(len, tokens), initial=0))
        likeliest = None
        if self.asked.logprobs:
            likeliest = [
                {piece(place, token): value for token, value in list(each.items())[: self.asked.logprobs]}
                for place, each in enumerate(completion.alternatives[begin:end], begin)
            ]
        found = {"token_logprobs": completion.log_probabilities[begin:end], "top_logprobs": likeliest}
        return {"logprobs": found | {"tokens": tokens[begin:], "text_offset": offsets[begin:-1]}}
