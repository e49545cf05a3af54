"""Batches straight from a source, tokenized on the way: to try data before preparing it.

In: a source as prepare_data.py takes it, and a tokenizer. Out: batches by step, as the prepared data gives them, but
in the order of the source, with nothing filtered but very short and very long files. There is no index: a step
is reached by reading and tokenizing all that comes before it, on every process. It is exact, and slow.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from MaxText.input_pipeline import filters, inputs, packing, readers
from MaxText.input_pipeline.fim import Fim
from MaxText.input_pipeline.permutation import mix
from MaxText.input_pipeline.tokenizer import Tokenizer

NUM_WINDOWS = 2**40  # how many there are is known when they have been read
ENCODE_BYTES = 2**18
KEPT_STEPS = 64  # batches that threads may ask for out of order


class StreamDataset:
    """The windows of a stream, one after the other; see TokenDataset for the meaning of each member."""

    def __init__(
        self,
        source: str,
        text_column: str,
        tokenizer: Tokenizer,
        vocab_size: int,
        sequence_length: int,
        num_epoch: int,
        fim: Fim | None,
        document_masking: bool,
        log: Callable[[str], None],
    ):
        """Args:
        num_epoch: after so many times through the source a step that needs more is an error; -1: never.
        """
        self._units = inputs.find_units(source, inputs.UNIT_BYTES, log)
        self.source = f"{self._units[0].kind}:{self._units[0].place}"
        self._text_column, self._tokenizer, self._num_epoch = text_column, tokenizer, num_epoch
        self._fim, self._document_masking = fim, document_masking
        self.vocab_size, self.sequence_length, self.eos_id = vocab_size, sequence_length, tokenizer.eos_id
        self.num_windows = NUM_WINDOWS
        content = repr([self._units, text_column, tokenizer.fingerprint, fim and fim.identity, document_masking])
        self.identity = "stream " + hashlib.sha256(content.encode()).hexdigest()
        self._lock = threading.Lock()
        self._begin()

    def num_batches(self, global_batch_size: int) -> int:
        """Batches in one pass, as far as anyone knows."""
        return -(-self.num_windows // global_batch_size)

    def batch(self, step: int, global_batch_size: int, rows: slice | np.ndarray) -> dict[str, np.ndarray]:
        """The rows `rows` of the global batch of step `step`: int32 [rows, sequence_length] under packing.KEYS.

        Raises:
            ValueError: the source was read `num_epoch` times, holds nothing, or holds ids of another tokenizer.
        """
        with self._lock:  # the stream is one, whoever reads
            if global_batch_size != self._batch_size or (step < self._next_step and step not in self._made):
                self._begin()
                self._batch_size = global_batch_size
            while self._next_step <= step:
                made = np.stack([next(self._windows) for _ in range(global_batch_size)])
                if step - self._next_step < KEPT_STEPS:
                    self._made[self._next_step] = made
                self._made.pop(self._next_step - KEPT_STEPS, None)
                self._next_step += 1
            windows = self._made[step][rows]
        lengths = np.full(len(windows), self.sequence_length + 1)
        if self._fim is not None:
            samples = step * global_batch_size + np.arange(global_batch_size)[rows]
            origins = mix(np.zeros(samples.size, np.uint64))
            windows, lengths = self._fim(windows, lengths, origins, samples * self.sequence_length)
        return packing.pack(windows, lengths, self.eos_id, self._document_masking)

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes per token id; 0 for special tokens and for ids the tokenizer has not."""
        sizes = self._tokenizer.token_bytes()
        padded = np.zeros(self.vocab_size, np.int32)
        padded[: sizes.size] = sizes
        return padded

    def _begin(self) -> None:
        self._windows = self._cut()
        self._made: dict[int, np.ndarray] = {}
        self._next_step = self._batch_size = 0

    def _cut(self) -> Iterator[np.ndarray]:
        """Windows of L + 1 tokens that share one with the next; what an epoch leaves over begins the next one."""
        pending, size, length = [], 0, self.sequence_length
        for document in self._documents():
            pending.append(np.append(document, self.eos_id).astype(np.int32))
            size += pending[-1].size
            if size <= length:
                continue
            tokens = np.concatenate(pending)
            count = (size - 1) // length
            for start in range(0, count * length, length):
                yield tokens[start : start + length + 1]
            pending, size = [tokens[count * length :]], size - count * length

    def _documents(self) -> Iterator[np.ndarray | Sequence[int]]:
        epoch = 0
        while True:
            if epoch == self._num_epoch:
                raise ValueError(
                    f"{self.source} has been read num_epoch={self._num_epoch} times, and there are steps to go; lower "
                    "steps, or raise num_epoch"
                )
            is_empty = True
            for unit in self._units:
                for ids in self._encoded(readers.read(unit, self._text_column, self.eos_id)):
                    is_empty = False
                    yield ids
            if is_empty:
                raise ValueError(f"{self.source}: there is not one document to train on; name its text_column")
            epoch += 1

    def _encoded(self, records: Iterator[readers.Record | readers.Bad]) -> Iterator[np.ndarray | Sequence[int]]:
        texts: list[str] = []
        for record in records:
            if isinstance(record, readers.Bad):
                continue
            if record.ids is not None:
                self._check_ids(record.location, record.ids)
                yield record.ids
            elif record.text is not None and filters.drop_reason(record.text) is None:
                texts.append(record.text)
            if sum(map(len, texts)) > ENCODE_BYTES:
                yield from self._tokenizer.encode(texts)
                texts = []
        yield from self._tokenizer.encode(texts)

    def _check_ids(self, location: str, ids: np.ndarray) -> None:
        if ids.size and not 0 <= ids.min() <= ids.max() < self._tokenizer.vocab_size:
            raise ValueError(
                f"{location}: token ids {ids.min()} to {ids.max()} are not all of the tokenizer's 0 to "
                f"{self._tokenizer.vocab_size - 1}; set tokenizer_path to the one they were made with"
            )
