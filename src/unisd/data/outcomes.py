"""What follows from the verdicts on a step's answers: which carry loss, what the teacher is told.

A *group* is the answers to one prompt. An answer without a verdict (`passed` is None) has neither
passed nor failed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

KEEPS = ("all", "passed", "failed", "shortest_passed", "mixed_groups")
AFTER_ROLLOUT = ("sibling+feedback", "sibling", "feedback")
"""What `rollout_contexts` may name: made of a step's answers."""
NO_LOSS = "none"
"""The last of `rollout_contexts`: an answer that none of them serves carries no loss."""


@dataclass(frozen=True)
class Outcome:
    """What an answer's group tells its teacher: another one that passed, feedback on this one."""

    sibling: str | None = None
    feedback: str | None = None

    def serves(self, context: str) -> bool:
        """Whether the teacher can be told this one of `AFTER_ROLLOUT`."""
        return all(getattr(self, part) for part in context.split("+"))

    def told(self, context: str) -> Outcome:
        """What of this a context tells."""
        parts = context.split("+")
        return Outcome(*(getattr(self, n) if n in parts else None for n in ("sibling", "feedback")))


def kept(
    groups: Sequence[Hashable], passed: Sequence[bool | None], lengths: Sequence[int], keep: str
) -> list[bool]:
    """Whether each answer carries loss, by `keep` of `KEEPS`.

    `shortest_passed`: of a group's passed answers the shortest, and of equals the first (OASIS,
    arXiv 2609.37915). `mixed_groups`: of groups in which some passed and some failed.

    Args:
        groups: of each answer.
        lengths: of each answer, in tokens.
    """
    if keep in ("passed", "failed"):
        return [p is (keep == "passed") for p in passed]
    if keep == "shortest_passed":
        best = {g: i for i, g in reversed(list(enumerate(groups))) if passed[i]}
        for i, group in enumerate(groups):
            if passed[i] and lengths[i] < lengths[best[group]]:
                best[group] = i
        return [best.get(group) == i for i, group in enumerate(groups)]
    if keep == "mixed_groups":
        found = set(zip(groups, passed, strict=True))
        return [(group, True) in found and (group, False) in found for group in groups]
    return [True] * len(groups)


def siblings(
    groups: Sequence[Hashable],
    passed: Sequence[bool | None],
    lengths: Sequence[int],
    shortest: bool = False,
) -> list[int | None]:
    """For each answer the place of a passed answer of its group, never its own; None: there is
    none.

    The first one, or the shortest.
    """
    places: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        if passed[i]:
            places.setdefault(group, []).append(i)
    if shortest:
        places = {group: sorted(found, key=lambda i: (lengths[i], i)) for group, found in places.items()}
    return [next((j for j in places.get(group, []) if j != i), None) for i, group in enumerate(groups)]
