import pytest

from MaxText.input_pipeline import sources


def write_tree(root, count, prefix="def f():\n    return "):
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (root / f"m{number}.py").write_text(prefix + f"{number}\n" + f"# {number} padding\n" * 10)


def read(roots, max_bytes=10**9):
    return sources.read_corpus(roots, max_bytes, lambda line: None)


def test_drops_are_named_and_counted(tmp_path):
    write_tree(tmp_path / "a", 40)
    write_tree(tmp_path / "b" / "__pycache__", 40, "skipped")
    write_tree(tmp_path / "b" / "site-packages", 40, "skipped")
    (tmp_path / "b" / "copy.py").write_bytes((tmp_path / "a" / "m3.py").read_bytes())
    (tmp_path / "b" / "latin.py").write_bytes(b"# caf\xe9\n" * 100)
    (tmp_path / "b" / "short.py").write_text("x = 1\n")
    (tmp_path / "b" / "long.py").write_text("x = 1\n" * 10_000)
    (tmp_path / "b" / "gone.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "b" / "other.txt").write_text("no Python " * 100)
    corpus = read([tmp_path / "a", tmp_path / "b"])
    expected = {"duplicate": 1, "not_utf8": 1, "too_short": 1, "too_long": 1, "unreadable": 1, "over_byte_limit": 0}
    assert corpus.dropped == expected
    assert len(corpus.train) + len(corpus.heldout) == 40
    assert not set(corpus.train) & set(corpus.heldout)
    assert corpus.source_bytes == sum(len(text.encode()) for text in corpus.train + corpus.heldout)


def test_order_depends_on_the_contents_only(tmp_path):
    write_tree(tmp_path / "a", 60)
    (tmp_path / "z" / "deep").mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "a").iterdir(), reverse=True)):
        (tmp_path / "z" / "deep" / f"other{number}.py").write_bytes(path.read_bytes())
    first, second = read([tmp_path / "a"]), read([tmp_path / "z"])
    assert (first.train, first.heldout, first.content_hash) == (second.train, second.heldout, second.content_hash)


def test_line_ends_are_kept(tmp_path):
    text = "\ufeffx = 1\r\ny = 2\rz\n" * 20
    write_tree(tmp_path, 60)
    (tmp_path / "crlf.py").write_bytes(text.encode())
    corpus = read([tmp_path])
    assert text in corpus.train + corpus.heldout


def test_byte_limit_cuts_and_is_counted(tmp_path):
    write_tree(tmp_path, 100)
    whole, cut = read([tmp_path]), read([tmp_path], 10_000)
    assert 9_000 < cut.source_bytes <= 10_000
    assert cut.dropped["over_byte_limit"] == 100 - len(cut.train) - len(cut.heldout)
    assert set(cut.train + cut.heldout) < set(whole.train + whole.heldout)


def test_too_few_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="only 0 usable Python files"):
        read([tmp_path])


@pytest.mark.parametrize(("files", "modulus"), [(1, 2), (320, 10), (3_200, 100), (100_000, 100)])
def test_small_corpora_hold_out_more(files, modulus):
    assert sources.heldout_modulus(files) == modulus


def test_roots_hold_the_standard_library_and_installed_packages():
    roots = sources.python_roots()
    assert any((root / "argparse.py").is_file() for root in roots)
    assert any((root / "numpy").is_dir() for root in roots)


def test_the_project_itself_is_skipped(tmp_path, monkeypatch):
    write_tree(tmp_path / "installed" / "MaxText", 3)
    write_tree(tmp_path / "installed" / "other" / "MaxText", 3)  # somebody else's
    monkeypatch.setattr(sources, "PROJECT", tmp_path / "installed" / "MaxText")
    found = list(sources.find_python_files([tmp_path / "installed"]))
    assert {path.parent for path in found} == {tmp_path / "installed" / "other" / "MaxText"}
