"""What `inspect` shows of prepared data."""

import re

import pytest

from MaxText.preparation import inspection


@pytest.fixture
def prepared(prepare, texts, tmp_path):
    (tmp_path / "source").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "source" / f"{number:02d}.py").write_text(text)
    assert prepare(source=f"dir:{tmp_path / 'source'}")[0] == 0
    return tmp_path / "out"


def test_documents_tokens_and_sources(prepared, tmp_path, capsys, texts):
    picture = tmp_path / "lengths.png"
    assert inspection.main([str(prepared / "train"), "documents=2", f"plot={picture}", "seed=1"]) == 0
    shown = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "dropped: too_long 1" in shown or "dropped: none" in shown
    plain = re.sub(r"\x1b\[\d+m", "", shown)
    documents = [part.partition("\n")[2] for part in plain.split("==== ")[1:]]
    assert len(documents) == 2
    for document in documents:
        assert any(document.partition("\n... ")[0].rstrip("\n")[:200] in text for text in texts)
    assert shown.count("\x1b[31m") > 20 and shown.count("\x1b[32m") > 20


def test_a_mixture_shows_shares_and_epochs(prepared, tmp_path, capsys):
    files = f"{prepared / 'train'},3;{prepared / 'heldout'},1"
    assert inspection.main([files, "documents=1", f"plot={tmp_path / 'x.png'}"]) == 0
    shown = capsys.readouterr().out
    assert "75.00%" in shown and "25.00%" in shown and "1.00  dir:" in shown


def test_wrong_command_lines(capsys, tmp_path):
    assert inspection.main([]) == 2 and "usage:" in capsys.readouterr().out
    assert inspection.main([str(tmp_path)]) == 1
    assert "holds no prepared data" in capsys.readouterr().out
    assert inspection.main(["x", "documnets=1"]) == 2
