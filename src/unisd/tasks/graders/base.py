"""What graders have in common: an answer is looked for, chosen among candidates, and compared.

A grader reads gold first (`read_gold`: what it cannot read is refused before anything runs), then
the completion (`read`: all candidates, best first, and which of them the completion settles on),
and compares the two (`equal`). No grader raises, whatever the completion, and each takes time
linear in its length: an answer is looked for in what a model writes last, `TAIL` characters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any

from unisd.data.thoughts import answer_of
from unisd.errors import UserError
from unisd.files import parsed
from unisd.tasks.base import Grade

TAIL = 20_000  # characters
SHOWN = 20  # candidates that a grade keeps for its explanation


@dataclass(frozen=True)
class Candidate:
    """An answer that a completion may give: as written, as compared, and how it was found.

    `how` is one of "final marker", "stated", "boxed", "last line", "mention", or the grader's own.
    `why_not` says why it cannot be the answer, whatever its rank ("a question", "rejected").
    """

    text: str
    value: Any
    how: str
    why_not: str = ""


@dataclass(frozen=True)
class Reading:
    """What a completion settles on.

    candidates: all that were found, best first.
    chosen: the one that it settles on; None where it settles on none.
    hedge: why it settles on none although there are candidates ("B or C"); "" otherwise.
    """

    candidates: tuple[Candidate, ...] = ()
    chosen: Candidate | None = None
    hedge: str = ""


class Grader:
    """The base class of named graders; an instance is called as `grader(completion, gold)`."""

    name: str = ""
    takes: str = "a text"
    """What gold must be, for the message that refuses another."""

    def read_gold(self, value: object) -> Any:
        """Parse gold into what `equal` compares with.

        Raises:
            UserError: gold is nothing that this grader can compare with; says what it takes.
        """
        raise NotImplementedError

    def gold_of(self, row: Mapping[str, Any], answer: object) -> object:
        """Gold with what else of a user's row belongs to it, in a form that `read_gold` takes."""
        return answer

    def read(self, completion: str) -> Reading:
        """Find the answer of a completion; never raises."""
        raise NotImplementedError

    def equal(self, value: Any, gold: Any) -> bool:
        """Whether a candidate's value is the parsed gold; never raises."""
        raise NotImplementedError

    def grade(self, completion: str, gold: Any) -> Grade:
        """Judge a completion by parsed gold; what it thought before its answer is not looked at."""
        return self.judged(self.read(answer_of(completion)), gold)

    def judged(self, found: Reading, gold: Any) -> Grade:
        """Judge what a completion settles on by parsed gold."""
        passed = passed_over(found)
        if found.chosen is None:
            reason = found.hedge or "no answer found"
            return Grade(False, None, reason, ambiguous=bool(found.hedge), passed_over=passed)
        correct = self.equal(found.chosen.value, gold)
        taken, how = found.chosen.text, found.chosen.how
        return Grade(correct, taken, "" if correct else "wrong", how=how, passed_over=passed)

    def __call__(self, completion: object, gold: object) -> Grade:
        """Judge a completion by gold as it was given.

        Raises:
            UserError: gold cannot be read.
        """
        return self.grade(as_text(completion), self.read_gold(gold))


class AliasGrader(Grader):
    """A grader whose gold may be several answers, each of which is right.

    They are a list, an object that holds one (`{"value": ..., "aliases": [...]}`,
    `{"text": [...]}`), or, where `reads_json_lists`, a list as JSON text.
    """

    reads_json_lists: bool = False

    def read_one(self, value: object) -> Any:
        """Parse one answer of gold; raises `UserError` as `read_gold`."""
        raise NotImplementedError

    def same(self, value: Any, gold: Any) -> bool:
        """Whether a candidate's value is one parsed answer of gold; never raises."""
        raise NotImplementedError

    def read_gold(self, value: object) -> tuple[Any, ...]:
        listed = aliases(value, self.reads_json_lists)
        if not listed:
            raise self.refuse(value)
        return tuple(self.read_one(one) for one in listed)

    def equal(self, value: Any, gold: Any) -> bool:
        return any(self.same(value, one) for one in gold)

    def refuse(self, value: object) -> UserError:
        """The error for gold that this grader cannot compare with."""
        return UserError(f"gold {shown(value)} is not {self.takes}: {self.remedy}")

    remedy: str = "give a text, or a list of them"


ALIAS_KEYS = ("value", "aliases", "text", "answer", "answers")
"""Names under which published data sets keep answers in an object; others are not looked at."""


def aliases(value: object, from_json: bool = False) -> list[object]:
    """All answers that a gold holds, in order; none where it holds nothing, or what is no answer.

    from_json: whether a text that is a JSON list stands for that list.
    """
    if isinstance(value, str):
        if from_json and value.lstrip()[:1] == "[" and isinstance(listed := parsed(value), list):
            return aliases(listed)
        return [value] if value.strip() else []
    if isinstance(value, dict):
        found = [one for key in ALIAS_KEYS if key in value for one in aliases(value[key])]
        return list(dict.fromkeys(found))
    if hasattr(value, "tolist"):  # an array, or one of its numbers
        return aliases(value.tolist())
    if isinstance(value, (list, tuple)):
        parts = [aliases(one) if not isinstance(one, (list, tuple, dict)) else [] for one in value]
        return [one for part in parts for one in part] if all(parts) else []
    if isinstance(value, (Decimal, date)):  # of tables with types
        return aliases(str(value))
    missing = value is None or (isinstance(value, float) and not math.isfinite(value))
    return [] if missing or not isinstance(value, (bool, int, float)) else [value]


def passed_over(found: Reading) -> tuple[tuple[str, str, str], ...]:
    """The candidates that were not taken: as written, how found, why not."""
    taken = found.chosen
    others = [one for one in found.candidates if one is not taken][:SHOWN]

    def why(one: Candidate) -> str:
        if one.why_not or taken is None:
            return one.why_not or "nothing was settled on"
        return f"{taken.how} ranks before {one.how}" if taken.how != one.how else "another one was chosen"

    return tuple((shortened(one.text), one.how, why(one)) for one in others)


def shortened(text: str, most: int = 80) -> str:
    """A text on one line, cut where it is longer than `most` characters."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most else line[: most - 3] + "..."


def shown(value: object) -> str:
    """A value as messages show it, on one line."""
    return shortened(repr(value))


def as_text(value: object) -> str:
    """A value as the text that is looked at; nothing is an empty one."""
    return value if isinstance(value, str) else "" if value is None else str(value)
