"""What the fields of `StepScores` say of themselves, and what follows from it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from unisd.errors import UserError
from unisd.methods.scores import DIMS, NEED_OF, NEEDS, StepScores, concatenate, select
from unisd.methods.targets import NEGATIVE, STUDENT, Source, parse_target
from unisd.scoring.views import AUXILIARY, TEACHER, WRONG_REFERENCE, scored_views
from unisd.scoring.views import STUDENT as STUDENT_VIEW

DOCS = Path(__file__).parents[2] / "docs" / "field.md"


def test_docs_list_the_fields() -> None:
    lines = ["| field | shape | meaning | need |", "|---|---|---|---|"]
    for item in fields(StepScores):
        dims, what, need = (item.metadata[key] for key in ("dims", "what", "need"))
        what = what.replace("|", "\\|")
        tail = f" `{need}` |" if need else " |"
        lines.append(f"| `{item.name}` | `[{','.join(dims)}]` | {what} |{tail}")
    table = "\n".join(lines)
    assert table in DOCS.read_text(encoding="utf-8"), f"docs/field.md lacks this table:\n{table}"


def scores(B: int, T: int, K: int) -> StepScores:
    """Distinct numbers in every field."""
    size, names = {"B": B, "T": T, "K": K}, DIMS.items()
    shapes = {name: [size[dim] for dim in dims] for name, dims in names}
    return StepScores(**{name: torch.randn(shape) for name, shape in shapes.items()})  # type: ignore[arg-type]


def test_rows_are_selected_and_stacked() -> None:
    parts = [scores(2, 3, 1), scores(1, 5, 2)]
    whole = concatenate(parts)
    for name, dims in DIMS.items():
        value = getattr(whole, name)
        assert list(value.shape) == [{"B": 3, "T": 5, "K": 2}[dim] for dim in dims]
        for rows, part in ((slice(0, 2), parts[0]), (slice(2, 3), parts[1])):
            own = getattr(part, name)
            found = getattr(select(whole, torch.arange(3)[rows]), name)
            inside = tuple(map(slice, own.shape))
            assert torch.equal(found[inside], own)
            assert found.count_nonzero() == own.count_nonzero()  # the rest is padding
    assert concatenate([StepScores(part.mask, part.tokens) for part in parts]).divergence is None


def test_every_need_is_served_by_a_view() -> None:
    """A statistic that no pass fills would be zeros, and look like a score."""
    filled = set()
    for view in (TEACHER, WRONG_REFERENCE, AUXILIARY, STUDENT_VIEW):
        filled |= {name for reading in view.readings for name in (reading.logp, reading.entropy)}
        filled |= {view.present, *(vars(view.compared).values() if view.compared else ())}
    # what became of an answer is known before any pass
    of_passes = {name for name, need in NEED_OF.items() if need not in (None, "verdict")}
    assert filled - {None} == of_passes


def test_views_follow_from_needs_and_sources() -> None:
    sources = [Source("teacher", "plain"), NEGATIVE, Source("base", "plain")]
    assert scored_views(frozenset(), (), False) == [TEACHER]
    names = [view.name for view in scored_views(NEEDS, sources, False)]
    assert names == ["teacher", "negative", "teacher/plain", "base/plain", "auxiliary"]
    for needs, realised, projected in (
        ({"negative"}, True, True),
        ({"negative"}, False, True),
        ({"negative", "contrast"}, False, False),
    ):
        wrong = scored_views(needs, sources, realised)[1]
        assert bool(wrong.readings) == projected and wrong.keeps_states == (not realised)


@pytest.mark.parametrize("text", ["teacher", "teacher/", "student/full", "rival/plain", "base/whole"])
def test_sources_that_nobody_offers(text: str) -> None:
    with pytest.raises(UserError, match=f"^target 'geometric': unknown source '{text}': use weights/context"):
        parse_target(f"geometric:source={text}")


def test_a_source_is_spelled_as_users_do() -> None:
    assert str(Source.parse("step/full")) == "step/full"
    assert Source.parse("student/plain") == STUDENT and str(NEGATIVE) == "teacher/negative"
