import resource
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from MaxText.input_pipeline import embedded, loader, sources, tokenizer
from MaxText.input_pipeline.token_blocks import TokenBlockReader


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    words = ["def", "return", "self", "import", "value", "for", "in", "range", "print", "<|endoftext|>"]
    for number in range(80):
        lines = (" ".join(rng.choice(words, 5)) + f" {rng.integers(100)}" for _ in range(20))
        (root / f"file{number}.py").write_text("\n    ".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def prepared(tree, tmp_path_factory):
    cache, lines = tmp_path_factory.mktemp("cache"), []
    return cache, prepare(cache, tree, lines.append), lines


def prepare(cache, tree, log=lambda line: None, corpus_bytes=10**6, vocab_size=400, tokenizer_path=""):
    return embedded.prepare(cache, corpus_bytes, vocab_size, tokenizer_path, log, [tree])


def texts_of(directory, encoder):
    reader = TokenBlockReader(directory, encoder.vocab_size)
    (shard,) = reader.manifest.shards
    ids = np.frombuffer(reader.read(0, 0, shard.tokens), reader.dtype)
    ends = np.flatnonzero(ids == encoder.eos_id)
    assert ends[-1] == ids.size - 1 and ends.size == shard.documents
    starts = [0, *(ends[:-1] + 1)]
    return [encoder.decode(ids[start:end].tolist()) for start, end in zip(starts, ends, strict=True)]


def test_the_files_come_back_exactly(prepared, tree):
    _, corpus, _ = prepared
    encoder = tokenizer.load(corpus.tokenizer_path)
    train, heldout = texts_of(corpus.train, encoder), texts_of(corpus.heldout, encoder)
    assert sorted(train + heldout) == sorted(path.read_text() for path in tree.iterdir())
    assert any("<|endoftext|>" in text for text in train)
    expected = sources.read_corpus([tree], 10**6, lambda line: None)
    assert (train, heldout) == (expected.train, expected.heldout)
    assert encoder.vocab_size <= 400


def test_the_cold_start_tells_its_stages(prepared):
    _, _, lines = prepared
    told = "\n".join(lines)
    for part in ("searching", "kept 80 files", "dropped:", "training a byte-level BPE", "encoding train: ", "ready in"):
        assert part in told


def test_the_second_start_searches_nothing(prepared, tree, monkeypatch):
    cache, corpus, _ = prepared
    monkeypatch.setattr(sources, "read_corpus", None)
    monkeypatch.setattr(tokenizer, "load", None)
    lines = []
    assert prepare(cache, tree, lines.append) == corpus
    assert lines == [] and "to take a new one, for new runs, delete" in corpus.note


def test_a_lost_pointer_does_not_encode_again(prepared, tree, monkeypatch):
    cache, corpus, _ = prepared
    for pointer in cache.glob("*.json"):
        pointer.write_text("{ nonsense")
    monkeypatch.setattr(tokenizer, "train", None)
    assert prepare(cache, tree).train == corpus.train


def test_other_settings_make_another_snapshot(prepared, tree):
    cache, corpus, _ = prepared
    assert prepare(cache, tree, vocab_size=300).train != corpus.train
    assert prepare(cache, tree, corpus_bytes=5_000).train != corpus.train


def test_a_snapshot_with_a_missing_part_is_built_again(tree, tmp_path):
    corpus = prepare(tmp_path, tree)
    (corpus.heldout / "manifest.json").unlink()
    again = prepare(tmp_path, tree)
    assert TokenBlockReader(again.heldout, 400).manifest.documents > 0


def test_a_killed_build_leaves_nothing_that_counts(tree, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(embedded.token_block_writer.TokenBlockWriter, "finish", None)
        with pytest.raises(TypeError):
            prepare(tmp_path, tree)
    assert list(tmp_path.iterdir()) == []
    assert prepare(tmp_path, tree).train.is_dir()


def test_of_two_builders_the_slower_takes_the_faster_ones(tree, tmp_path, monkeypatch):
    move, faster = embedded._move, []

    def move_late(building, final):
        if not faster:
            faster.append(None)
            faster.append(prepare(tmp_path, tree))
        move(building, final)

    monkeypatch.setattr(embedded, "_move", move_late)
    corpus = prepare(tmp_path, tree)
    assert corpus.train == faster[1].train
    assert not list(tmp_path.glob("building-*"))


def test_a_given_tokenizer_is_used_or_refused(prepared, tree, tmp_path):
    _, corpus, _ = prepared
    given = tokenizer.load(corpus.tokenizer_path)
    same = prepare(tmp_path, tree, tokenizer_path=corpus.tokenizer_path)
    assert TokenBlockReader(same.train, 400).manifest.tokenizer["sha256"] == given.fingerprint
    with pytest.raises(ValueError, match="more than vocab_size - vocab_padding = 300"):
        prepare(tmp_path, tree, vocab_size=300, tokenizer_path=corpus.tokenizer_path)
    with pytest.raises(FileNotFoundError, match=r"^tokenizer_path=/no/where"):
        prepare(tmp_path, tree, tokenizer_path="/no/where")


def test_another_tokenizer_at_the_same_path_is_noticed(prepared, tree, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(prepared[1].tokenizer_path, mine)
    first = prepare(tmp_path / "cache", tree, tokenizer_path=str(mine))
    tokenizer.train(["x = 1\n" * 99], 300, mine)
    assert prepare(tmp_path / "cache", tree, tokenizer_path=str(mine)).train != first.train


def test_a_cache_that_cannot_be_written(tree, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot prepare the embedded corpus in data_cache_directory="):
        prepare(tmp_path / "file", tree)


@pytest.mark.faults
@pytest.mark.parametrize("limit", [15_000, 55_000])  # enough for nothing, for the tokenizer only
def test_a_full_disk_is_told_and_nothing_half_is_left(tree, tmp_path, limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot prepare the embedded corpus in data_cache.*File too large"):
            prepare(tmp_path, tree)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_open_datasets(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "python_roots", lambda: [tree])
    config = SimpleNamespace(
        dataset_type="embedded", data_cache_directory=str(tmp_path), embedded_corpus_bytes=10**6, vocab_size=512,
        vocab_padding=0, tokenizer_path="", max_target_length=32, enable_data_shuffling=True,
        data_shuffle_seed=0, fim_rate=0.5, fim_spm_rate=0.5, document_masking=True,
    )  # fmt: skip
    datasets = loader.open_datasets(config, print)
    assert datasets.description.startswith("DATA: the Python files of this machine (80 files, ")
    assert "not a curated corpus" in datasets.description and "snapshot of" in datasets.description
    assert tokenizer.load(datasets.tokenizer_path).eos_id == datasets.eos_id
    assert datasets.token_bytes.shape == (512,) and datasets.token_bytes.max() > 3
    batch = datasets.train.batch(0, 4, slice(None))
    text_bytes = sum(len(path.read_bytes()) for path in tree.iterdir())
    assert datasets.train.manifest.source_bytes + datasets.evaluation.manifest.source_bytes == text_bytes
    assert batch["inputs"].shape == (4, 32)
    assert datasets.train.manifest.split_rule
