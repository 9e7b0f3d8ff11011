"""What a task is: rows to train and evaluate on, and a grader.

A row is a plain dict. Columns that the library knows (design: the data contract):

| column | type | meaning |
|---|---|---|
| `prompt` | str or list of chat messages | what the student sees; required |
| `privileged_context` | str | the reference, shown to the teacher only |
| `completion` | str | the reference as an answer (SFT, likelihood) |
| `auxiliary_contexts` | list[str] | solved examples of other problems, for the agreement weights |
| `negative_context` | str | a plausible wrong reference, for the contrast |
| `id` | str or int | stable name of the row |
| `skill` | str, optional | group of the per-group tables |

Everything else is kept for the task's own grader. A task knows nothing of models or of training.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from unisd.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class Grade:
    """The verdict on one completion.

    `extracted` is the answer found in the completion; None: no answer was found. So the form and
    the content of an answer can be reported separately (the extraction rate). `reason` says in a
    few words why an answer is wrong. `details` are more figures of this answer, each between 0 and
    1 (a report shows their means). `ambiguous`: there are several answers, and the completion does
    not choose one. `how` says how the answer was found ("final marker", "stated", "boxed", "last
    line", "mention"). `passed_over` are answers that might have been taken, best first, each with
    how it was found and why it was not taken. `feedback` says what is wrong with this answer,
    without the right one. `score` is from 0 to 1, from graders that measure how close an answer is;
    None: 1 if it is correct, else 0.
    """

    correct: bool
    extracted: str | None = None
    reason: str = ""
    details: dict[str, float] = field(default_factory=dict)
    ambiguous: bool = False
    how: str = ""
    passed_over: tuple[tuple[str, str, str], ...] = field(default=(), compare=False, repr=False)
    feedback: str = ""
    score: float | None = None

    @property
    def share(self) -> float:
        """How right the answer is, from 0 to 1."""
        return float(self.correct) if self.score is None else self.score

    @property
    def outcome(self) -> str:
        """One of `right`, `wrong`, `unanswered` and `ambiguous`, which are counted apart."""
        if self.correct:
            return "right"
        return "ambiguous" if self.ambiguous else "unanswered" if self.extracted is None else "wrong"

    def __bool__(self) -> bool:
        """A grade stands for its verdict, so that a grader may return a `Grade` or a plain bool."""
        return self.correct


@dataclass(frozen=True)
class Verdict:
    """The grader's result for a student's answer, given before the teacher scores it.

    score: from 0 to 1. passed: whether it counts as solved. feedback: a few words about *this*
    answer (the failing test and what it gave), never the reference; the teacher may see it.
    """

    score: float
    passed: bool
    feedback: str = ""


def as_grade(answer: Any) -> Grade:
    """What a grader returned, as a `Grade`: it may be a bool, a share, a `Grade` or a `Verdict`.

    A share is right if it is 1.

    Raises:
        UserError: anything else.
    """
    if isinstance(answer, Verdict):
        grade = Grade(answer.passed, score=answer.score, feedback=answer.feedback)
    elif isinstance(answer, Grade):
        grade = answer
    elif _is_share(answer):
        grade = Grade(float(answer) == 1, score=None if float(answer) in (0, 1) else float(answer))
    else:
        raise _no_grade(answer)
    if not (_is_flag(grade.correct) and _is_share(grade.share) and isinstance(grade.feedback or "", str)):
        raise _no_grade(answer)
    score = None if grade.score is None else float(grade.score)
    return replace(grade, correct=bool(grade.correct), score=score, feedback=grade.feedback or "")


def _is_flag(value: Any) -> bool:
    """Whether it is true or false, also as a number of numpy's."""
    return _is_share(value) and float(value) in (0, 1)


def _is_share(value: Any) -> bool:
    try:
        return not isinstance(value, str) and 0 <= float(value) <= 1
    except (TypeError, ValueError):
        return False


def _no_grade(answer: Any) -> UserError:
    return UserError(
        f"the grader gave {answer!r:.80}: a bool, a score from 0 to 1, a Grade or a Verdict is needed."
    )


class Task:
    """The base class of tasks: override `load` and `grade`.

    Override `retention_rows` too if the task has skills that it must not damage.

    The attributes are defaults of the class; an instance may set its own in `__init__`.
    """

    name: str = ""
    splits: tuple[str, ...] = ("train", "test")
    teacher_prompt_template: str | None = None
    """Joins {prompt} and {privileged_context}; None: the library's default."""
    auxiliary_prompt_template: str | None = None
    """Joins {prompt} and one auxiliary context; None: the library's default."""
    negative_prompt_template: str | None = None
    """Asks a model for a plausible wrong answer to {prompt}, whose right one is
    {privileged_context}; None: the library's default.
    """
    contexts: ClassVar[str] = "random"
    """How it chooses the auxiliary contexts of its rows: `random`, `retrieval` (the nearest
    problems, by what the task knows of them) or `columns` (they are the user's own). A recipe that
    asks for another kind than a task brings builds it.
    """
    max_new_tokens: int = 256
    """Cap on the completion in evaluation, in tokens."""
    evaluation_only: ClassVar[bool] = False
    """True for benchmarks whose authors ask that nobody trains on them."""
    evaluation_split: ClassVar[str] = "test"
    """What `unisd eval` answers by default."""
    rows_in_files: int | None = None
    """Rows of all splits in the files that the task has read last."""
    graded: bool = True
    """False where nobody can tell a right answer: `grade` is not asked."""
    runs_code: bool = False
    """True where grading runs what a model wrote."""

    def prepare_training(self) -> None:
        """Prepare for training, before its rows are loaded.

        Hold out rows here if there is no split for them.
        """

    def load(self, split: str, *, limit: int | None = None, seed: int = 0, **options: Any) -> list[Row]:
        """The rows of `split`, at most `limit` of them; the same `seed` gives the same rows.

        Raises `UserError` for an unknown split or unusable data.
        """
        raise NotImplementedError

    def grade(self, row: Row, completion: str) -> Grade:
        """Judge `completion` as an answer to `row`; never raises, whatever the completion."""
        raise NotImplementedError

    def retention_rows(self, limit: int | None = None, seed: int = 0) -> list[Row]:
        """Rows of skills that adaptation must not damage, graded by `grade`; none by default."""
        return []
