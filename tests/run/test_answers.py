"""Answers before and after: which are kept, in what order, and how a terminal shows them."""

from __future__ import annotations

from typing import Any

from rich.cells import cell_len

from unisd.evaluation.grading import detail_lines, wilson
from unisd.run import answers


def example(name: str, texts: tuple[str, str], correct: tuple[Any, Any] = (None, None)) -> dict[str, Any]:
    sides = [{"text": text, "correct": mark, "reason": ""} for text, mark in zip(texts, correct, strict=True)]
    return {"id": name, "prompt": name, "reference": "", "before": sides[0], "after": sides[1]}


def test_texts_are_kept_by_default_and_as_asked() -> None:
    assert (answers.kept(None, True), answers.kept(None, False), answers.kept(0, False)) == (64, 24, 0)
    rows = [{"prompt": f"p{n}", "id": n} for n in range(9)]
    part = answers.paired(rows, answers.ungraded(["a", "b"]), answers.ungraded(["a", "c"]))
    assert [one["after"]["text"] for one in part["examples"]] == ["a", "c"] and len(part["ids"]) == 9
    assert part["before"] is None and part["examples"][0]["before"]["correct"] is None


def test_answers_that_changed_come_first_one_of_each_kind() -> None:
    marks = [(True, True), (False, False), (False, True), (False, True), (True, False)]
    graded = [example(f"row{n}", ("x", "y"), pair) for n, pair in enumerate(marks)]
    assert [[one["id"] for one in kind] for kind in answers.by_change(graded)] == [
        ["row4"],
        ["row2", "row3"],
        ["row1"],
        ["row0"],
    ]
    shown = answers.shown({"examples": graded})
    assert shown[0] == "answers before and after training (3 of 5 kept; 5 changed):"
    assert [line.strip() for line in shown if line.startswith("  row")] == ["row4", "row2", "row1"]
    assert shown[2] == "    before, right: x" and shown[3] == "    after, wrong:  y"
    ungraded = [example("same", ("x", "x")), example("other", ("x", "y"))]
    assert [line.strip() for line in answers.shown({"examples": ungraded})[1::3]] == ["other", "same"]
    assert answers.shown({"examples": []}) == []


def test_a_line_fits_a_terminal_and_moves_no_cursor() -> None:
    hostile = ("\x1b[2J\u202e" + "很长的回答 " * 60, "<think>no end")
    lines = answers.shown({"examples": [example("a\nb " * 99, hostile)]})
    assert all(cell_len(line) <= answers.COLUMNS and line.isprintable() for line in lines)
    assert lines[1].endswith("...") and "很长" in lines[2] and lines[3].endswith("(no answer)")


def test_the_graders_figures_are_lines_of_the_table() -> None:
    before, after = {"token_f1": wilson(1, 4)}, {"token_f1": wilson(2, 4)}
    sides = [{"task_details": before, "retention_details": {}}, {"task_details": after}]
    [line] = detail_lines(*sides)
    assert line == ["task token f1", "25.0 % [4.6, 69.9]", "50.0 % [15.0, 85.0]", "+25.0"]
    assert detail_lines({"task_details": None}, {}) == []
