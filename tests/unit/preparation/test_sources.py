"""Every kind of source gives the same documents, and what is broken is counted, named and passed over."""

import errno
import gzip
import json
import os

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from fsspec.implementations.local import LocalFileOpener

from MaxText.input_pipeline import inputs, readers, sources, tokenizer


def rows_of(texts):
    return [
        {"content": text, "max_stars_repo_name": f"a/r{i % 3}", "max_stars_repo_path": f"p{i}.py", "licenses": ["MIT"]}
        for i, text in enumerate(texts)
    ]


def write(kind, folder, texts):
    """Write the texts as a source of this kind; returns its name."""
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows_of(texts)).encode()
    if kind == "dir":
        for i, text in enumerate(texts):
            (folder / f"f{i:03d}.py").write_bytes(text.encode())
    elif kind == "jsonl":
        (folder / "a.jsonl").write_bytes(lines)
    elif kind == "jsonl.gz":
        half = len(lines.splitlines(True)) // 2
        for name, part in (("a", lines.splitlines(True)[:half]), ("b", lines.splitlines(True)[half:])):
            (folder / f"{name}.json.gz").write_bytes(gzip.compress(b"".join(part), mtime=0))
    elif kind == "jsonl.zst":
        parts = lines[:1000], lines[1000:]  # two frames, as parallel compressors write them
        (folder / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, parts)))
    elif kind in ("parquet", "hf"):
        table = pyarrow.Table.from_pylist(rows_of(texts))
        pyarrow.parquet.write_table(table, folder / "train.parquet", row_group_size=5)
    return f"{kind}:{folder}"


KINDS = ["dir", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "hf"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_documents(kind, prepare, texts, tmp_path, documents_in):
    code, lines = prepare(source=write(kind, tmp_path / "source", texts))
    assert code == 0, lines
    found = documents_in(tmp_path / "out/train") + documents_in(tmp_path / "out/heldout")
    assert sorted(found) == sorted(texts)
    assert any(f"READ: {len(texts)} records" in line for line in lines)


@pytest.mark.parametrize("kind", ["dir", "jsonl", "parquet"])
def test_small_units_hold_every_record_once(kind, texts, tmp_path):
    source = write(kind, tmp_path / "source", texts)
    units = inputs.find_units(source, 30_000, print)
    assert len(units) > 3 and [unit.number for unit in units] == list(range(len(units)))
    units = [inputs.Unit.from_json(json.loads(json.dumps(unit.to_json()))) for unit in units]
    records = [record for unit in units for record in readers.read(unit, "", -1)]
    assert [record.text for record in records] == texts
    if kind != "dir":
        assert records[4].repository == "a/r1" and records[4].path == "p4.py" and records[4].licenses == ("MIT",)


def test_tfds_without_tensorflow(texts, tmp_path, prepare, documents_in):
    import sys

    import tensorflow_datasets as tfds

    class Files(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict({"content": tfds.features.Text()})
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((i, {"content": text}) for i, text in enumerate(texts))

    builder = Files(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    assert prepare(source=f"tfds:{builder.data_path}")[0] == 0
    found = documents_in(tmp_path / "out/train") + documents_in(tmp_path / "out/heldout")
    assert sorted(found) == sorted(texts)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("packed", [False, True])
def test_token_ids_are_not_tokenized_again(packed, texts, tmp_path, prepare, documents_in, tokenizer_path):
    loaded = tokenizer.load(tokenizer_path)
    rows = loaded.encode(texts)
    if packed:  # a stream cut at one length; the last row may be shorter
        stream = np.concatenate([[*row, loaded.eos_id] for row in rows])
        rows = [stream[start : start + 700].tolist() for start in range(0, stream.size, 700)]
        rows.pop()
    path = tmp_path / "ids.parquet"
    table = pyarrow.table({"input_ids": pyarrow.array(rows, pyarrow.list_(pyarrow.int32()))})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    assert prepare(source=f"parquet:{path}", held_out_one_in=0)[0] == 0
    found = documents_in(tmp_path / "out/train")
    if packed:
        assert found[:-1] == texts[: len(found) - 1] and texts[len(found) - 1].startswith(found[-1])
    else:
        assert found == texts


def test_ids_of_another_tokenizer_are_bad_records(tmp_path, prepare):
    rows = [[20, 30, 40], [20, 600], [], [50, 60], [-1, 7]]
    table = pyarrow.table({"input_ids": pyarrow.array(rows, pyarrow.list_(pyarrow.int32()))})
    pyarrow.parquet.write_table(table, tmp_path / "ids.parquet")
    assert prepare(source=f"parquet:{tmp_path / 'ids.parquet'}", held_out_one_in=0)[0] == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["bad"] == {"ids_out_of_range": 2, "no_text": 1} and report["documents"] == {"train": 2}
    assert report["bad_records"][0][0].endswith("row group 0, row 1")
    assert report["bad_records"][0][2] == "20 to 600, of a tokenizer of 500"


def test_bad_records_are_counted_and_named(texts, tmp_path, prepare):
    folder = tmp_path / "source"
    folder.mkdir()
    good = [json.dumps(row).encode() for row in rows_of(texts)]
    bad = [b'{"content": "x', b'{"content": 3}', b"\xff\xfe", b"[1]", b'{"content": "\\ud800"}']
    (folder / "a.jsonl").write_bytes(b"\n".join([good[0], *bad, *good[1:]]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(good * 3))[:-40])
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(b"\n".join(good * 3))[:-40])
    (folder / "d.jsonl.gz").write_bytes(b"not gzip at all")
    code, lines = prepare(source=f"jsonl:{folder}")
    assert code == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["bad"] == {"bad_json": 2, "no_text": 1, "not_utf8": 2, "truncated_file": 3}
    places = {place.rpartition("/")[2]: reason for place, reason, _ in report["bad_records"]}
    assert places[f"a.jsonl:byte {len(good[0]) + 1}"] == "bad_json"
    assert {name: places[name] for name in ("b.jsonl.gz", "c.jsonl.zst", "d.jsonl.gz")} == dict.fromkeys(
        ("b.jsonl.gz", "c.jsonl.zst", "d.jsonl.gz"), "truncated_file"
    )
    assert any(line.startswith("BAD RECORDS, skipped: bad_json 2") for line in lines)
    manifest = json.loads((tmp_path / "out/train/manifest.json").read_text())
    assert manifest["dropped"]["truncated_file"] == 3


def test_a_broken_parquet_file_is_named(texts, tmp_path, prepare):
    folder = tmp_path / "source"
    write("parquet", folder, texts)
    whole = (folder / "train.parquet").read_bytes()
    (folder / "truncated.parquet").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[1000:3000] = bytes(2000)
    (folder / "damaged.parquet").write_bytes(damaged)
    assert prepare(source=f"parquet:{folder}")[0] == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    named = {place.rpartition("/")[2] for place, reason, _ in report["bad_records"] if reason == "broken_parquet"}
    assert named == {"truncated.parquet", "damaged.parquet"}
    assert sum(report["documents"].values()) == len(texts)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC])
def test_a_disk_that_fails_is_no_bad_record(number, texts, tmp_path, prepare, monkeypatch):
    """The unit fails and is read again; nothing is lost."""
    source = write("parquet", tmp_path / "source", texts)
    real, broken = LocalFileOpener.read, []

    def read(self, *args):
        if broken and self.path.endswith(".parquet") and self.f.tell() < 2000:
            raise OSError(number, os.strerror(number))
        return real(self, *args)

    monkeypatch.setattr(LocalFileOpener, "read", read)
    broken.append(True)
    code, lines = prepare(source=source)
    assert code == 1 and any(f"UNIT 0 FAILED: OSError: [Errno {number}]" in line for line in lines), lines
    broken.clear()
    assert prepare(source=source)[0] == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert not report["bad"] and sum(report["documents"].values()) == len(texts)


def test_a_disk_that_fails_while_files_are_listed_is_said(texts, tmp_path, monkeypatch):
    source = write("parquet", tmp_path / "source", texts)

    def read(self, *args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(LocalFileOpener, "read", read)
    with pytest.raises(ValueError, match="Input/output error"):
        inputs.find_units(source, 10**9, print)


def test_a_failing_disk_under_tfds_is_no_bad_record(monkeypatch):
    errors = [OSError(errno.EIO, "Input/output error"), RuntimeError("crc"), OSError("corrupt")]

    class Source:
        def __getitem__(self, index):
            raise errors[index]

    monkeypatch.setattr(readers.hub, "open_tfds", lambda place: Source())
    assert [row.reason for row in readers._tfds_rows(inputs.Piece("x", 1, 3, 0, ""))] == ["broken_record"] * 2
    with pytest.raises(OSError, match="Input/output error"):
        next(readers._tfds_rows(inputs.Piece("x", 0, 1, 0, "")))


def test_odd_records_are_counted_and_named(texts, tmp_path, prepare):
    folder = tmp_path / "source"
    folder.mkdir()
    odd = [
        {"content": texts[0], "license": 3}, {"tokens": [[1], [2, 3]]}, {"content": texts[0], "repo_name": "\udce9"},
        {"content": texts[0], "path": "caf\udce9.py"}, {"content": texts[0], "license": {"a": 1}},
    ]  # fmt: skip
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, [*odd, *rows_of(texts)])))
    assert prepare(source=f"jsonl:{folder}", repositories="true", held_out_one_in=0)[0] == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["bad"] == {"no_licenses": 2, "no_text": 1, "not_utf8": 2}
    assert [place.rpartition(" ")[2] for place, _, _ in report["bad_records"][:2]] == [
        "0",
        str(len(json.dumps(odd[0])) + 1),
    ]


def test_odd_names_of_files(texts, tmp_path, prepare, monkeypatch):
    """Blanks and accents are read; a name that is not UTF-8 is a bad record, which can be printed."""
    folder = tmp_path / "a source"
    folder.mkdir()
    for name, text in zip(("a b.py", "café.py", "50%.py", os.fsdecode(b"caf\xe9.py")), texts, strict=False):
        (folder / name).write_text(text)
    monkeypatch.setattr(sources, "python_roots", lambda: [folder])
    for source in (f"dir:{folder}", "embedded"):
        out = tmp_path / source[:3]
        code, lines = prepare(source=source, held_out_one_in=0, out=out)
        assert code == 0, lines
        "\n".join(lines).encode()
        report = json.loads((out / "report.json").read_text())
        assert report["documents"] == {"train": 3} and report["bad"] == {"not_utf8": 1}


@pytest.mark.parametrize(
    ("sizes", "is_packed"),
    [([5, 5, 3], True), ([5] * 16 + [3], True), ([5] * 15 + [3], True), ([5, 5], True), ([5], False), ([5, 3], False),
     ([5, 5, 7], False), ([5, 4, 3], False), ([5] * 20, True)],
)  # fmt: skip
def test_rows_of_one_length_are_a_stream(sizes, is_packed):
    rows = [("x", {"tokens": list(range(size))}) for size in sizes]
    records = list(readers._records(rows, "", eos_id=-1))
    assert len(records) == (1 if is_packed else len(sizes))


def test_the_first_source_there_is_is_taken_and_said(texts, tmp_path):
    good = write("dir", tmp_path / "source", texts)
    lines = []
    units = inputs.find_units(f"jsonl:/nowhere/a.jsonl, parquet:{tmp_path}/empty/*.parquet,{good}", 10**9, lines.append)
    assert units[0].kind == "dir" and len(lines) == 3
    assert lines[0].startswith("SOURCE NOT USED: jsonl:/nowhere/a.jsonl: FileNotFoundError")
    assert lines[1].startswith("SOURCE NOT USED: parquet:")
    assert lines[2].startswith(f"SOURCE: {good} (number 3 of the 3 given)")
    with pytest.raises(ValueError, match=r"no source can be read:\n  - dir:/nowhere"):
        inputs.find_units("dir:/nowhere", 1, lines.append)


@pytest.mark.parametrize("source", ["csv:x", "dir", "x"])
def test_an_unknown_kind_of_source(source):
    with pytest.raises(ValueError, match=rf"source={source}: must be one of hf, parquet, jsonl"):
        inputs.split_chain(source)


def test_the_hub_is_asked_once_and_quickly(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = []
    with pytest.raises(ValueError, match="the hub cannot be asked"):
        inputs.find_units("hf:bigcode/the-stack/data/python,hf:codeparrot/codeparrot-clean", 10**9, lines.append)
    assert len(lines) == 2


def test_names_of_hub_data_sets(tmp_path):
    from MaxText.input_pipeline import hub

    assert hub.split_place("bigcode/the-stack/data/python@v1.2") == ("bigcode/the-stack", "data/python", "v1.2")
    assert hub.split_place("codeparrot/codeparrot-clean") == ("codeparrot/codeparrot-clean", None, None)
    assert hub.split_place(str(tmp_path)) == (str(tmp_path), None, None)


@pytest.mark.parametrize("kind", ["dir", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_files_are_read_through_one_library(texts, tmp_path, kind):
    """memory:// stands for gs://: a place that is not on the disk."""
    write(kind, tmp_path / "source", texts)
    bucket = fsspec.filesystem("memory")
    bucket.put(str(tmp_path / "source"), f"/bucket-{kind}", recursive=True)
    units = inputs.find_units(f"{kind}:memory://bucket-{kind}", 10_000, print)
    assert len(units) > 1 or kind.startswith("jsonl.")
    assert [record.text for unit in units for record in readers.read(unit, "", -1)] == texts
