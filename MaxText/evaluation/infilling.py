"""Infilling: lines taken out of functions of held-out files, to be filled in from what stands before and after them.

In: texts that were not trained on. Out: a grading.Task whose scores are exact match, match of the first line, and
whether the file with the completion in it parses. A problem is a function of the text and the seed alone. Something
stands after every gap, as a prompt without a suffix does not ask to fill one.
Source of the single-line form: Bavarian et al., arXiv:2207.14255, section 3.
"""

import ast
import hashlib
import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from MaxText.evaluation.grading import Grade
from MaxText.evaluation.sandbox import Job, Sandbox

# The value of `task` -> the lines of a gap at the most.
MAX_LINES = {"infilling": 1, "infilling_multi_line": 8}


@dataclass(frozen=True)
class Gap:
    """A text in three parts; the middle is to be found again. It is whole lines, without the last one's newline."""

    name: str
    prefix: str
    middle: str
    suffix: str


@dataclass(frozen=True)
class InfillingTask:
    """A grading.Task over gaps of at most `max_lines` lines; a gap of one line ends at the line's end."""

    gaps: tuple[Gap, ...]
    max_lines: int
    context_characters: int

    @property
    def name(self) -> str:
        return "infilling_single_line" if self.max_lines == 1 else "infilling_multi_line"

    @property
    def stop(self) -> tuple[str, ...]:
        return ("\n",) if self.max_lines == 1 else ()

    @property
    def description(self) -> dict[str, Any]:
        digest = hashlib.sha256(repr(self.gaps).encode()).hexdigest()
        lines = {"max_lines": self.max_lines, "context_characters": self.context_characters}
        return {"data_sha256": digest, "problems": len(self.gaps), **lines}

    @property
    def problem_names(self) -> Sequence[str]:
        return [gap.name for gap in self.gaps]

    def prompt(self, problem: int) -> tuple[str, str]:
        gap, size = self.gaps[problem], self.context_characters
        return gap.prefix[-size:], gap.suffix[:size]

    def grade(self, problem: int, completion: str, sandbox: Sandbox) -> Grade:
        gap = self.gaps[problem]
        # The compiler has bugs, and a sample may find one: it runs where only the verdict is lost.
        text = gap.prefix + completion + gap.suffix
        verdict = sandbox.grade(Job("", f"compile({text!r}, '<file>', 'exec')", {}))
        scores = {
            "exact_match": completion.rstrip() == gap.middle.rstrip(),
            "line_match": _first_line(completion) == _first_line(gap.middle),
            "syntax_valid": verdict.passed,
        }
        return Grade(completion, scores, verdict.reason)


def build(texts: Iterable[str], num_problems: int, max_lines: int, context_characters: int, seed: int) -> InfillingTask:
    """One gap in each of `num_problems` of the texts, chosen by their hashes, not by their order.

    Args:
        max_lines: 1, or gaps of 2 to so many lines.
        context_characters: how much of the prefix, and of the suffix, a prompt holds.
    Raises:
        ValueError: too few texts have a function that is long enough.
    """
    keyed = {hashlib.sha256(f"{seed}/{text}".encode()).hexdigest(): text for text in texts}
    gaps: list[Gap] = []
    for key in sorted(keyed):
        if len(gaps) < num_problems and (gap := _gap(key, keyed[key], max_lines)):
            gaps.append(gap)
    if len(gaps) < num_problems or not gaps:
        raise ValueError(
            f"{num_problems} problems of infilling wanted, but only {len(gaps)} of {len(keyed)} held-out texts have a "
            f"function with {1 if max_lines == 1 else 2} or more lines; ask for at most {len(gaps)}, or hold out more"
        )
    return InfillingTask(tuple(gaps), max_lines, context_characters)


def _gap(key: str, text: str, max_lines: int) -> Gap | None:
    """A gap inside a function, after its docstring, that begins and ends with lines of code; None if there is none."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    lines = text.split("\n")
    least = 1 if max_lines == 1 else 2
    spans = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if body and body[0].lineno > node.lineno:  # not `def f(): return 1`
                spans += [(body[0].lineno - 1, node.end_lineno or 0)]
    choose = random.Random(key)
    choices = [
        (first, end)
        for start, stop in sorted(spans)
        for first in range(start, stop)
        for end in range(first + least, min(first + max_lines, stop) + 1)
        if end < len(lines) and _is_code(lines[first]) and _is_code(lines[end - 1])
    ]
    if not choices:
        return None
    first, end = choose.choice(choices)
    prefix, middle = "\n".join([*lines[:first], ""]), "\n".join(lines[first:end])
    return Gap(f"{key[:12]}:{first + 1}-{end}", prefix, middle, text[len(prefix) + len(middle) :])


def _is_code(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _first_line(text: str) -> str:
    return text.partition("\n")[0].rstrip()
