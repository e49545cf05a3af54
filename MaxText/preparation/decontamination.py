"""Finds documents that hold a piece of a benchmark: they would be graded by what they were trained on.

In: the problems of benchmarks as texts. Out: for a document, the problems of which it has RUN_WORDS consecutive words,
whatever stands between the words; DeepSeek-Coder's rule (arXiv:2401.14196, section 2.4). Runs that are boilerplate, of
few different words, do not count. A hit is reported with its problem and its words, so that a person can judge it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from MaxText.preparation import near_duplicates

RUN_WORDS = 10
MIN_DIFFERENT_WORDS = 6


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
            words = near_duplicates.words(text.encode())
            hashes = near_duplicates.runs(near_duplicates.word_hashes(words), RUN_WORDS)
            for start, run in enumerate(hashes.tolist() if len(words) >= RUN_WORDS else ()):
                if len(set(words[start : start + RUN_WORDS])) >= MIN_DIFFERENT_WORDS:
                    runs.setdefault(run, name)
        self._sorted = np.array(sorted(runs), np.uint64)
        self._names = [runs[run] for run in self._sorted.tolist()]

    def __bool__(self) -> bool:
        return bool(self._names)

    def hits(self, words: list[bytes], hashes: np.ndarray) -> list[Hit]:
        """One hit for every problem that shares a run with the document of these words."""
        if len(words) < RUN_WORDS or not self._sorted.size:
            return []
        runs = near_duplicates.runs(hashes, RUN_WORDS)
        places = np.minimum(np.searchsorted(self._sorted, runs), self._sorted.size - 1)
        found: dict[str, Hit] = {}
        for start in np.flatnonzero(self._sorted[places] == runs).tolist():
            name = self._names[places[start]]
            shared = b" ".join(words[start : start + RUN_WORDS]).decode(errors="replace")
            found.setdefault(name, Hit(name, shared))
        return list(found.values())
