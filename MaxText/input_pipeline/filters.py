"""The rules that keep a source file out of the corpus, each with a name under which the dropped files are counted.

In: the text of one file. Out: the reason to drop it, or None.
"""

MIN_CHARACTERS = 100
MAX_CHARACTERS = 50_000


def drop_reason(text: str) -> str | None:
    """The name of the rule that drops `text`, or None when it is kept (100 < characters < 50,000)."""
    if len(text) <= MIN_CHARACTERS:
        return "too_short"
    if len(text) >= MAX_CHARACTERS:
        return "too_long"
    return None
