"""The map of docs/field.md holds every recipe, as its options are."""

from __future__ import annotations

from pathlib import Path

from experiments import five_axes
from unisd import recipes

PAGE = Path(__file__).parents[2] / "docs" / "field.md"


def test_the_map_is_what_the_recipes_say() -> None:
    content = five_axes.content()
    assert content in PAGE.read_text(encoding="utf-8"), "run: python -m experiments.five_axes"
    named = [line.split(" | ")[0].removeprefix("| ") for line in content.splitlines()[2:]]
    assert named == [f"`{name}`" for name in recipes.names()]


def test_passes_and_needs() -> None:
    lines = {
        name: dict(zip(five_axes.HEADINGS, five_axes.line(name), strict=True)) for name in recipes.names()
    }
    found = {name: (lines[name]["passes"], lines[name]["needs"]) for name in lines}
    assert found["sft"] == ("0", "references") and found["ssd"] == ("0", "prompts")
    assert found["unisd-star"] == ("5", "references, other problems, wrong references")
    assert found["sdpo"] == ("1", "a grader") and found["op2sd"] == ("1", "other problems")
    assert lines["dash"]["weight"] == "`dash`" and lines["avsd"]["passes"] == "3"
