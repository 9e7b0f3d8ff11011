"""List the views: what each pass of the scoring phase reads, and which scores come of it.

A *view* is a completion behind one of its request's prompts, read by one set of weights. Which
views a run scores follows from its needs and its target's sources (:func:`scored_views`). A new
statistic of a view is a field of :class:`unisd.methods.scores.StepScores` and a reading here; a new
view is a `View` here, in `scored_views`, and its prompt in :mod:`unisd.scoring.requests`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from unisd.methods.scores import NEED_OF
from unisd.methods.targets import NEGATIVE, Source
from unisd.scoring.requests import ScoreRequest


@dataclass(frozen=True)
class Reading:
    """Names the scores that one projection of a view's states to the vocabulary fills in."""

    logp: str  # log-probability of the realised tokens
    entropy: str | None = None
    tempered: bool = True  # at the distillation temperature; else at 1


@dataclass(frozen=True)
class Comparison:
    """Names the scores that a comparison of a view with the teacher fills in, token by token."""

    logp: str
    divergence: str


@dataclass(frozen=True)
class View:
    """Says what one kind of pass reads, under which weights, and what it fills in."""

    name: str
    prompts: Callable[[ScoreRequest], Sequence[list[int] | None]]  # None: the row has no such view
    weights: str = "teacher"
    needs: frozenset[str] = frozenset()  # any of which asks for the pass; none: it is always made
    readings: tuple[Reading, ...] = ()
    present: str | None = None  # the score that says which rows have the view
    compared: Comparison | None = None  # in place of the readings, where its divergence is needed
    keeps_states: bool = False  # the final hidden states stay on the device
    keeps_layers: bool = False  # and those of the layers in `feature_layers`


TEACHER = View(
    "teacher",
    lambda request: [request.teacher],
    readings=(
        Reading("teacher_logp", "teacher_entropy"),
        Reading("untempered_logp", tempered=False),
    ),
    keeps_states=True,
    keeps_layers=True,
)
WRONG_REFERENCE = View(
    "negative",
    lambda request: [request.negative],
    needs=frozenset({"negative"}),
    readings=(Reading("negative_logp"),),
    present="negative_present",
    compared=Comparison("negative_logp", "negative_divergence"),
)
AUXILIARY = View(
    "auxiliary",
    lambda request: request.auxiliary,
    needs=frozenset({"auxiliary"}),
    readings=(Reading("auxiliary_logp", tempered=False),),
    present="auxiliary_present",
)
STUDENT = View(
    "student",
    lambda request: [request.student],
    weights="student",
    needs=frozenset({"student", "divergence"}),
    compared=Comparison("student_logp", "divergence"),
)


def of_source(source: Source, realised: bool) -> View:
    """The view of a target's source; `realised`: one number per token is enough of it."""
    if source == NEGATIVE:  # read for the contrast already
        return replace(WRONG_REFERENCE, keeps_states=not realised)
    return View(
        str(source),
        lambda request: [request.sources.get(source)],
        weights=source.weights,
        readings=(Reading(str(source)),) if realised else (),
        keeps_states=not realised,
    )


def scored_views(needs: Collection[str], sources: Sequence[Source], realised: bool) -> list[View]:
    """The views that a run scores before the student's own."""
    of_sources = {source: of_source(source, realised) for source in sources}
    views = [TEACHER]
    if WRONG_REFERENCE.needs & set(needs):
        views.append(_compared_if_needed(of_sources.pop(NEGATIVE, WRONG_REFERENCE), needs))
    views += of_sources.values()
    if AUXILIARY.needs & set(needs):
        views.append(AUXILIARY)
    return views


def _compared_if_needed(view: View, needs: Collection[str]) -> View:
    """Keep its states for a divergence, which also gives the log-prob, in place of the readings."""
    if view.compared is None or NEED_OF[view.compared.divergence] not in needs:
        return view
    return replace(view, readings=(), keeps_states=True)
