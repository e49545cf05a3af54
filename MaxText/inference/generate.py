"""Many completions at once: what evaluation and the command line ask of a batcher.

Prompts that are equal and follow each other are read once. In float32 a text depends on its prompt and its seed
alone; in bfloat16 the number of rows rounds otherwise, and a near tie may fall to the other token.
"""

from collections.abc import Callable, Sequence

from ml_collections import FrozenConfigDict

from MaxText.inference import text
from MaxText.inference.batcher import Batcher, Completion, Request, Sampling
from MaxText.inference.runs import LoadedModel

Seeded = tuple[str, str, int]  # text, suffix, seed: a grading.Prompt


def sampling_of(config: FrozenConfigDict) -> Sampling:
    """How the config wants tokens to be chosen."""
    return Sampling(config.temperature, config.top_k, config.top_p, config.min_p)


def make_batcher(loaded: LoadedModel, num_rows: int) -> Batcher:
    """A batcher for the model, as long as the model's context."""
    context = loaded.config.max_target_length
    return Batcher(loaded.program, loaded.weights, loaded.tokenizer, num_rows=num_rows, context=context)


class Generator:
    """Turns prompts into completions; a grading.Generate.

    Attributes:
        num_cut: prompts too long for the context, of which only the end was read.
    """

    def __init__(self, batcher: Batcher, config: FrozenConfigDict, stop: Sequence[str]):
        self.batcher, self.num_cut = batcher, 0
        self._sampling, self._max_tokens, self._stop = sampling_of(config), config.max_tokens, stop

    def __call__(self, prompts: Sequence[Seeded]) -> list[str]:
        """The completions, in the order of the prompts."""
        completions = [Completion(seed) for _, _, seed in prompts]
        groups: list[tuple[tuple[str, str], list[Completion]]] = []
        for (before, after, _), completion in zip(prompts, completions, strict=True):
            if not groups or groups[-1][0] != (before, after):
                groups.append(((before, after), []))
            groups[-1][1].append(completion)
        for (before, after), wanted in groups:
            self.batcher.submit(self._request(before, after, wanted))
        self.batcher.run()
        return [completion.text for completion in completions]

    def _request(self, before: str, after: str, completions: list[Completion]) -> Request:
        """One that fits: a completion has at least a quarter of the context, a prompt what is left of it."""
        context = self.batcher.context
        max_tokens = min(self._max_tokens, context)
        ids = text.prompt_ids(self.batcher.tokenizer, before, after)
        room = max(context - max_tokens, 3 * context // 4)
        if len(ids) > room:
            self.num_cut += len(completions)
            ids = text.cut_around_gap(self.batcher.tokenizer, ids, room) if after else ids[-room:]
        max_tokens = min(max_tokens, context - len(ids))
        return Request(ids, max_tokens, self._sampling, self._stop, completions, heal=not after)


def best(completions: Sequence[Completion], count: int) -> list[Completion]:
    """The `count` completions with the highest mean log-probability of a token, the best first."""
    return sorted(completions, key=lambda completion: completion.mean_log_probability, reverse=True)[:count]


def complete(
    batcher: Batcher,
    config: FrozenConfigDict,
    prompt: tuple[str, str],
    on_text: Callable[[str], None],
) -> list[Completion]:
    """The completions of the config's prompt; a single one is told piece by piece, after its prompt.

    Args:
        prompt: the text before, and after the gap, if there is one.
        on_text: gets the prompt and each piece of a single completion.

    Raises:
        ValueError: the prompt is empty, no text or too long.
    """
    count = max(config.num_samples, config.best_of)

    def tell(piece: str, _: Completion) -> None:
        on_text(piece)

    completions = [Completion(config.sampling_seed + i, tell if count == 1 else None) for i in range(count)]
    ids = text.prompt_ids(batcher.tokenizer, *prompt)
    max_tokens = max(1, min(config.max_tokens, batcher.context - len(ids)))
    stop = [config.stop] if config.stop else []
    batcher.submit(Request(ids, max_tokens, sampling_of(config), stop, completions, heal=not prompt[1]))
    if count == 1:
        on_text(prompt[0])
    batcher.run()
    return best(completions, config.num_samples) if config.best_of > 1 else completions
