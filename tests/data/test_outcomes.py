"""Which answers carry loss and whose are shown, against definitions written out by hand."""

from __future__ import annotations

import random

import pytest

from unisd.data.outcomes import KEEPS, Outcome, kept, siblings

P, F = True, False
GROUPS = [0, 0, 0, 1, 1, 2, 2, 3]
VERDICTS = [F, P, P, F, F, P, None, P]
LENGTHS = [9, 7, 5, 1, 2, 4, 1, 3]


@pytest.mark.parametrize(
    ("keep", "expected"),
    {
        "all": [1, 1, 1, 1, 1, 1, 1, 1],
        "passed": [0, 1, 1, 0, 0, 1, 0, 1],
        "failed": [1, 0, 0, 1, 1, 0, 0, 0],
        "shortest_passed": [0, 0, 1, 0, 0, 1, 0, 1],
        "mixed_groups": [1, 1, 1, 0, 0, 0, 0, 0],
    }.items(),
)
def test_which_answers_carry_loss(keep: str, expected: list[int]) -> None:
    assert kept(GROUPS, VERDICTS, LENGTHS, keep) == [bool(x) for x in expected]


def test_siblings_by_hand() -> None:
    assert siblings(GROUPS, VERDICTS, LENGTHS) == [1, 2, 1, None, None, None, 5, None]
    assert siblings(GROUPS, VERDICTS, LENGTHS, shortest=True) == [2, 2, 1, None, None, None, 5, None]


def test_random_groups_keep_their_promises() -> None:
    generator = random.Random(0)
    for _ in range(300):
        groups = [generator.randrange(4) for _ in range(12)]
        verdicts = [generator.choice([P, F, None]) for _ in groups]
        lengths = [generator.randrange(1, 5) for _ in groups]
        for shortest in (False, True):
            for i, found in enumerate(siblings(groups, verdicts, lengths, shortest)):
                others = [j for j, v in enumerate(verdicts) if v is P and groups[j] == groups[i] and j != i]
                if not others:
                    assert found is None
                    continue
                first = min(others, key=lambda j: (lengths[j], j)) if shortest else min(others)
                assert found == first
        chosen = kept(groups, verdicts, lengths, "shortest_passed")
        for group in set(groups):
            passed = [i for i, v in enumerate(verdicts) if v is P and groups[i] == group]
            assert sum(chosen[i] for i, g in enumerate(groups) if g == group) == bool(passed)
            assert all(lengths[i] == min(lengths[j] for j in passed) for i in passed if chosen[i])
        assert all(len(kept(groups, verdicts, lengths, keep)) == 12 for keep in KEEPS)


def test_what_the_teacher_can_be_told() -> None:
    whole, half, none = Outcome("a", "b"), Outcome(None, "b"), Outcome()
    assert whole.serves("sibling+feedback") and whole.serves("sibling") and whole.serves("feedback")
    assert half.serves("feedback") and not half.serves("sibling+feedback") and not half.serves("sibling")
    assert not none.serves("feedback")
