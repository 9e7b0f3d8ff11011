"""Grades many completions and sums up: shares with 95 % intervals; no model is needed."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from unisd.data.thoughts import answer_of
from unisd.errors import RolloutError, UserError, first_line
from unisd.processes import cores
from unisd.tasks.base import Grade, Row, as_grade

BOOTSTRAP = 2000  # resamples of an interval
Z95 = 1.959963984540054  # standard deviations to each side of a 95 % interval
Interval = dict[str, Any]


def grade_many(
    grade: Callable[[Row, str], Grade | bool],
    rows: Sequence[Row],
    completions: Sequence[str],
    on_done: Callable[[int], None] = lambda count: None,
) -> list[Grade]:
    """Grade each completion, in their order; as many at once as there are cores.

    The grader sees what follows a thought: nothing, where this has not ended. A program runs in a
    process of its own.

    Raises:
        RolloutError: the grader raised, or gave what is no verdict; of a training its finished
            steps are kept.
    """

    def one(pair: tuple[Row, str]) -> Grade:
        row, text = pair
        try:
            found = as_grade(grade(row, answer_of(text)))
        except UserError as error:
            raise RolloutError(f"row {row.get('id')}: {error}") from None
        except Exception as error:
            told = f"the grader raised {type(error).__name__}: {first_line(error)}"
            raise RolloutError(f"row {row.get('id')}: {told}") from error
        on_done(1)
        return found

    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(one, zip(rows, completions, strict=True)))


def wilson(correct: float, n: int) -> Interval:
    """A share with its 95 % Wilson interval: `{"value", "low", "high", "n"}`.

    NaN, 0 and 1 for n = 0.
    """
    if n == 0:
        return {"value": math.nan, "low": 0.0, "high": 1.0, "n": 0}
    share, z = correct / n, Z95
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return {"value": share, "low": max(0.0, centre - half), "high": min(1.0, centre + half), "n": n}


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """A mean of shares over rows with its 95 % interval, in the form of `wilson`.

    It is a percentile bootstrap over rows; of rows that are all alike, or of fewer than 6, which
    would give a width of 0 or next to it, Wilson's interval (it holds for any shares of that mean).
    """
    n = len(values)
    if n == 0:
        return wilson(0, 0)
    if n < 6 or len(set(values)) == 1:
        return wilson(sum(values), n)
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(values, k=n)) / n for _ in range(BOOTSTRAP))
    return {
        "value": sum(values) / n,
        "low": means[int(0.025 * BOOTSTRAP)],
        "high": means[int(0.975 * BOOTSTRAP)],
        "n": n,
    }


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Estimate the chance that one of `k` samples is right (Chen et al., 2021).

    The samples are drawn from `n` without putting back; the estimate is unbiased.
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def summarize(rows: Sequence[Row], grades: Sequence[Sequence[Grade]]) -> dict[str, Any]:
    """Figures of graded answers, one or several a row.

    Returns:
        `accuracy` (one answer a row: Wilson; several: mean share of right ones, bootstrap),
        `by_skill`, `extraction_rate` (share of answers in which an answer was found), `outcomes`
        (how many are right, wrong, unanswered and ambiguous), `details` (means of the graders'
        further figures), and `pass_at_k` by k where rows have several answers. Shares and means
        are `{"value", "low", "high", "n"}`.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row.get("skill") not in (None, ""):
            groups[str(row["skill"])].append(i)

    def share(chosen: Iterable[int]) -> Interval:
        picked = [grades[i] for i in chosen]
        if all(len(answers) == 1 for answers in picked):
            return wilson(sum(answers[0].correct for answers in picked), len(picked))
        return bootstrap([sum(map(bool, answers)) / len(answers) for answers in picked])

    answers = [answer for row_answers in grades for answer in row_answers]
    found = {
        "accuracy": share(range(len(rows))),
        "by_skill": {name: share(chosen) for name, chosen in sorted(groups.items())},
        "extraction_rate": wilson(sum(answer.extracted is not None for answer in answers), len(answers)),
        "outcomes": outcomes(answers),
        "details": mean_details(answers),
    }
    most = min((len(row_answers) for row_answers in grades), default=1)
    if most > 1:
        counts = [(len(row_answers), sum(map(bool, row_answers))) for row_answers in grades]
        ks = [k for k in (1, 2, 5, 10, 20, 50, 100) if k <= most]
        found["pass_at_k"] = {str(k): bootstrap([pass_at_k(n, c, k) for n, c in counts]) for k in ks}
    return found


def mean_details(grades: Sequence[Grade]) -> dict[str, Interval]:
    """Means of the graders' further figures, by their names."""
    names = sorted({name for grade in grades for name in grade.details})
    return {name: bootstrap([grade.details.get(name, 0.0) for grade in grades]) for name in names}


OUTCOMES = ("right", "wrong", "unanswered", "ambiguous")


def outcomes(grades: Iterable[Grade]) -> dict[str, int]:
    """How many answers are right, wrong, unanswered and ambiguous."""
    counted = Counter(grade.outcome for grade in grades)
    return {name: counted[name] for name in OUTCOMES}


def unsettled(counts: dict[str, int] | None) -> str:
    """Say how many answers settle on nothing; "" where all do."""
    parts = [f"{counts[name]} {name}" for name in OUTCOMES[2:] if counts[name]] if counts else []
    return ", ".join(parts)


def unsettled_lines(before: dict[str, Any], after: dict[str, Any]) -> list[list[str]]:
    """Lines of a table of before and after: undecided answers, where there are any."""
    lines = []
    for name in ("task", "retention"):
        counts = [side.get(f"{name}_outcomes") for side in (before, after)]
        sides = [unsettled(of_side) for of_side in counts]
        if any(sides):
            shown = [
                "-" if of_side is None else said or "0" for of_side, said in zip(counts, sides, strict=True)
            ]
            lines.append([f"{name} undecided answers", *shown, ""])
    return lines


def percent(share: Interval | None) -> str:
    """`62.3 % [57.1, 67.0]`; what was not measured is a dash."""
    if share is None:
        return "-"
    value, low, high = (100 * share[name] for name in ("value", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def detail_lines(before: dict[str, Any], after: dict[str, Any]) -> list[list[str]]:
    """Lines of a table of before and after: means of the graders' further figures."""
    lines = []
    for part in ("task", "retention"):
        old, new = (side.get(f"{part}_details") or {} for side in (before, after))
        for name in (name for name in new if name in old):
            change = f"{100 * (new[name]['value'] - old[name]['value']):+.1f}"
            lines.append([f"{part} {name.replace('_', ' ')}", percent(old[name]), percent(new[name]), change])
    return lines


def row_results(rows: Sequence[Row], grades: Sequence[Sequence[Grade]]) -> list[dict[str, Any]]:
    """One object an answer: `id`, `correct`, `outcome`, `score`, `extracted`, `how`, `reason`, ...


    The details are the grader's.
    """
    return [
        {
            "id": row["id"],
            "correct": answer.correct,
            "outcome": answer.outcome,
            "score": answer.share,
            "extracted": answer.extracted,
            "how": answer.how,
            "reason": answer.reason
            or ("" if answer.correct else "wrong" if answer.extracted is not None else "no answer found"),
            **answer.details,
        }
        for row, answers in zip(rows, grades, strict=True)
        for answer in answers
    ]
