"""Judge a step's completions: one verdict each, several at once, each within a time limit.

A grader that raises, hangs or returns nonsense gives no verdict: that is told, once a kind, with
the row, and the step goes on. What is left of a grader that hangs is a daemon thread.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from unisd.data.rows import Row
from unisd.data.text import contains, words
from unisd.tasks.base import Grade, Verdict
from unisd.tasks.graders.base import shortened

logger = logging.getLogger(__name__)

Grader = Callable[[Row, str], Any]  # gives a bool, a number in [0, 1], a `Grade` or a `Verdict`
LIMIT_S = 30.0
"""Seconds that a verdict may take."""


class Judge:
    """Asks a grader what became of each completion.

    Args:
        grader: `(row, text) -> bool | float | Grade | Verdict`; the text is what follows a thought.
        limit_s: seconds after which a verdict is given up.
        workers: verdicts that are made at once; default: one a core.
    """

    def __init__(self, grader: Grader, limit_s: float = LIMIT_S, workers: int | None = None) -> None:
        self.grader, self.limit_s = grader, limit_s
        self.workers = workers or os.cpu_count() or 1
        self.failures: Counter[str] = Counter()
        """Verdicts that were not given, and feedback that was taken away, by their kind."""

    def verdicts(self, rows: Sequence[Row], texts: Sequence[str]) -> list[Verdict | None]:
        """The verdict on each text, None where the grader gave none; in their order."""
        found: list[Verdict | None] = [None] * len(rows)
        done: SimpleQueue[tuple[int, Any, Exception | None]] = SimpleQueue()
        waiting, running = list(range(len(rows)))[::-1], dict[int, float]()
        while waiting or running:
            while waiting and len(running) < self.workers:
                place = waiting.pop()
                running[place] = time.monotonic() + self.limit_s
                work = (place, rows[place], texts[place], done)
                threading.Thread(target=self._ask, args=work, daemon=True).start()
            try:
                place, answer, error = done.get(timeout=max(0.0, min(running.values()) - time.monotonic()))
            except Empty:
                for place in [p for p, end in running.items() if end <= time.monotonic()]:
                    del running[place]
                    self._say("hangs", rows[place], f"gave no verdict within {self.limit_s:g} s")
                continue
            if running.pop(place, None) is not None:  # else it comes too late
                found[place] = self._checked(rows[place], answer, error)
        return found

    def _ask(self, place: int, row: Row, text: str, done: SimpleQueue[Any]) -> None:
        try:
            done.put((place, self.grader(row, text), None))
        except Exception as error:
            done.put((place, None, error))

    def _checked(self, row: Row, answer: Any, error: Exception | None) -> Verdict | None:
        if error is not None:
            self._say("raises", row, f"raised {type(error).__name__}: {error}")
            return None
        if answer is None:
            return None
        verdict = as_verdict(answer)
        if verdict is None:
            self._say("nonsense", row, f"gave {answer!r:.80}, a bool or a score from 0 to 1 is needed")
            return None
        if tells_reference(verdict.feedback, row):
            self._say("tells", row, "gave feedback that holds the reference, which is left out")
            return Verdict(verdict.score, verdict.passed)
        return verdict

    def _say(self, kind: str, row: Row, what: str) -> None:
        self.failures[kind] += 1
        if self.failures[kind] == 1:
            logger.warning("The grader %s, for row %s. More of this kind are counted only.", what, row["id"])


def as_verdict(answer: Any) -> Verdict | None:
    """What a grader returned, as a verdict; None for what is none."""
    if isinstance(answer, Verdict):
        return answer if _is_share(answer.score) else None
    if isinstance(answer, Grade):
        return Verdict(float(answer.correct), answer.correct, answer.feedback or _in_words(answer))
    return Verdict(float(answer), float(answer) == 1.0) if _is_share(answer) else None


def _in_words(grade: Grade) -> str:
    """What a grade says of an answer that is not right, in a sentence."""
    if grade.outcome == "wrong":
        return f"The answer {shortened(grade.extracted or '', 200)} is wrong."
    if grade.outcome == "ambiguous":
        return f"No single answer is given: {grade.reason}."
    return "" if grade.correct else "No answer is given in the form that is asked for."


def _is_share(value: Any) -> bool:
    try:
        return math.isfinite(value) and 0 <= value <= 1
    except (TypeError, ValueError):
        return False


def tells_reference(feedback: str, row: Row) -> bool:
    """Whether feedback holds the row's reference, or its answer as a line of its own."""
    if not feedback:
        return False
    references = (row.get("privileged_context"), row.get("completion"), row.get("answer"))
    told = {words(line) for line in feedback.splitlines()} | {words(feedback)}
    return any(
        contains(feedback, str(text)) or words(str(text)) in told
        for text in references
        if text is not None and words(str(text))
    )
