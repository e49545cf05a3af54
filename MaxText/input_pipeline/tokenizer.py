"""Train a byte-level BPE tokenizer, and load any tokenizer behind one small interface.

In: texts, or a path (Hugging Face directory, hub name, SentencePiece .model). Out: an object with encode, decode,
vocab_size, eos_id, fingerprint and token_bytes. Special tokens that stand in a text are always encoded as ordinary
characters: so the EOS id means "end of a document" and nothing else, and the loader can trust it.
"""

import hashlib
import json
import os
import re
import shutil
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from MaxText.input_pipeline.word_cache import WordCache

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (
    END_OF_TEXT, "<|pad|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>",
)  # fmt: skip
# What special tokens are for, and how tokenizers spell them: ours and Qwen's with bars, StarCoder2's without.
ROLES = ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")
SPELLINGS = ("<|{}|>", "<{}>")
# Words, single digits, punctuation with the newline and the indentation after it: 23% more bytes per token on Python
# than StarCoder's rules, 8% more than Qwen's.
CODE_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+(?:(?:\r?\n)+[ \t]*)?|(?:\r?\n)+[ \t]*|[ \t]+(?!\S)|\s+"
)
PATTERNS = {
    "code": CODE_PATTERN,
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
MIN_FREQUENCY = 2  # a pair seen once is no evidence for a token
HUB_PROBE_SECONDS = 3
ROUND_TRIP_SAMPLE = "def f(x):\n\treturn x  # é\u2581\r\n\n\n    \u200d\U0001f600 ﬁ\x00\n"


@runtime_checkable  # so that the tests can check signatures
class Tokenizer(Protocol):
    """What the data preparation needs of a tokenizer."""

    name: str
    vocab_size: int
    eos_id: int
    fingerprint: str
    special_ids: dict[str, int]  # by role, those of ROLES that it has

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, without BOS or EOS; no text can produce `eos_id` or one of `special_ids`."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the tokens, special ones included."""
        ...

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: the UTF-8 bytes each token stands for; 0 for special tokens."""
        ...

    def save(self, directory: Path) -> str:
        """Copy it into a directory; returns what to append to the directory for `load`."""
        ...


def train(texts: Iterable[str], vocab_size: int, directory: Path, rules: str = "code") -> None:
    """Train a byte-level BPE of at most `vocab_size` entries and save it as a Hugging Face directory.

    Args:
        rules: how text is cut into words, inside which tokens stay: code, starcoder2 or qwen.

    Raises:
        ValueError: `vocab_size` has no room for the 256 bytes and the special tokens.
        OSError: the directory cannot be written.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small for a byte-level tokenizer; use at least {smallest} (256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens)"
        )
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    _silence_transformers()
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(models.BPE())
    if rules == "starcoder2":  # its digits, then GPT-2's pattern
        cut = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        split = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[rules]), behavior="isolated")
        cut = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(cut)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    trained = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=SPECIAL_TOKENS[1],
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        clean_up_tokenization_spaces=False,
    )
    try:
        trained.save_pretrained(directory)
    except Exception as error:  # the library raises a bare Exception when it cannot write
        raise OSError(f"the tokenizer cannot be saved to {directory}: {error}") from error


def num_token_ids(config: Any) -> int:
    """The ids of the model's vocabulary that a token may have: those that are not padding."""
    return config.vocab_size - config.vocab_padding


def check_fits(loaded: Tokenizer, tokenizer_path: str, num_ids: int) -> None:
    """A ValueError where the tokenizer has more ids than the `num_ids` that the model's tokens may have."""
    if loaded.vocab_size > num_ids:
        raise ValueError(
            f"tokenizer_path={tokenizer_path} has {loaded.vocab_size} entries, more than vocab_size - vocab_padding = "
            f"{num_ids}; set vocab_size so that they fit"
        )


def load(tokenizer_path: str) -> Tokenizer:
    """The tokenizer at a Hugging Face directory, a hub name or a SentencePiece .model file.

    Raises:
        FileNotFoundError: there is no such file, or the hub name is neither cached nor reachable.
        ValueError: it is no tokenizer, it has no EOS, or text can spoof its EOS or a token of ROLES.
    """
    path = Path(tokenizer_path).expanduser()
    if path.suffix == ".model":
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer_path={tokenizer_path}: there is no such SentencePiece file")
        tokenizer: Tokenizer = SentencePieceTokenizer(path)
    else:
        tokenizer = HuggingFaceTokenizer(tokenizer_path, _load_hugging_face(tokenizer_path, path))
    for role, token in {"end-of-text": tokenizer.eos_id, **tokenizer.special_ids}.items():
        if token in tokenizer.encode([tokenizer.decode([token])])[0]:
            raise ValueError(
                f"tokenizer_path={tokenizer_path}: the text of its {role} token is encoded as that token, so that a "
                "file which contains it would look like two, or like parts; use a tokenizer that can split special "
                "tokens"
            )
    if (decoded := tokenizer.decode(tokenizer.encode([ROUND_TRIP_SAMPLE])[0])) != ROUND_TRIP_SAMPLE:
        warnings.warn(
            f"tokenizer_path={tokenizer_path} does not reproduce text exactly: {ROUND_TRIP_SAMPLE!r} becomes "
            f"{decoded!r}; the model will see and write altered code",
            stacklevel=2,
        )
    return tokenizer


class HuggingFaceTokenizer:
    """A fast tokenizer of `transformers`: it is saved as it came, and a copy of its `tokenizers` backend encodes.

    The copy neither truncates nor pads, and takes the tokens of ROLES for special ones, which not all tokenizers do.
    """

    def __init__(self, name: str, tokenizer: Any):
        self._tokenizer = tokenizer
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"tokenizer_path={name}: it has no fast (`tokenizers`) form; convert it to one")
        if tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer_path={name}: it has no end-of-text token; set eos_token in its configuration")
        self.name = name
        state = backend.to_str()
        self.fingerprint = hashlib.sha256(state.encode()).hexdigest()
        content = json.loads(state) | {"truncation": None, "padding": None}
        roles = [spelling.format(role) for role in ROLES for spelling in SPELLINGS]
        for token in content["added_tokens"]:
            token["special"] |= token["content"] in roles
        self._backend: Any = type(backend).from_str(json.dumps(content))
        self._backend.encode_special_tokens = True
        self._words = WordCache(self._backend)
        self.eos_id: int = tokenizer.eos_token_id
        self.vocab_size = 1 + max(self._backend.get_vocab().values())
        self.special_ids = _special_ids(self._backend.token_to_id)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        known = [self._words.encode(text) for text in texts]
        rest = [text for text, ids in zip(texts, known, strict=True) if ids is None]
        encoded = iter(self._backend.encode_batch_fast(rest, add_special_tokens=False)) if rest else iter(())
        return [next(encoded).ids if ids is None else ids for ids in known]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        decoder = self._backend.decoder  # whose state is its part of tokenizer.json
        byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
        added = self._backend.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, np.int32)
        for piece, token in self._backend.get_vocab().items():
            if token in added:
                sizes[token] = 0 if added[token].special else len(piece.encode())
            else:  # byte-level pieces spell every byte as one character
                sizes[token] = len(piece) if byte_level else _sentencepiece_bytes(piece)
        return sizes

    def save(self, directory: Path) -> str:
        self._tokenizer.save_pretrained(directory)
        return ""


class SentencePieceTokenizer:
    """A SentencePiece model; not exact on all text (U+2581 becomes a blank), therefore not the default."""

    def __init__(self, path: Path):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:
            raise ValueError(f"tokenizer_path={path}: not a SentencePiece model ({error})") from error
        if self._model.eos_id() < 0:
            raise ValueError(f"tokenizer_path={path}: it has no end-of-text token; train it with eos_id set")
        self.name = str(path)
        self._path = path
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        self.eos_id: int = self._model.eos_id()
        self.vocab_size: int = self._model.vocab_size()
        model, unknown = self._model, self._model.unk_id()
        self.special_ids = _special_ids(lambda piece: i if (i := model.piece_to_id(piece)) != unknown else None)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), out_type=int)

    def decode(self, ids: Sequence[int]) -> str:
        if list(ids) == [self.eos_id]:  # decode() makes nothing of control pieces
            return self._model.id_to_piece(self.eos_id)
        return self._model.decode(list(ids))

    def token_bytes(self) -> np.ndarray:
        return np.array(
            [
                0 if self._model.is_control(token) else _sentencepiece_bytes(self._model.id_to_piece(token))
                for token in range(self.vocab_size)
            ],
            np.int32,
        )

    def save(self, directory: Path) -> str:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._path, directory / "tokenizer.model")
        return "tokenizer.model"


def _special_ids(find: Callable[[str], int | None]) -> dict[str, int]:
    """The ids of the roles for which a spelling is found."""
    found = {}
    for role in ROLES:
        ids = [id_ for spelling in SPELLINGS if (id_ := find(spelling.format(role))) is not None]
        found |= {role: ids[0]} if ids else {}
    return found


def _sentencepiece_bytes(piece: str) -> int:
    """The bytes a SentencePiece piece stands for: U+2581 is a blank, <0x0A> one byte."""
    return 1 if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece) else len(piece.replace("\u2581", " ").encode())


def _silence_transformers() -> None:
    """Keep its import from warning that PyTorch is missing: only its tokenizers are used."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _load_hugging_face(name: str, path: Path) -> Any:
    """The AutoTokenizer of a directory, or of a hub name: from the cache first, then from the hub if it answers."""
    if not path.is_dir() and not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"tokenizer_path={name}: there is no such directory, and it is no hub name")
    _silence_transformers()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        if path.is_dir():
            raise ValueError(f"tokenizer_path={name}: no usable Hugging Face tokenizer there ({error})") from error
    if problem := hub_problem():
        raise FileNotFoundError(
            f"tokenizer_path={name}: no such directory here, not in the hub's cache, and the hub cannot be asked "
            f"({problem}); download it on a machine with access and give its directory"
        )
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise FileNotFoundError(f"tokenizer_path={name}: the hub did not give a tokenizer ({error})") from error


def hub_problem() -> str | None:
    """Why the hub cannot be reached, told within seconds (the library itself retries for most of a minute)."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return "HF_HUB_OFFLINE is set"
    from huggingface_hub import constants

    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_PROBE_SECONDS)
    except urllib.error.HTTPError:
        return None  # it answered
    except OSError as error:
        return f"{constants.ENDPOINT}: {error}"
    return None
