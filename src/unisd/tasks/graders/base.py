"""What graders have in common: an answer is looked for, chosen among candidates, and compared.

A grader reads gold first (`read_gold`: what it cannot read is refused before anything runs), then
the completion (`read`: all candidates, best first, and which of them the completion settles on),
and compares the two (`equal`). No grader raises, whatever the completion, and each takes time
linear in its length: an answer is looked for in what a model writes last, `TAIL` characters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unisd.tasks.base import Grade

TAIL = 20_000  # characters


@dataclass(frozen=True)
class Candidate:
    """An answer that a completion may give: as written, as compared, and how it was found.

    `how` is one of "final marker", "stated", "boxed", "last line", "mention", or the grader's own.
    """

    text: str
    value: Any
    how: str


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

    def read(self, completion: str) -> Reading:
        """Find the answer of a completion; never raises."""
        raise NotImplementedError

    def equal(self, value: Any, gold: Any) -> bool:
        """Whether a candidate's value is the parsed gold; never raises."""
        raise NotImplementedError

    def grade(self, completion: str, gold: Any) -> Grade:
        """Judge a completion by parsed gold."""
        found = self.read(completion)
        if found.chosen is None:
            return Grade(False, None, found.hedge or "no answer found", ambiguous=bool(found.hedge))
        correct = self.equal(found.chosen.value, gold)
        return Grade(correct, found.chosen.text, "" if correct else "wrong", how=found.chosen.how)

    def __call__(self, completion: object, gold: object) -> Grade:
        """Judge a completion by gold as it was given.

        Raises:
            UserError: gold cannot be read.
        """
        return self.grade(as_text(completion), self.read_gold(gold))


def as_text(value: object) -> str:
    """A value as the text that is looked at; nothing is an empty one."""
    return value if isinstance(value, str) else "" if value is None else str(value)
