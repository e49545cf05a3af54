"""Tokenizers of all rules are trained, measured, and the same every time."""

import json

import pytest

from MaxText import pyconfig
from MaxText.input_pipeline import tokenizer
from MaxText.preparation import tokenizer_training
from tests.unit.preparation.conftest import BASE


@pytest.fixture
def source(texts, tmp_path):
    rows = [{"content": text[start : start + 2000]} for text in texts for start in range(0, len(text), 2000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{tmp_path / 'a.jsonl'}"


def run(**keys):
    lines: list[str] = []
    config = pyconfig.initialize([BASE, "run_name=x", *(f"{key}={value}" for key, value in keys.items())], {})
    assert tokenizer_training.train(config, lines.append) == 0
    return lines


@pytest.mark.parametrize("rules", ["code", "starcoder2", "qwen", "sentencepiece"])
@pytest.mark.filterwarnings("ignore:tokenizer_path=.*does not reproduce text exactly")
def test_every_kind_is_trained_and_the_same_again(rules, source, tmp_path, tokenizer_path):
    settings = {"source": source, "vocab_size": 700, "tokenizer_rules": rules}
    lines = run(**settings, out=tmp_path / "one", compare_with=tokenizer_path)
    run(**settings, out=tmp_path / "two")
    name = "tokenizer.model" if rules == "sentencepiece" else "tokenizer.json"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    report = json.loads((tmp_path / "one/report.json").read_text())
    ours, other = report["rows"]
    assert ours["vocab_size"] == 700 and other["vocab_size"] == 500
    assert ours["heldout_bytes_per_token"] > 2 and ours["train_exact"] == 1
    assert any(tokenizer_path in line and "500 |" in line for line in lines)
    loaded = tokenizer.load(str(tmp_path / "one" / (name if rules == "sentencepiece" else "")))
    assert set(loaded.special_ids) == set(tokenizer.ROLES)


def test_the_rules_differ_in_what_they_join(texts, tmp_path):
    """Ours joins punctuation, newline and indentation; no rule joins digits."""
    pieces = {}
    for rules in ("code", "starcoder2", "qwen"):
        tokenizer.train(texts, 2000, tmp_path / rules, rules)
        loaded = tokenizer.load(str(tmp_path / rules))
        pieces[rules] = [loaded.decode([i]) for i in range(8, loaded.vocab_size)]
        assert not [piece for piece in pieces[rules] if sum(map(str.isdigit, piece)) > 1]
    assert "):\n        " in pieces["code"]
    assert "):\n" in pieces["qwen"] and "):\n        " not in pieces["qwen"]
    assert "):\n" not in pieces["starcoder2"] and "):" in pieces["starcoder2"]


def test_settings_that_will_not_do(source, tmp_path, tokenizer_path):
    with pytest.raises(ValueError, match="both are needed, such as source=embedded"):
        run(source=source)
    with pytest.raises(ValueError, match="is not empty; give another directory"):
        run(source=source, out=tokenizer_path, vocab_size=500)
    with pytest.raises(ValueError, match="SentencePiece says"):
        run(source=source, out=tmp_path / "x", vocab_size=10**6, tokenizer_rules="sentencepiece")
