"""Token F1 and ROUGE-L against definitions written out, and against `rouge-score` where it is."""

from __future__ import annotations

import random
from functools import cache

import pytest

from unisd import UserError
from unisd.evaluation.grading import grade_many, row_results, summarize
from unisd.rollout.verdicts import as_verdict
from unisd.tasks.graders import GRADERS
from unisd.tasks.graders.similarity import THRESHOLD, rouge_l, token_f1, tokens

SIMILARITY = GRADERS["similarity"]


def common(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence, by its definition."""

    @cache
    def of(i: int, j: int) -> int:
        if i == len(one) or j == len(other):
            return 0
        return 1 + of(i + 1, j + 1) if one[i] == other[j] else max(of(i + 1, j), of(i, j + 1))

    return of(0, 0)


def shared(one: list[str], other: list[str]) -> int:
    """Words that find a partner."""
    left = list(other)
    return sum(word in left and left.remove(word) is None for word in one)


def test_both_figures_are_what_their_definitions_say() -> None:
    rng = random.Random(3)
    for _ in range(300):
        one, other = (rng.choices("abcde", k=rng.randint(1, 30)) for _ in range(2))
        for function, counted in ((token_f1, shared), (rouge_l, common)):
            hits = counted(one, other)
            precision, recall = hits / len(one), hits / len(other)
            wanted = 2 * precision * recall / (precision + recall) if hits else 0.0
            assert function(one, other) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.long
def test_figures_are_those_of_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rougeL"])
    rng = random.Random(4)
    for _ in range(100):
        one, other = (" ".join(rng.choices(["the", "Cat", "sat.", "on"], k=rng.randint(1, 20))) for _ in "ab")
        theirs, ours = scorer.score(other, one), SIMILARITY(one, other).details
        assert ours["token_f1"] == pytest.approx(theirs["rouge1"].fmeasure, abs=1e-12)
        assert ours["rouge_l"] == pytest.approx(theirs["rougeL"].fmeasure, abs=1e-12)


@pytest.mark.parametrize(
    ("completion", "gold", "f1", "rouge"),
    [
        ("The cat sat.", "the CAT sat", 1.0, 1.0),
        ("sat cat the", "the cat sat", 1.0, 1 / 3),  # order counts for ROUGE-L alone
        ("a b", "a b c d e f", 0.5, 0.5),  # the threshold itself is right
        ("a b", "a b c d e f g", 4 / 9, 4 / 9),
        ("那只猫坐着", "那只狗坐着", 0.8, 0.8),
        ("über „alles“", 'Über "alles"', 1.0, 1.0),
        ("<think>a b c d</think>x", "a b c d", 0.0, 0.0),
        ("a b", ["x y", "a b c"], 0.8, 0.8),  # the nearest of several references
    ],
)
def test_scores_and_the_threshold(completion: str, gold: object, f1: float, rouge: float) -> None:
    grade = SIMILARITY(completion, gold)
    assert grade.details == pytest.approx({"token_f1": f1, "rouge_l": rouge})
    assert grade.correct == (f1 >= THRESHOLD) and grade.share == pytest.approx(f1)
    assert grade.correct or f"below {THRESHOLD:g}" in grade.reason


def test_no_answer_and_no_reference() -> None:
    assert SIMILARITY("<think>not yet", "a").outcome == "unanswered"
    assert SIMILARITY(" ", "a").details == {"token_f1": 0.0, "rouge_l": 0.0}
    with pytest.raises(UserError, match="give a text"):
        SIMILARITY("a", "")


def test_the_score_is_the_verdict_and_its_mean_a_figure() -> None:
    rows = [{"id": n} for n in range(2)]
    grades = [
        [grade] for grade in grade_many(lambda row, text: SIMILARITY(text, "a b c"), rows, ["a b c", "a"])
    ]
    verdict = as_verdict(grades[1][0])
    assert verdict is not None and verdict.score == 0.5 and verdict.passed
    assert summarize(rows, grades)["details"]["token_f1"]["value"] == 0.75
    assert [line["score"] for line in row_results(rows, grades)] == [1.0, 0.5]
    far = as_verdict(SIMILARITY("x", "secret words"))
    assert far is not None and far.score == 0 and "secret" not in far.feedback


def test_long_answers_take_no_long_time() -> None:
    many = tokens("a b " * 100_000)
    assert len(many) == 10_000 and rouge_l(many, tokens("b a " * 100_000)) > 0.99
