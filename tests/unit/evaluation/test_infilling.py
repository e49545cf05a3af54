"""Gaps in held-out files: where they are, that they depend on the text alone, and how a filling is scored."""

import ast
import textwrap

import pytest

from MaxText.evaluation import grading, infilling

TEXTS = [
    textwrap.dedent(
        f'''
        """Module {index}."""
        import os

        LIMIT = {index}

        def small(): return 1

        def total(values):
            """Add them up.

            All of them.
            """
            # start at nothing
            result = {index}
            for value in values:
                # only the large ones
                if value > LIMIT:
                    result += value

            return result
        '''
    )
    for index in range(40)
]


def build(texts=TEXTS, num_problems=20, max_lines=1, context_characters=60, seed=0):
    return infilling.build(texts, num_problems, max_lines, context_characters, seed)


@pytest.mark.parametrize("max_lines", [1, 4])
def test_the_parts_make_the_text_and_the_gap_is_code_of_a_body(max_lines: int):
    task, sizes = build(max_lines=max_lines), set()
    for gap in task.gaps:
        text = gap.prefix + gap.middle + gap.suffix
        assert text in TEXTS
        assert gap.prefix.endswith("\n") and gap.suffix.startswith("\n")
        lines = gap.middle.split("\n")
        sizes.add(len(lines))
        first = gap.prefix.count("\n") + 1
        body = ast.parse(text).body[-1].body[1:]
        assert body[0].lineno - 1 <= first and first + len(lines) - 1 <= body[-1].end_lineno
        assert lines[0].strip() and not lines[0].strip().startswith("#") and lines[-1].strip()
    assert sizes == ({1} if max_lines == 1 else {2, 3, 4})


@pytest.mark.parametrize("max_lines", [1, 4])
def test_something_stands_after_every_gap(max_lines: int):
    """Also where a text ends with its function and without a newline."""
    texts = [f"def f(x):\n    x += {number}\n    y = x\n    return y" for number in range(40)]
    assert all(gap.suffix for gap in build(texts, num_problems=40, max_lines=max_lines).gaps)


def test_the_choice_is_the_seeds_and_not_the_orders():
    gaps = build().gaps
    assert build(texts=TEXTS[::-1] + TEXTS[:5]).gaps == gaps
    assert build(seed=1).gaps != gaps
    assert build(num_problems=10).gaps == gaps[:10]
    assert len({gap.middle for gap in gaps}) > 3
    assert len(set(build().problem_names)) == 20


def test_a_prompt_holds_so_much_of_the_text_around():
    task = build()
    for index, gap in enumerate(task.gaps):
        prefix, suffix = task.prompt(index)
        assert len(prefix) == 60 and gap.prefix.endswith(prefix)
        assert len(suffix) == min(60, len(gap.suffix)) and gap.suffix.startswith(suffix)


def test_what_decides_the_scores_is_described():
    assert build().description != build(seed=1).description
    assert (build().name, build(max_lines=3).name) == ("infilling_single_line", "infilling_multi_line")


@pytest.mark.parametrize("max_lines", [1, 3])
def test_a_filling_is_scored(box, max_lines: int):
    task = build(num_problems=2, max_lines=max_lines)
    middle = task.gaps[0].middle
    first = middle.split("\n")[0]
    indentation = first[: len(first) - len(first.lstrip())]
    for completion, scores in (
        (middle, (True, True, True)),
        (middle + "  ", (True, True, True)),
        (indentation + "None", (False, False, True if max_lines == 1 else None)),
        (indentation + "(", (False, False, False)),
        (indentation + "(" * 10**5, (False, False, False)),
        ("", (False, False, None)),
    ):
        grade = task.grade(0, grading.truncate(completion, task.stop), box)
        found = tuple(grade.scores[name] for name in ("exact_match", "line_match", "syntax_valid"))
        assert found[:2] == scores[:2]
        assert scores[2] in (None, found[2]), grade.reason


def test_a_single_line_ends_with_the_line():
    assert grading.truncate("x = 1\ny = 2", build().stop) == "x = 1"
    assert grading.truncate("x = 1\ny = 2", build(max_lines=2).stop) == "x = 1\ny = 2"


def test_too_few_texts_are_refused():
    with pytest.raises(ValueError, match="50 problems of infilling wanted, but only 40 of 40 held-out texts"):
        build(num_problems=50)
    with pytest.raises(ValueError, match="1 problems of infilling wanted, but only 0 of 3"):
        build(texts=["def (", "x = 1\n", "def f(): return 1\n"], num_problems=1)
