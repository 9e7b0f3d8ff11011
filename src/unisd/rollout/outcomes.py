"""What follows from the verdicts on a step's answers: which carry loss, and what the teacher is told.

A *group* is the answers to one prompt. An answer without a verdict has neither passed nor failed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from unisd.tasks.base import Verdict

KEEPS = ("all", "passed", "failed", "shortest_passed", "mixed_groups")
AFTER_ROLLOUT = ("sibling+feedback", "sibling", "feedback")
"""Levels of `teacher_context` that are made of a step's answers."""


@dataclass(frozen=True)
class Outcome:
    """What an answer's own group tells its teacher: a passed answer of another, feedback on this."""

    sibling: str | None = None
    feedback: str | None = None

    def serves(self, level: str) -> bool:
        """Whether the teacher can be told this level of `AFTER_ROLLOUT`."""
        return all(getattr(self, part) for part in level.split("+"))


def kept(
    groups: Sequence[Hashable], verdicts: Sequence[Verdict | None], lengths: Sequence[int], keep: str
) -> list[bool]:
    """Whether each answer carries loss, by `keep` of `KEEPS`.

    `shortest_passed`: of a group's passed answers the shortest, and of equals the first (OASIS,
    arXiv 2609.37915). `mixed_groups`: of groups in which some passed and some failed.

    Args:
        groups: of each answer.
        lengths: of each answer, in tokens.
    """
    passed = [verdict is not None and verdict.passed for verdict in verdicts]
    failed = [verdict is not None and not verdict.passed for verdict in verdicts]
    if keep == "passed":
        return passed
    if keep == "failed":
        return failed
    if keep == "shortest_passed":
        best = {g: i for i, g in reversed(list(enumerate(groups))) if passed[i]}
        for i, group in enumerate(groups):
            if passed[i] and lengths[i] < lengths[best[group]]:
                best[group] = i
        return [best.get(group) == i for i, group in enumerate(groups)]
    if keep == "mixed_groups":
        mixed = {g for g, p in zip(groups, passed, strict=True) if p} & {
            g for g, f in zip(groups, failed, strict=True) if f
        }
        return [group in mixed for group in groups]
    return [True] * len(groups)


def siblings(
    groups: Sequence[Hashable],
    verdicts: Sequence[Verdict | None],
    lengths: Sequence[int],
    shortest: bool = False,
) -> list[int | None]:
    """For each answer the place of a passed answer of its group, never its own; None: there is
    none.

    The first one, or the shortest.
    """
    places: dict[Hashable, list[int]] = {}
    for i, (group, verdict) in enumerate(zip(groups, verdicts, strict=True)):
        if verdict is not None and verdict.passed:
            places.setdefault(group, []).append(i)
    if shortest:
        places = {group: sorted(found, key=lambda i: (lengths[i], i)) for group, found in places.items()}
    return [next((j for j in places.get(group, []) if j != i), None) for i, group in enumerate(groups)]
