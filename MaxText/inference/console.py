"""Generation on a terminal: one prompt or one after the other, told while it is written, and how fast that was."""

import time
from collections.abc import Callable

from MaxText.inference import generate
from MaxText.inference.batcher import Batcher
from MaxText.inference.runs import LoadedModel

END = "."  # alone on a line: the end of a prompt


def run(loaded: LoadedModel, interactive: bool, write: Callable[[str], None], read: Callable[[], str]) -> None:
    """Completes the config's prompt, or every prompt that is typed, until the end of input.

    Args:
        write: prints a piece of text at once, without a newline after it.
        read: gives the next line without its newline.

    Raises:
        ValueError: no prompt, or one that is too long.
    """
    config = loaded.config
    batcher = generate.make_batcher(loaded, _rows(loaded))
    if not interactive:
        _complete(batcher, loaded, config.prompt, write)
        return
    write(f"Type a prompt, then {END} alone on a line. End of input (Ctrl-D) leaves.\n")
    while (prompt := _prompt(read)) is not None:
        try:
            _complete(batcher, loaded, prompt, write)
        except ValueError as error:
            write(f"{error}\n")


def _rows(loaded: LoadedModel) -> int:
    """As many as there are completions, and a multiple of what rows are split over."""
    count, shards = max(loaded.config.num_samples, loaded.config.best_of), loaded.program.batch_shards
    return -(-count // shards) * shards


def _prompt(read: Callable[[], str]) -> str | None:
    lines: list[str] = []
    while True:
        try:
            line = read()
        except EOFError:
            return "\n".join(lines) if lines else None
        if line == END:
            return "\n".join(lines)
        lines.append(line)


def _complete(batcher: Batcher, loaded: LoadedModel, prompt: str, write: Callable[[str], None]) -> None:
    config, counts = loaded.config, batcher.counts
    single = max(config.num_samples, config.best_of) == 1
    before, started = counts.tokens, time.monotonic()
    steps = counts.row_steps
    completions = generate.complete(batcher, config, (prompt, config.suffix), write)
    seconds = time.monotonic() - started
    for number, completion in enumerate(completions if not single else ()):
        mean = completion.mean_log_probability
        write(f"--- {number + 1} of {len(completions)}, mean log-probability {mean:.3f}\n{prompt}{completion.text}\n")
    tokens, steps = counts.tokens - before, counts.row_steps - steps
    guessed = f", {tokens / steps:.2f} tokens a step" if config.speculative_tokens and steps else ""
    reasons = ", ".join(sorted({completion.finish_reason for completion in completions}))
    write(f"{config.suffix if single else ''}\n[{tokens} tokens in {seconds:.2f} s{guessed}; ended by: {reasons}]\n")
