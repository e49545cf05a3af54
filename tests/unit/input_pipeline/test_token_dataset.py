"""Mixtures, fill in the middle and document masks: always a function of the step, whoever computes it."""

import argparse
import email.message
import inspect
import json
import subprocess

import numpy as np
import pytest

from MaxText.input_pipeline import packing, token_block_writer, tokenizer
from MaxText.input_pipeline.fim import Fim
from MaxText.input_pipeline.token_dataset import TokenDataset, parse_mixture

LENGTH = 128


@pytest.fixture(scope="module")
def texts():
    modules = (argparse, json.decoder, json.encoder, subprocess, inspect, email.message)
    sources = [inspect.getsource(module) for module in modules]
    return [source[start : start + 900] for source in sources for start in range(0, len(source), 900)] + ["é" * 300]


@pytest.fixture(scope="module")
def bpe(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer.train(texts, 600, folder)
    return tokenizer.load(str(folder))


@pytest.fixture(scope="module")
def blocks(bpe, texts, tmp_path_factory):
    """Two directories, the first three times the second."""
    folder = tmp_path_factory.mktemp("blocks")
    encoded = bpe.encode(texts)
    for name, documents in (("a", encoded[: len(encoded) * 3 // 4]), ("b", encoded[len(encoded) * 3 // 4 :])):
        writer = token_block_writer.TokenBlockWriter(folder / name, bpe, 64, 5_000)
        writer.add(documents, 1)
        writer.finish(name, "none", {})
    return folder


def dataset(blocks, bpe, files="a", fim_rate=0.0, spm_rate=0.5, seed=0, masking=True):
    files = ";".join(f"{blocks}/{word}" for word in files.split(";"))
    fim = Fim(bpe, fim_rate, spm_rate, seed) if fim_rate else None
    return TokenDataset(files, 1024, LENGTH, seed, True, fim, masking)


VARIANTS = {
    "plain": {},
    "fim": {"fim_rate": 0.7},
    "mixture": {"files": "a,0.7;b,0.3"},
    "unmasked": {"masking": False},
    "all": {"files": "a,2;b,1", "fim_rate": 0.5, "masking": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shares", [1, 2, 4, 8])
def test_shares_assemble_to_the_same_global_batch_at_any_step(variant, shares, blocks, bpe):
    """Each share is opened anew, as a process that resumes there would."""
    for step in np.random.default_rng(shares).integers(0, 10**6, 3).tolist():
        whole = dataset(blocks, bpe, **VARIANTS[variant]).batch(step, 16, slice(None))
        size = 16 // shares
        parts = [
            dataset(blocks, bpe, **VARIANTS[variant]).batch(step, 16, slice(i * size, (i + 1) * size))
            for i in range(shares)
        ]
        for key in packing.KEYS:
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), whole[key])


def test_a_mixture_has_exact_shares_at_every_period(blocks, bpe):
    mixed = dataset(blocks, bpe, "a,0.7;b,0.3")
    only = {name: dataset(blocks, bpe, name) for name in "ab"}
    rows = {
        name: {row.tobytes() for row in only[name].batch(0, only[name].num_windows, slice(None))["inputs"]}
        for name in "ab"
    }
    inputs = mixed.batch(0, 1000, slice(None))["inputs"]
    is_a = np.array([row.tobytes() in rows["a"] for row in inputs])
    assert (is_a.reshape(-1, 10).sum(axis=1) == 7).all()
    assert len(np.unique(is_a.reshape(-1, 10), axis=0)) > 10  # and no fixed pattern
    assert all(row.tobytes() in rows["b"] for row in inputs[~is_a])


def test_every_part_of_a_mixture_goes_through_its_epochs(blocks, bpe):
    mixed, b = dataset(blocks, bpe, "a,1;b,1"), dataset(blocks, bpe, "b")
    size = b.num_windows
    assert mixed.num_windows == 2 * size
    epochs = [mixed.batch(step, 2 * size, slice(None))["inputs"] for step in range(2)]
    own = sorted(row.tobytes() for row in b.batch(0, size, slice(None))["inputs"])
    found = [[row.tobytes() for row in epoch if row.tobytes() in set(own)] for epoch in epochs]
    assert sorted(found[0]) == sorted(found[1]) == own and found[0] != found[1]


def test_how_a_mixture_is_written():
    assert parse_mixture("a") == [("a", 1)]
    assert [(name, float(share)) for name, share in parse_mixture("a,1; b,3")] == [("a", 0.25), ("b", 0.75)]
    for wrong in ("a,0;b,1", "a;b", "a,x;b,1", ",1;b,2", "a,1/0;b,1"):
        with pytest.raises(ValueError, match="a mixture is written dir,weight;dir,weight"):
            parse_mixture(wrong)


def test_different_tokenizers_do_not_mix(blocks, bpe, write_blocks):
    other = write_blocks([[1, 2, 3] * 20], vocab_size=900)
    with pytest.raises(ValueError, match="were made with different tokenizers"):
        TokenDataset(f"{blocks}/a,1;{other},1", 1024, LENGTH, 0, True)


# ---- fill in the middle


def pieces_of(batch, ids):
    """The documents of each row that hold a sentinel, as token lists."""
    for row, segments in zip(batch["inputs"], batch["inputs_segmentation"], strict=True):
        for number in range(1, segments.max() + 1):
            tokens = row[segments == number].tolist()
            if ids["fim_middle"] in tokens:
                yield tokens


def test_a_permuted_document_is_the_document(blocks, bpe, texts):
    """Prefix, middle and suffix are together a part of a text, up to what the suffix gave for the sentinels."""
    ids, kinds = bpe.special_ids, []
    everything = "\n".join(texts)
    batch = dataset(blocks, bpe, fim_rate=1.0).batch(0, 200, slice(None))
    for tokens in pieces_of(batch, ids):
        prefix, middle, suffix = (tokens.index(ids[role]) for role in ("fim_prefix", "fim_middle", "fim_suffix"))
        tokens = [token for token in tokens if token != bpe.eos_id]
        if suffix < middle and suffix - prefix == 1:  # SPM; a PSM with an empty prefix looks the same
            kinds.append("spm")
            parts = ["", bpe.decode(tokens[middle + 1 :]), bpe.decode(tokens[suffix + 1 : middle])]
        else:
            kinds.append("psm")
            assert prefix < suffix < middle
            parts = [bpe.decode(tokens[prefix + 1 : suffix]), bpe.decode(tokens[middle + 1 :])]
            parts.append(bpe.decode(tokens[suffix + 1 : middle]))
        assert parts[0] + parts[1] in everything  # the middle is whole, and stands after the prefix
        assert parts[2].rstrip("\ufffd") in everything
    assert len(kinds) > 150 and 0.35 < kinds.count("spm") / len(kinds) < 0.65


@pytest.mark.parametrize(("rate", "spm_rate"), [(0.5, 0.0), (0.25, 1.0)])
def test_rates(rate, spm_rate, blocks, bpe):
    plain = dataset(blocks, bpe).batch(0, 400, slice(None))
    changed = dataset(blocks, bpe, fim_rate=rate, spm_rate=spm_rate).batch(0, 400, slice(None))
    ids = bpe.special_ids
    found = list(pieces_of(changed, ids))
    long_enough = sum(
        np.count_nonzero(row == number) > 40
        for row in plain["inputs_segmentation"]
        for number in range(1, row.max() + 1)
    )
    assert 0.7 * rate < len(found) / long_enough < 1.5 * rate
    spm = [tokens.index(ids["fim_suffix"]) - tokens.index(ids["fim_prefix"]) == 1 for tokens in found]
    assert all(spm) if spm_rate else sum(spm) < 0.2 * len(spm)


def test_rows_keep_their_width_and_documents_end(blocks, bpe):
    batch = dataset(blocks, bpe, fim_rate=1.0).batch(3, 64, slice(None))
    assert all(batch[key].shape == (64, LENGTH) and batch[key].dtype == np.int32 for key in packing.KEYS)
    targets = batch["targets"][(batch["targets"] != bpe.eos_id) & (batch["targets_segmentation"] == 0)]
    ids = list(bpe.special_ids.values())
    assert targets.size < 0.05 * batch["targets"].size  # the first token of a document, and of padding nothing
    assert not set(targets.tolist()) & set(ids) - {ids[0]}


def test_draws_differ_by_epoch_and_seed_but_not_by_batch(blocks, bpe):
    first = dataset(blocks, bpe, fim_rate=0.5)
    size = first.num_windows
    one, two = (first.batch(epoch, size, slice(None))["inputs"] for epoch in (0, 1))
    sentinel = bpe.special_ids["fim_middle"]
    plain = dataset(blocks, bpe)
    where = [(plain.batch(epoch, size, slice(None))["inputs"], found) for epoch, found in ((0, one), (1, two))]
    permuted = [{row.tobytes() for row, new in zip(*pair, strict=True) if sentinel in new} for pair in where]
    assert permuted[0] != permuted[1] and permuted[0] & permuted[1]
    small = np.concatenate([first.batch(step, 4, slice(None))["inputs"] for step in range(4)])
    np.testing.assert_array_equal(small, first.batch(0, 16, slice(None))["inputs"])


def test_repositories_are_permuted_file_by_file(bpe, tmp_path):
    """Names and paths stay in front; the sentinels stand inside a file."""
    ids = bpe.special_ids
    files = [bpe.encode([f"src/file{i}.py\n" + f"def f{i}(value):\n    return value + {i}\n" * 6])[0] for i in range(4)]
    document = [ids["repo_name"], *bpe.encode(["owner/name"])[0]]
    for file in files:
        document += [ids["file_sep"], *file]
    writer = token_block_writer.TokenBlockWriter(tmp_path / "c", bpe, 64, 10**9)
    writer.add([document] * 3, 1)
    writer.finish("c", "none", {})
    fim = Fim(bpe, 1.0, 0.5, 0)
    batch = TokenDataset(tmp_path / "c", 1024, len(document), None, True, fim).batch(0, 1, slice(None))
    text = bpe.decode(batch["inputs"][0].tolist())
    parts = text.split("<|file_sep|>")
    assert parts[0] == "<|repo_name|>owner/name"
    changed = [part for part in parts[1:] if "<|fim_middle|>" in part]
    assert len(changed) >= 3
    for number, part in enumerate(parts[1:5]):
        assert part.startswith(f"src/file{number}.py\n")
        assert part.count("<|fim_middle|>") in (0, 1)


def test_a_tokenizer_without_sentinels_is_refused():
    from tests.unit.input_pipeline.conftest import FakeTokenizer

    with pytest.raises(ValueError, match="fim_rate=0.5 needs tokens for fim_prefix, fim_middle, fim_suffix"):
        Fim(FakeTokenizer(10), 0.5, 0.5, 0)


def test_the_identity_changes_with_all_that_changes_batches(blocks, bpe):
    variants = [*VARIANTS.values(), {"files": "a,0.6;b,0.4"}, {"fim_rate": 0.6}, {"fim_rate": 0.7, "spm_rate": 0.4}]
    identities = [dataset(blocks, bpe, **variant).identity for variant in variants]
    assert len(set(identities)) == len(variants)
    assert identities[0] == dataset(blocks, bpe).manifest.sha256


# ---- document masks


def test_without_document_masking_a_row_is_one_segment(blocks, bpe):
    masked, plain = (dataset(blocks, bpe, masking=on).batch(0, 64, slice(None)) for on in (True, False))
    assert masked["inputs_segmentation"].max() > 1
    np.testing.assert_array_equal(masked["inputs"], plain["inputs"])
    real = masked["inputs_segmentation"] > 0
    np.testing.assert_array_equal(plain["inputs_segmentation"], real)
    np.testing.assert_array_equal(plain["inputs_position"], np.where(real, np.arange(LENGTH), 0))
    assert (plain["targets_segmentation"] > 0).sum() > (masked["targets_segmentation"] > 0).sum()
