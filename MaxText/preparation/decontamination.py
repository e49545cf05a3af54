"""Finds documents that hold a piece of a benchmark: they would be graded by what they were trained on.

In: the problems of benchmarks as texts. Out: for a document, the problems of which it has RUN_WORDS consecutive words,
whatever stands between the words; DeepSeek-Coder's rule (arXiv:2401.14196, section 2.4). Runs with few different
words of letters, such as `0 1 2 3 ...`, do not count. A hit tells its problem and its words, for a person to judge.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from MaxText.preparation import near_duplicates

RUN_WORDS = 10
MIN_DIFFERENT_WORDS = 6  # of two letters or more


@dataclass(frozen=True)
class Hit:
    """`words` of a document that stand in `problem` too."""

    problem: str
    words: str


class Benchmarks:
    """The runs of words of all problems, sorted, for a quick search."""

    def __init__(self, problems: Mapping[str, str]):
        """Args:
        problems: name and text; several texts of one problem have names of their own.
        """
        runs: dict[int, str] = {}
        for name, text in sorted(problems.items()):
            content = text.encode()
            hashes, bounds = near_duplicates.words(content)
            telling = [word if word.isalpha() and len(word) > 1 else b"" for word in (content[a:b] for a, b in bounds)]
            found = near_duplicates.runs(hashes, RUN_WORDS).tolist() if hashes.size >= RUN_WORDS else []
            for start, run in enumerate(found):
                if len(set(telling[start : start + RUN_WORDS]) - {b""}) >= MIN_DIFFERENT_WORDS:
                    runs.setdefault(run, name)
        self._sorted = np.array(sorted(runs), np.uint64)
        self._names = [runs[run] for run in self._sorted.tolist()]

    def __bool__(self) -> bool:
        return bool(self._names)

    def hits(self, content: bytes, hashes: np.ndarray, bounds: np.ndarray) -> list[Hit]:
        """One hit for every problem that shares a run with the document, of which near_duplicates.words gives these."""
        if hashes.size < RUN_WORDS or not self._sorted.size:
            return []
        runs = near_duplicates.runs(hashes, RUN_WORDS)
        places = np.minimum(np.searchsorted(self._sorted, runs), self._sorted.size - 1)
        found: dict[str, Hit] = {}
        for start in np.flatnonzero(self._sorted[places] == runs).tolist():
            name = self._names[places[start]]
            shared = [content[a:b] for a, b in bounds[start : start + RUN_WORDS].tolist()]
            found.setdefault(name, Hit(name, b" ".join(shared).decode(errors="replace")))
        return list(found.values())
