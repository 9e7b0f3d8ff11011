"""Judge a step's completions: one verdict each, several at once, each within a time limit.

A grader that raises, hangs or returns nonsense gives no verdict: that is told, once a kind, with
the row, and the step goes on. What is left of a grader that hangs is a daemon thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from unisd.data.rows import Row
from unisd.data.text import contains, words
from unisd.errors import UserError
from unisd.processes import cores
from unisd.tasks.base import Grade, Verdict, as_grade
from unisd.tasks.graders.base import shortened

logger = logging.getLogger(__name__)

Grader = Callable[[Row, str], Any]  # gives a bool, a number in [0, 1], a `Grade` or a `Verdict`
LIMIT_S = 30.0
"""Seconds that a verdict may take."""


class _Work:
    """Answers that wait for a grader's verdict, and what it said of the others."""

    def __init__(self, grader: Grader, rows: Sequence[Row], texts: Sequence[str]) -> None:
        self.grader, self.rows, self.texts = grader, rows, texts
        self.waiting = deque(range(len(rows)))
        self.answers: dict[int, tuple[Any, BaseException | None]] = {}
        self.given_up: set[int] = set()
        self.lock = threading.Lock()


class _Worker(threading.Thread):
    """Takes one answer after the other: a thread for each of them would cost more than most
    graders.
    """

    def __init__(self, work: _Work) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.place: int | None = None
        self.since = time.monotonic()
        self.start()

    def run(self) -> None:
        work = self.work
        while self._takes() and self.place is not None:
            answer: tuple[Any, BaseException | None]
            try:
                answer = work.grader(work.rows[self.place], work.texts[self.place]), None
            except BaseException as error:  # also of a grader that wants to exit
                answer = None, error
            with work.lock:
                work.answers[self.place] = answer

    def _takes(self) -> bool:
        """Whether there is another answer for this worker."""
        work = self.work
        with work.lock:
            if not work.waiting or self.place in work.given_up:
                return False
            self.place, self.since = work.waiting.popleft(), time.monotonic()
            return True

    def gives_up(self, limit_s: float) -> bool:
        """Whether it has had its answer for too long, which then gets no verdict."""
        work = self.work
        with work.lock:
            in_time = time.monotonic() < self.since + limit_s
            if self.place is None or in_time or self.place in work.answers:
                return False
            work.given_up.add(self.place)
            return True


class Judge:
    """Asks a grader what became of each completion.

    Args:
        grader: `(row, text) -> bool | float | Grade | Verdict`; the text is what follows a thought.
        limit_s: seconds after which a verdict is given up.
        workers: verdicts that are made at once; default: one a core.
    """

    def __init__(self, grader: Grader, limit_s: float = LIMIT_S, workers: int | None = None) -> None:
        self.grader, self.limit_s = grader, limit_s
        self.workers = workers or cores()
        self.failures: Counter[str] = Counter()
        """Verdicts that were not given, and feedback that was taken away, by their kind."""

    def verdicts(self, rows: Sequence[Row], texts: Sequence[str]) -> list[Verdict | None]:
        """The verdict on each text, None where the grader gave none; in their order."""
        work = _Work(self.grader, rows, texts)
        try:
            self._work_through(work)
        finally:
            with work.lock:
                work.waiting.clear()  # where a person interrupts, nobody goes on in the background
        for place in sorted(work.given_up):
            self._say("hangs", rows[place], f"gave no verdict within {self.limit_s:g} s")
        return [
            None if place in work.given_up else self._checked(row, *work.answers[place])
            for place, row in enumerate(rows)
        ]

    def _work_through(self, work: _Work) -> None:
        workers = [_Worker(work) for _ in range(min(self.workers, len(work.rows)))]
        while workers:
            ends = min(worker.since for worker in workers) + self.limit_s
            workers[0].join(max(0.0, ends - time.monotonic()))
            for worker in list(workers):
                if not worker.is_alive():
                    workers.remove(worker)
                elif worker.gives_up(self.limit_s):
                    workers[workers.index(worker)] = _Worker(work)

    def _checked(self, row: Row, answer: Any, error: BaseException | None) -> Verdict | None:
        if error is not None:
            self._say("raises", row, f"raised {type(error).__name__}: {error}")
            return None
        if answer is None:
            return None
        try:
            verdict = as_verdict(answer)
        except UserError:
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


def as_verdict(answer: Any) -> Verdict:
    """What a grader returned, as a verdict; raises `UserError` for what is none."""
    grade = as_grade(answer)
    said = _in_words(grade) if isinstance(answer, Grade) else ""
    return Verdict(grade.share, grade.correct, grade.feedback or said)


def _in_words(grade: Grade) -> str:
    """What a grade says of an answer that is not right, in a sentence."""
    if grade.outcome == "wrong":
        return f"The answer {shortened(str(grade.extracted or ''), 200)} is wrong."
    if grade.outcome == "ambiguous":
        return f"No single answer is given: {grade.reason}."
    return "" if grade.correct else "No answer is given in the form that is asked for."


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
