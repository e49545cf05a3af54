"""The rules between the keys of generation and of scoring checkpoints; see config_rules."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Values = Mapping[str, Any]


def _best_of(values: Values, _: Values) -> Iterator[str]:
    best_of, num_samples = values["best_of"], values["num_samples"]
    if 1 < best_of < num_samples:
        yield f"best_of={best_of} is less than num_samples={num_samples}, which are chosen of them; use more, or 1"


def _guesses(values: Values, _: Values) -> Iterator[str]:
    guesses, heads = values["speculative_tokens"], values["mtp_num_layers"]
    if guesses > heads:
        yield (
            f"speculative_tokens={guesses}, but the model has mtp_num_layers={heads} heads that can guess; "
            f"use speculative_tokens={heads}"
        )


def _checkpoints(values: Values, _: Values) -> Iterator[str]:
    given = values["checkpoints"]
    if given not in ("last", "all", "epochs") and not given.isdecimal():
        yield f"checkpoints={given}: use last, all, epochs or the number of a step, such as checkpoints=1000"


# As in config_rules: the keys a rule depends on, and the rule.
RULES: tuple[tuple[tuple[str, ...], Callable[[Values, Values], Iterator[str]]], ...] = (
    (("best_of", "num_samples"), _best_of),
    (("speculative_tokens", "mtp_num_layers"), _guesses),
    (("checkpoints",), _checkpoints),
)
