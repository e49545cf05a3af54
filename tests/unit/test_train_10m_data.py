"""The notebook script's data: where it comes from, what is asked of the hub, and what a batch is."""

import contextlib
import http.server
import re
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
from huggingface_hub import constants

import train_10m
from tests import train_10m_setup
from tests.train_10m_setup import TINY

real_hub_problem = train_10m.hub_problem.__wrapped__


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    with train_10m_setup.offline(monkeypatch, tmp_path):
        yield


def texts_of(batch, tokenizer):
    rows = zip(np.asarray(batch["input_ids"]), np.asarray(batch["length"]), strict=True)
    return [tokenizer.decode(row[:length]) for row, length in rows]


@pytest.fixture
def rows(monkeypatch):
    """Sets what the source of the data gives."""
    return lambda *texts: monkeypatch.setattr(train_10m, "find_rows", lambda: [{"content": text} for text in texts])


def test_a_row_is_the_beginning_of_a_file_its_end_and_padding(rows):
    tokenizer = train_10m.load_tokenizer(TINY.vocab_size)
    end, width = tokenizer.eos_token_id, TINY.max_seq_len + 1
    short, long = " " * 100 + "\nx = 1\n", "\n".join(f"name_{i} = {i}" for i in range(100))
    rows(*[short, long] * 4)
    batch = next(train_10m.load_data(TINY, tokenizer))
    assert set(batch) == {"input_ids", "length"}
    assert batch["input_ids"].shape == (jax.device_count(), width)
    tokens, length = np.asarray(batch["input_ids"]), np.asarray(batch["length"])

    ids = tokenizer(short)["input_ids"]
    assert len(ids) < width - 2
    assert list(tokens[0]) == ids + [end] * (width - len(ids))
    assert length[0] == len(ids) + 1
    assert list(tokens[1]) == tokenizer(long)["input_ids"][:width]
    assert length[1] == width


def test_a_file_that_just_fits_ends_and_one_that_just_does_not_does_not(rows):
    tokenizer = train_10m.load_tokenizer(TINY.vocab_size)
    end, text = tokenizer.eos_token_id, "x = [" + "1, " * 50
    ids = tokenizer(text)["input_ids"]
    rows(*[text] * 8)
    for max_seq_len, last in ((len(ids), end), (len(ids) - 1, ids[-1])):
        config = train_10m.Config(max_seq_len=max_seq_len, batch_size_per_device=1)
        batch = next(train_10m.load_data(config, tokenizer))
        assert batch["input_ids"][0, -1] == last
        assert batch["length"][0] == max_seq_len + 1


def test_only_texts_of_the_right_length_are_used_again_and_again(rows):
    tokenizer = train_10m.load_tokenizer(TINY.vocab_size)
    rows("a" * 100, "b" * 101, "c" * 49_999, "d" * 50_000)
    batches = train_10m.load_data(TINY, tokenizer)
    for _ in range(3):
        found = texts_of(next(batches), tokenizer)
        assert [text[0] for text in found] == ["b", "c"] * 4


def test_a_file_that_spells_the_end_of_text_token_does_not_end_there(rows):
    tokenizer = train_10m.load_tokenizer(TINY.vocab_size)
    rows(*['end = "<|endoftext|>"' + " " * 100] * 8)
    batch = next(train_10m.load_data(TINY, tokenizer))
    row, length = np.asarray(batch["input_ids"])[0], int(batch["length"][0])
    assert list(row[:length]).index(tokenizer.eos_token_id) == length - 1
    assert texts_of(batch, tokenizer)[0].startswith('end = "<|endoftext|>"')


def test_batches_are_the_same_every_time_and_shared_out_to_all_devices():
    tokenizer = train_10m.load_tokenizer(TINY.vocab_size)
    one, other = (train_10m.load_data(TINY, tokenizer) for _ in range(2))
    for _ in range(3):
        batch, again = next(one), next(other)
        assert np.array_equal(batch["input_ids"], again["input_ids"])
    shards = batch["input_ids"].addressable_shards
    assert len({shard.device for shard in shards}) == jax.device_count() == 8
    assert all(shard.data.shape == (1, TINY.max_seq_len + 1) for shard in shards)


def test_the_tokenizer_trained_here_brings_every_text_back():
    tokenizer = train_10m.load_tokenizer(TINY.vocab_size)
    assert len(tokenizer) == TINY.vocab_size
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    for text in ("def f(x):\n\treturn x  # é\u2581\r\n\n\n", " \U0001f600 ﬁ\x00 .  , 's"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_vocabulary_that_is_too_small_is_an_error_in_words():
    with pytest.raises(ValueError, match="vocab_size=100 is less than the tokenizer's 257 tokens"):
        train_10m.load_tokenizer(100)


THE_STACK = {"path": "bigcode/the-stack", "data_dir": "data/python", "split": "train", "streaming": True}
CODEPARROT = {"path": "codeparrot/codeparrot-clean", "split": "train", "streaming": True}


@pytest.mark.parametrize(
    ("given", "asked", "used"),
    [
        ({"bigcode/the-stack", "codeparrot/codeparrot-clean"}, [THE_STACK], "the-stack"),
        ({"codeparrot/codeparrot-clean"}, [THE_STACK, CODEPARROT], "codeparrot-clean"),
        (set(), [THE_STACK, CODEPARROT], "Python files of this machine"),
    ],
)
def test_the_sources_are_tried_in_the_seeds_order(monkeypatch, capsys, given, asked, used):
    calls = []

    def load_dataset(**where):
        calls.append(where)
        if where["path"] not in given:
            raise PermissionError("you must accept the conditions")
        return [{"content": where["path"] * 20}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(train_10m, "hub_problem", lambda: "")
    contents = [row["content"] for row in train_10m.find_rows()]
    assert calls == asked
    out = capsys.readouterr().out
    assert used in out.splitlines()[-1]
    assert out.count("you must accept the conditions") >= len(asked) - len(given & {asked[-1]["path"]})
    assert contents[0].startswith(asked[-1]["path"]) == bool(given)


def test_a_source_without_a_usable_text_is_skipped(monkeypatch, capsys):
    datasets = types.SimpleNamespace(load_dataset=lambda **_: [{"content": "short"}])
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setattr(train_10m, "hub_problem", lambda: "")
    assert len(train_10m.find_rows()) == 60
    assert capsys.readouterr().out.count("it has no usable file") == 3  # of either source, and why there is no data


def test_without_the_datasets_package_the_files_of_this_machine_are_used(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(train_10m, "hub_problem", lambda: "")
    assert len(train_10m.find_rows()) == 60
    assert "NO DATA FROM THE HUGGING FACE HUB" in capsys.readouterr().out


def test_the_tokenizer_is_the_hubs_unless_it_cannot_be_had(monkeypatch, capsys):
    import transformers

    trained = train_10m.train_tokenizer(train_10m.local_texts(), 300)
    answers = iter([trained, OSError("403 forbidden")])

    def from_pretrained(name):
        assert name == "bigcode/starcoder2-3b"
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    monkeypatch.setattr(train_10m, "hub_problem", lambda: "")
    assert train_10m.load_tokenizer(49152) is trained
    assert trained.pad_token == trained.eos_token
    assert not capsys.readouterr().out
    train_10m.load_tokenizer.cache_clear()
    assert len(train_10m.load_tokenizer(384)) == 384
    assert "403 forbidden" in capsys.readouterr().out


@contextlib.contextmanager
def server(status: int | None):
    """A hub that gives this answer to everything, or takes connections and never answers."""
    done = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if status is None:
                done.wait(60)
            else:
                self.send_response(status)
                self.end_headers()

        def log_message(self, *_):
            pass

    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{hub.server_port}"
    finally:
        done.set()
        hub.shutdown()
        hub.server_close()


@pytest.mark.parametrize(("status", "problem"), [(200, ""), (403, "403"), (None, "no answer|timed out")], ids=str)
def test_the_hub_is_asked_and_a_silent_one_is_given_up_in_seconds(monkeypatch, status, problem):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(train_10m, "HUB_SECONDS", 1)
    with server(status) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        began = time.monotonic()
        found = real_hub_problem()
        assert time.monotonic() - began < 3
    assert bool(found) == bool(problem)
    assert re.search(problem, found), found


def test_a_hub_that_is_off_or_not_there_is_a_problem_at_once(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "refused" in real_hub_problem()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert real_hub_problem() == "HF_HUB_OFFLINE is set"


def test_a_name_server_that_does_not_answer_is_given_up_too(monkeypatch):
    """The look-up of a name has no timeout of its own."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(train_10m, "HUB_SECONDS", 0.5)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: time.sleep(4))
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    began = time.monotonic()
    assert "no answer in 0.5 seconds" in real_hub_problem()
    assert time.monotonic() - began < 2
