"""The file of one evaluation: JSON lines, a header and then one record for each sample, added as they are graded.

It is also what an interrupted evaluation goes on from: a record that is there is not made again, a last line that a
kill cut short is dropped, and a file made under other settings is refused.
"""

import fcntl
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from MaxText.evaluation.pass_at_k import mean_and_standard_error, pass_at_k

REPORTED_K = (1, 10, 100)


class Results:
    """The records of one evaluation, in memory and on the disk. Use as a context manager; one process at a time.

    Attributes:
        records: (problem, sample) -> {"problem", "sample", "completion", "scores", "reason", "seconds"}.
    """

    def __init__(self, path: Path, header: dict[str, Any]):
        """Raises: ValueError: the file is another evaluation's, is damaged, or is being written by another process."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records: dict[tuple[str, int], dict[str, Any]] = {}
        self._file = path.open("ab+")
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{path} is being written by another process; wait for it, or stop it") from None
            self._read(path, json.loads(json.dumps(header)))
        except BaseException:
            self._file.close()
            raise

    def _read(self, path: Path, header: dict[str, Any]) -> None:
        self._file.seek(0)
        whole, newline, _ = self._file.read().rpartition(b"\n")
        self._file.truncate(len(whole + newline))
        try:
            found, *records = [json.loads(line) for line in whole.splitlines()] or [None]
            self.records = {(record["problem"], record["sample"]): record for record in records}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and the evaluation begins anew") from error
        if found is None:
            self._write(header)
        elif found != header:
            keys = [key for key in sorted(header | found) if header.get(key) != found.get(key)]
            changes = "; ".join(f"{key}: {found.get(key)!r}, now {header.get(key)!r}" for key in keys)
            raise ValueError(f"{path} was made with other settings ({changes}); use another file, or delete this one")

    def add(self, record: dict[str, Any]) -> None:
        self._write(record)
        self.records[record["problem"], record["sample"]] = record

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def summarize(records: Iterable[dict[str, Any]], num_samples: int) -> dict[str, float]:
    """Every score's mean over the problems, and under `<name>_standard_error` its error, if it has one.

    The score "pass" becomes pass@k.

    Raises:
        ValueError: a problem has not exactly `num_samples` records.
    """
    by_score: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for name, value in record["scores"].items():
            by_score[name][record["problem"]].append(value)
    summary: dict[str, float] = {}
    for name, by_problem in by_score.items():
        for problem, values in by_problem.items():
            if len(values) != num_samples:
                raise ValueError(f"{problem} has {len(values)} samples instead of {num_samples}: not complete yet")
        for k in REPORTED_K if name == "pass" else (1,):
            if k <= num_samples:
                title = f"pass@{k}" if name == "pass" else name
                values = [pass_at_k(num_samples, sum(values), k) for values in by_problem.values()]
                summary[title], error = mean_and_standard_error(values)
                summary |= {} if error is None else {f"{title}_standard_error": error}
    return summary
