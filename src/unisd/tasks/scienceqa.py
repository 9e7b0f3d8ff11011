"""ScienceQA, text only: school science and language questions with 2 to 5 options.

By Lu et al., 2022 (CC BY-NC-SA 4.0).

Rows with an image are left out. From the Hub (`derek-thomas/ScienceQA`) or files with the original
fields; a file without `lecture` and `solution` works too (its references are the answer alone).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from unisd.tasks.benchmark import Problem, Raw, own_id
from unisd.tasks.multiple_choice import MultipleChoice, check_options

METADATA = {"skill": "subject", "topic": "topic", "category": "category", "grade": "grade"}


class ScienceQATask(MultipleChoice):
    """Args:
    subject: keep one subject only ("natural science", "social science", "language science").
    lecture: put the lecture in front of the question, where there is one.
    hint: put the hint there.
    """

    name = "scienceqa"
    hub = ("derek-thomas/ScienceQA", None)
    fields = {"question": str, "choices": list, "answer": int}

    def __init__(
        self,
        data_files: str | Path | Sequence[str | Path] | None = None,
        num_auxiliary_contexts: int = 3,
        short: bool = False,
        subject: str | None = None,
        lecture: bool = False,
        hint: bool = True,
    ) -> None:
        super().__init__(data_files, num_auxiliary_contexts, short)
        self.subject, self.lecture, self.hint = subject, lecture, hint

    def flatten(self, raw: Raw) -> Iterator[Raw]:
        if raw.get("image") is None and (self.subject is None or raw.get("subject") == self.subject):
            yield raw

    def problem(self, raw: Raw, where: str) -> Problem:
        options, answer = check_options(raw["choices"], raw["answer"], where, self.name)
        question, hint = raw["question"].strip(), (raw.get("hint") or "").strip()
        if hint and question.startswith(hint):  # some copies join them
            question = question[len(hint) :].strip()
        before = [(raw.get("lecture") or "").strip()] if self.lecture else []
        before += [hint] if self.hint else []
        shown = "\n".join(part for part in (*before, question) if part)
        key = f"{hint}\n{question}\n{options}"
        return {
            **own_id(raw, "pid"),
            "key": key,
            "question": shown,
            "options": options,
            "answer": answer,
            "rationale": (raw.get("solution") or "").strip(),
            "metadata": {ours: raw[theirs] for ours, theirs in METADATA.items() if raw.get(theirs)},
        }
