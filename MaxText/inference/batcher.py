"""Continuous batching: requests come and go while the rows of one batch are written a few steps at a time.

In: prompts as tokens. Out: completions, whose pieces of text go to a callback as they become certain. A prompt is read
once, however many completions are wanted. What is compiled has few shapes: prompts and memories have lengths from a
short list (`buckets`), and the number of rows never changes. One thread calls `advance`; any thread may submit, cancel.
"""

import collections
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from MaxText.inference import sampling, text
from MaxText.inference.program import Memories, Program, Written
from MaxText.inference.weights import Weights
from MaxText.input_pipeline.tokenizer import Tokenizer

STEPS = 8  # between two looks at what was written
SMALLEST_BUCKET = 64


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; see sampling.Settings."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


@dataclasses.dataclass(eq=False)
class Completion:
    """One text that is being written after a prompt.

    Attributes:
        on_text: gets every piece of text, and the completion; the last time with a `finish_reason`.
        ended: whether the end of text was written, whose log-probability counts as a token's.
        finish_reason: "" while it grows; then "stop" (end of text or a stop string), "length" or "cancelled".
        log_probability: the sum over its tokens, the end of text included; nats.
        alternatives: for each token the likeliest ones with their log-probabilities, if the request wants them.
        repeated: characters of the prompt that the first token writes again; they are no part of the text.
    """

    seed: int
    on_text: Callable[[str, "Completion"], None] | None = None
    finish_reason: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probabilities: list[float] = dataclasses.field(default_factory=list)
    alternatives: list[dict[int, float]] = dataclasses.field(default_factory=list)
    log_probability: float = 0.0
    ended: bool = False
    repeated: int = 0
    growing: text.GrowingText | None = None

    @property
    def text(self) -> str:
        """What is written so far."""
        return self.growing.text if self.growing else ""

    @property
    def mean_log_probability(self) -> float:
        """Of a token, the end of text included; 0 where there is none."""
        return self.log_probability / max(len(self.tokens) + self.ended, 1)


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and the completions wanted of it.

    Attributes:
        heal: whether the prompt's last token may be taken back; see text.Healer.
        read, again, allowed: what the batcher makes of that: the tokens to read, the text to be written again, and
            the tokens that begin with it; None = any may be first.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop: Sequence[str]
    completions: Sequence[Completion]
    with_alternatives: bool = False
    heal: bool = False
    read: Sequence[int] = ()
    again: str = ""
    allowed: np.ndarray | None = None
    cancelled: bool = False


@dataclasses.dataclass
class _Row:
    """What a row of the batch is working on."""

    request: Request
    completion: Completion
    length: int  # tokens in its memories
    again: str  # what its next token writes again of the prompt


@dataclasses.dataclass
class Counts:
    """What was done, for reports: steps of rows that counted, the tokens they gave, and prompts' tokens read."""

    row_steps: int = 0
    tokens: int = 0
    prompt_tokens: int = 0

    @property
    def tokens_per_step(self) -> float:
        """1 without guesses; one more for each guess that was right."""
        return self.tokens / max(self.row_steps, 1)


class Batcher:
    """The rows of one batch, and the requests that wait for one.

    Args:
        num_rows: texts written at the same time; on a mesh a multiple of its data x fsdp.
        context: the most tokens that a prompt and its completion may have together.
    """

    def __init__(self, program: Program, weights: Weights, tokenizer: Tokenizer, *, num_rows: int, context: int):
        shards = program.batch_shards
        if num_rows % shards:
            raise ValueError(f"decode_rows={num_rows} are not divided by the {shards} devices that rows are split over")
        self.program, self.weights, self.tokenizer = program, weights, tokenizer
        self.num_rows, self.context = num_rows, context
        self.counts = Counts()
        self._heal = text.Healer(tokenizer, program.config.vocab_size)
        self._all_allowed = np.ones(program.config.vocab_size, bool)
        self._window = 1 + program.num_guesses
        doublings = (SMALLEST_BUCKET << power for power in range(max(context, 1).bit_length()))
        # A row may write a window more than it needs, and what is written must have its place.
        self.buckets = [*(size for size in doublings if size < context), context + self._window]
        self._waiting: collections.deque[tuple[Request, collections.deque[Completion]]] = collections.deque()
        self._lock = threading.Lock()
        self._working: list[_Row | None] = [None] * num_rows
        self._read: tuple[Request, Memories | None] | None = None  # the prompt read last
        self._rows: Any = None
        self._length = 0

    def submit(self, request: Request) -> None:
        """Puts the request into the queue.

        Raises:
            ValueError: prompt and completion are longer than the context.
        """
        self.check(request)
        request.read = request.prompt
        if request.heal:
            request.read, request.again, request.allowed = self._heal(request.prompt)
        for completion in request.completions:
            completion.growing = text.GrowingText(self.tokenizer, request.read, request.stop, request.again)
        with self._lock:
            self._waiting.append((request, collections.deque(request.completions)))

    def check(self, request: Request) -> None:
        """Raises: ValueError: prompt and completion are longer than the context."""
        total = len(request.prompt) + request.max_tokens
        if not request.prompt or request.max_tokens < 1 or total > self.context:
            raise ValueError(
                f"a prompt of {len(request.prompt):,} tokens and max_tokens={request.max_tokens:,}: both must be at "
                f"least 1, and together at most {self.context:,}, the length the model reads"
            )

    def cancel(self, request: Request) -> None:
        """Ends the request's completions, at the latest after the steps under way."""
        request.cancelled = True

    def fail(self) -> None:
        """Ends everything there is, for want of a thread that could go on."""
        with self._lock:
            requests = [request for request, _ in self._waiting]
        for request in [*requests, *(row.request for row in self._working if row)]:
            request.cancelled = True
        self._end_cancelled()

    @property
    def num_waiting(self) -> int:
        """Completions for which there is no row yet."""
        with self._lock:
            return sum(len(completions) for _, completions in self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being written and nothing waits."""
        return not self.num_waiting and not any(self._working)

    def advance(self) -> None:
        """Gives free rows to waiting completions, and writes some steps. Call it under the program's mesh."""
        self._end_cancelled()
        self._fill_rows()
        working = [row for row in self._working if row]
        if not working:
            return
        needed = max(
            min(row.length + STEPS * self._window, len(row.request.prompt) + row.request.max_tokens) + self._window - 1
            for row in working
        )
        self._make_room(needed)
        self._rows, written = self.program.write(self.weights, self._rows, STEPS)
        self._hand_out(jax.device_get(written))

    def run(self) -> None:
        """Advances until nothing is left to do."""
        with jax.set_mesh(self.program.mesh):
            while not self.is_idle:
                self.advance()

    def warm_up(self) -> None:
        """Compiles every program there is, so that nothing is compiled later."""
        assert self.is_idle
        with jax.set_mesh(self.program.mesh):
            prompts = {size: self._read_prompt([0] * size) for size in self.buckets}
            for index, size in enumerate(self.buckets):
                rows = self.program.empty_rows(self.num_rows, size)
                rows = self._place(rows, None, 0, [0], _request())
                for other in self.buckets[: index + 1]:
                    rows = self._place(rows, prompts[other], 0, [0] * other, _request())
                rows, _ = self.program.write(self.weights, rows, STEPS)
                for longer in self.buckets[index + 1 :]:
                    self.program.lengthen(rows, longer)

    def _fill_rows(self) -> None:
        for index, row in enumerate(self._working):
            if row is None and (next_one := self._next_completion()) is not None:
                request, completion = next_one
                if self._read is None or self._read[0] is not request:
                    self._read = (request, self._read_prompt(request.read))
                    self.counts.prompt_tokens += len(request.read)
                self._make_room(len(request.read))
                self._rows = self._place(self._rows, self._read[1], index, request.read, request, completion.seed)
                self._working[index] = _Row(request, completion, len(request.read) - 1, request.again)
        if not self.num_waiting:
            self._read = None  # its memories are freed

    def _next_completion(self) -> tuple[Request, Completion] | None:
        with self._lock:
            while self._waiting:
                request, completions = self._waiting[0]
                if completions:
                    return request, completions.popleft()
                self._waiting.popleft()
        return None

    def _end_cancelled(self) -> None:
        with self._lock:
            dropped = [item for item in self._waiting if item[0].cancelled]
            self._waiting = collections.deque(item for item in self._waiting if not item[0].cancelled)
        for _, completions in dropped:
            for completion in completions:
                self._end(completion, "cancelled")
        for index, row in enumerate(self._working):
            if row and row.request.cancelled:
                self._end(row.completion, "cancelled")
                self._working[index] = None

    def _read_prompt(self, prompt: Sequence[int]) -> Memories | None:
        """The memories of a prompt without its last token; None where that is all of it."""
        if len(prompt) < 2:
            return None
        length = self._bucket(len(prompt) - 1)
        tokens = np.zeros((self.program.batch_shards, length + 1), np.int32)
        tokens[:, : len(prompt)] = prompt
        return self.program.read(self.weights, tokens)

    def _place(
        self, rows: Any, prompt: Memories | None, index: int, ids: Sequence[int], request: Request, seed: int = 0
    ) -> Any:
        chosen = request.sampling
        settings = sampling.Settings(
            np.float32(chosen.temperature),
            np.int32(chosen.top_k),
            np.float32(chosen.top_p),
            np.float32(chosen.min_p),
            np.uint32(seed % 2**32),
        )
        allowed = self._all_allowed if request.allowed is None else request.allowed
        one = (settings, np.bool_(request.with_alternatives), allowed)
        return self.program.place(rows, prompt, np.int32(index), np.int32(len(ids) - 1), np.int32(ids[-1]), one)

    def _make_room(self, length: int) -> None:
        """Memories for so many tokens; new ones, as short as can be, where no row is working."""
        size = self._bucket(length)
        if self._rows is None or not any(self._working):
            self._rows, self._length = self.program.empty_rows(self.num_rows, size), size
        elif size > self._length:
            self._rows, self._length = self.program.lengthen(self._rows, size), size

    def _bucket(self, length: int) -> int:
        return next(size for size in self.buckets if size >= length)

    def _hand_out(self, written: Written) -> None:
        for index, row in enumerate(self._working):
            if row is None:
                continue
            for step in range(STEPS):
                num = int(written.num[step, index])
                self.counts.row_steps += 1
                row.length += num
                for place in range(num):
                    self.counts.tokens += 1
                    if self._add(row, written, (step, index, place)):
                        self._working[index] = None
                        break
                if self._working[index] is None:
                    break

    def _add(self, row: _Row, written: Written, at: tuple[int, int, int]) -> bool:
        """Adds one token to a completion; whether that was its last."""
        completion, growing = row.completion, row.completion.growing
        assert growing is not None
        token, log_probability = int(written.tokens[at]), float(written.log_probabilities[at])
        again, row.again = row.again, ""
        if again and token == row.request.prompt[-1]:  # it stays the prompt's
            growing.add(token)
            return False
        completion.log_probability += log_probability
        completion.ended = token == self.tokenizer.eos_id
        if completion.ended:
            return self._end(completion, "stop")
        completion.repeated += len(again)
        completion.tokens.append(token)
        completion.log_probabilities.append(log_probability)
        if row.request.with_alternatives:
            ids, values = written.alternatives
            likeliest = zip(ids[at].tolist(), values[at].tolist(), strict=True)
            fits = row.request.allowed if again else None
            completion.alternatives.append({id_: value for id_, value in likeliest if fits is None or fits[id_]})
        piece = growing.add(token)
        if growing.stopped or len(completion.tokens) == row.request.max_tokens:
            return self._end(completion, "stop" if growing.stopped else "length", piece)
        if piece and completion.on_text:
            completion.on_text(piece, completion)
        return False

    def _end(self, completion: Completion, reason: str, piece: str = "") -> bool:
        assert completion.growing is not None
        piece += completion.growing.finish()
        completion.finish_reason = "stop" if completion.growing.stopped else reason
        if completion.on_text:
            completion.on_text(piece, completion)
        return True


def _request() -> Request:
    return Request([0], 1, Sampling(0.0, 0, 1.0, 0.0), (), ())
