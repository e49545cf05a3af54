"""Fill in the middle: some documents of a batch become prefix, suffix and middle, so that a model learns to insert.

In: windows of tokens and where they come from. Out: windows of the same width. What is permuted is the part of a
document that a row holds, cut at two characters, not tokens, as a user's cursor would. The three sentinels take the
place of the last tokens of the suffix, never of the middle. Source: Bavarian et al., arXiv:2207.14255, section 3.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from MaxText.input_pipeline.permutation import mix
from MaxText.input_pipeline.tokenizer import Tokenizer

MIN_TOKENS = 16  # less is not worth three sentinels
SENTINELS = ("fim_prefix", "fim_middle", "fim_suffix")


@dataclass(frozen=True)
class _Piece:
    """A part of a document in a row, [start, stop)."""

    row: int
    start: int
    stop: int
    needs_end: bool
    has_path: bool
    draws: Sequence[float]  # in [0, 1): whether, the two cuts, which form


class Fim:
    """Permutes pieces of documents; a pure function of the windows and their origins."""

    def __init__(self, tokenizer: Tokenizer, rate: float, spm_rate: float, seed: int):
        """Args:
            rate: share of the pieces that are permuted.
            spm_rate: share of those that begin with the suffix.
        Raises:
            ValueError: the tokenizer has no tokens for it.
        """
        missing = [role for role in SENTINELS if role not in tokenizer.special_ids]
        if missing:
            raise ValueError(
                f"fim_rate={rate} needs tokens for {', '.join(missing)}, and the tokenizer {tokenizer.name} has none; "
                "use fim_rate=0, or prepare the data with one that has them"
            )
        self._tokenizer, self._rate, self._spm_rate = tokenizer, rate, spm_rate
        self._prefix, self._middle, self._suffix = (tokenizer.special_ids[role] for role in SENTINELS)
        self._file_sep = tokenizer.special_ids.get("file_sep", -1)
        self._repo_name = tokenizer.special_ids.get("repo_name", -1)
        self._key = mix(np.full(1, seed, np.uint64))
        self.identity = [rate, spm_rate, seed, tokenizer.fingerprint]  # what decides the result

    def __call__(
        self, windows: np.ndarray, lengths: np.ndarray, origins: np.ndarray, starts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The windows [B, L + 1] and their lengths [B] with some pieces permuted.

        Args:
            origins: uint64 [B]: epoch and file of each window, in one number.
            starts: [B]: where in the file the window begins; with it a piece's draws do not depend on its row.
        """
        pieces = self._pieces(windows, lengths, origins, starts)
        texts = [self._tokenizer.decode(windows[p.row, p.start : p.stop].tolist()) for p in pieces]
        parts: list[str] = []
        for piece, text in zip(pieces, texts, strict=True):
            parts += self._cut(piece, text)
        encoded = self._tokenizer.encode(parts)
        windows, lengths = windows.copy(), lengths.copy()
        rows: dict[int, list[tuple[_Piece, list[int]]]] = {}
        for number, (piece, text) in enumerate(zip(pieces, texts, strict=True)):
            tokens = self._arrange(piece, *encoded[4 * number : 4 * number + 4])
            if tokens is not None and "\ufffd" not in text:  # the window may begin or end inside a character
                rows.setdefault(piece.row, []).append((piece, tokens))
        for row, replaced in rows.items():
            joined, last = [], 0
            for piece, tokens in replaced:
                joined += [windows[row, last : piece.start], tokens]
                last = piece.stop
            line = np.concatenate([*joined, windows[row, last : lengths[row]]])
            windows[row, : line.size] = line
            windows[row, line.size :] = self._tokenizer.eos_id
            lengths[row] = line.size
        return windows, lengths

    def _pieces(
        self, windows: np.ndarray, lengths: np.ndarray, origins: np.ndarray, starts: np.ndarray
    ) -> list[_Piece]:
        """The runs of ordinary tokens that are long enough and are to be permuted, in order."""
        bounds = np.isin(windows, (self._tokenizer.eos_id, self._file_sep, self._repo_name))
        keys = mix(self._key ^ origins) + starts.astype(np.uint64)
        found: list[tuple[int, int, int, bool, bool]] = []
        for row, length in enumerate(lengths.tolist()):
            ends = [-1, *np.flatnonzero(bounds[row, :length]).tolist(), length]
            for before, stop in itertools.pairwise(ends):
                opener = int(windows[row, before]) if before >= 0 else -1
                if stop - before - 1 < MIN_TOKENS or (opener == self._repo_name != -1):
                    continue
                found.append((row, before + 1, stop, stop == length, opener == self._file_sep != -1))
        if not found:
            return []
        rows, begins = np.array([piece[:2] for piece in found]).T
        own = mix(keys[rows] + begins.astype(np.uint64))
        draws = (mix(own[:, None] + np.arange(4, dtype=np.uint64)) >> np.uint64(11)).astype(np.float64) / 2.0**53
        chosen = zip(found, draws.tolist(), strict=True)
        return [_Piece(*piece, draws=numbers) for piece, numbers in chosen if numbers[0] < self._rate]

    def _cut(self, piece: _Piece, text: str) -> list[str]:
        """[what stays in front, prefix, middle, suffix]: a file's path, if it has one, is never cut."""
        path, newline, rest = text.partition("\n") if piece.has_path else ("", "", text)
        cuts = sorted(int(draw * (len(rest) + 1)) for draw in piece.draws[1:3])
        return [path + newline, rest[: cuts[0]], rest[cuts[0] : cuts[1]], rest[cuts[1] :]]

    def _arrange(
        self, piece: _Piece, front: list[int], prefix: list[int], middle: list[int], suffix: list[int]
    ) -> list[int] | None:
        """The piece's new tokens, no more than it had; None where the suffix cannot give way."""
        end = [self._tokenizer.eos_id] if piece.needs_end else []
        size = len(front) + len(prefix) + len(middle) + len(suffix) + 3 + len(end)
        excess = max(size - (piece.stop - piece.start), 0)
        if excess > len(suffix):
            return None
        suffix = suffix[: len(suffix) - excess]
        if piece.draws[3] < self._spm_rate:
            return [*front, self._prefix, self._suffix, *suffix, self._middle, *prefix, *middle, *end]
        return [*front, self._prefix, *prefix, self._suffix, *suffix, self._middle, *middle, *end]
