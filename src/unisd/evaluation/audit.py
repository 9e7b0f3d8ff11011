"""Let a person judge a sample of graded answers, and measure how far the grader agrees.

The sample is a table for a spreadsheet with an empty column `person`; filled in ("right" or
"wrong") it is read again. No file in which that column holds anything is ever overwritten.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unisd.data.text import as_text
from unisd.data.thoughts import answer_of
from unisd.errors import UserError
from unisd.evaluation.explain import explained, wrapped
from unisd.evaluation.grading import OUTCOMES, Interval, wilson
from unisd.files import write_text
from unisd.tasks.base import Grade, Row

SAMPLE = 50  # answers
AT_LEAST = 5  # of each outcome, where there are so many
COLUMNS = ("id", "prompt", "gold", "completion", "candidate", "how", "verdict", "reason", "person")
GOLD_COLUMNS = ("answer", "answers", "gold", "tests", "privileged_context", "completion")


@dataclass(frozen=True)
class Answer:
    """One graded answer; the second one to a row is called `id#2`."""

    name: str
    row: Row
    text: str
    grade: Grade


def answers(
    rows: Sequence[Row], texts: Sequence[Sequence[str]], grades: Sequence[Sequence[Grade]]
) -> list[Answer]:
    """All answers, by name."""

    def each() -> Iterator[Answer]:
        for row, row_texts, row_grades in zip(rows, texts, grades, strict=True):
            for number, (text, grade) in enumerate(zip(row_texts, row_grades, strict=True), 1):
                yield Answer(f"{row['id']}#{number}" if number > 1 else str(row["id"]), row, text, grade)

    return list(each())


def sample(found: Sequence[Answer], size: int = SAMPLE, seed: int = 0) -> list[Answer]:
    """Draw answers: a few of each outcome, the rest as they come; in their order."""
    rng = random.Random(seed)
    order = rng.sample(range(len(found)), len(found))
    chosen: set[int] = set()
    for outcome in OUTCOMES:
        chosen |= set([i for i in order if found[i].grade.outcome == outcome][:AT_LEAST])
    chosen |= set([i for i in order if i not in chosen][: max(0, size - len(chosen))])
    return [found[i] for i in sorted(chosen)]


def write_sample(path: str, found: Sequence[Answer]) -> None:
    """Write the table that a person fills in."""
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    table.writerow(COLUMNS)
    for one in found:
        values = (one.row[name] for name in GOLD_COLUMNS if one.row.get(name) not in (None, "", []))
        gold = next(values, "")
        table.writerow(
            (
                one.name, as_text(one.row["prompt"])[:500],
                gold if isinstance(gold, str) else json.dumps(gold, ensure_ascii=False, default=str),
                one.text, one.grade.extracted or "", one.grade.how, one.grade.outcome, one.grade.reason, "",
            )
        )  # fmt: skip
    write_text(path, stream.getvalue().encode("utf-8", "replace").decode())


def read_verdicts(path: str) -> dict[str, dict[str, str]] | None:
    """The lines in which a person has written something, by name; None where there is no file.

    Raises:
        UserError: the file is no such table, or a person wrote neither right nor wrong.
    """
    if not Path(path).exists():
        return None
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--audit {path} cannot be read ({error}): save it as CSV in UTF-8.") from None
    csv.field_size_limit(2**30)
    for separator in (",", ";", "\t"):  # a spreadsheet may write another one
        lines = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator))
        if lines and {"id", "completion", "person"} <= set(lines[0]):
            break
    else:
        raise UserError(
            f"--audit {path} exists and is not a table of an audit (columns {', '.join(COLUMNS)}): name"
            " another"
            " file."
        )
    filled = {}
    for number, line in enumerate(lines):
        said = (line["person"] or "").strip().lower()
        if not said:
            continue
        if said not in ("right", "wrong"):
            raise UserError(f"{path}, row {number}: person is {said!r}: write right or wrong, or nothing.")
        if line["id"] in filled:
            raise UserError(f"{path}, row {number}: id {line['id']!r} is there twice: remove one.")
        filled[line["id"]] = {**line, "person": said, "of": str(len(lines))}
    return filled


@dataclass(frozen=True)
class Agreement:
    """How far a grader and a person agree; `kappa` is None where one kind of verdict is all."""

    agree: Interval
    kappa: float | None
    disagreements: list[tuple[Answer, str]]
    """Answers with what the person says of them."""


def agreement(path: str, verdicts: dict[str, dict[str, str]], found: Sequence[Answer]) -> Agreement:
    """Compare a person's verdicts with the grader's of today.

    Raises:
        UserError: a line that is not about one of these answers.
    """
    by_name = {one.name: one for one in found}
    pairs: list[tuple[Answer, str]] = []
    for name, line in verdicts.items():
        answer = by_name.get(name)
        if answer is None:
            raise UserError(f"{path}: id {name!r} is not among the completions: give those it was made from.")
        if _letters(line["completion"]) not in (_letters(answer.text), _letters(answer_of(answer.text))):
            raise UserError(
                f"{path}: id {name!r} holds another completion: give the completions that it was made from."
            )
        pairs.append((answer, line["person"]))
    n = len(pairs)
    same = sum(one.grade.correct == (said == "right") for one, said in pairs)
    graded, person = (
        sum(one.grade.correct for one, _ in pairs) / n,
        sum(said == "right" for _, said in pairs) / n,
    )
    chance = graded * person + (1 - graded) * (1 - person)
    kappa = (same / n - chance) / (1 - chance) if chance < 1 else None
    return Agreement(
        wilson(same, n), kappa, [pair for pair in pairs if pair[0].grade.correct != (pair[1] == "right")]
    )


def _letters(text: str) -> str:
    """What a spreadsheet leaves of a text as it is."""
    return re.sub(r"\W+", "", text)[:2000]


def verdict_lines(found: Agreement, of: Any) -> list[str]:
    """Say the agreement, and the answers on which there is none."""
    value, low, high = (100 * found.agree[key] for key in ("value", "low", "high"))
    kappa = "not defined (verdicts of one kind)" if found.kappa is None else f"{found.kappa:.2f}"
    lines = wrapped(
        f"grader and person agree on {value:.1f} % [{low:.1f}, {high:.1f}] of {found.agree['n']} answers"
        f" ({of} in the file); Cohen's kappa {kappa}"
    )
    for one, said in found.disagreements:
        lines += ["", *wrapped(f"{one.name}: person says {said}, grader {one.grade.outcome}")]
        lines += explained(one.grade)
    return lines
