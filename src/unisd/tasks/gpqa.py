"""GPQA (Rein et al., 2023): graduate-level science questions.

Evaluation only: its authors ask that it stays out of training data.

From the Hub (`Idavidrein/gpqa`, gated: accept its terms there first) or its CSV files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unisd.errors import UserError
from unisd.tasks.benchmark import Problem, Raw, own_id
from unisd.tasks.multiple_choice import MultipleChoice, check_options

SUBSETS = {"main": 448, "extended": 546, "diamond": 198}


class GPQATask(MultipleChoice):
    """Args:
    subset: main, extended or diamond (the Hub's configurations).
    """

    name = "gpqa"
    splits = ("test", "all")
    evaluation_only = True
    max_new_tokens = 1024
    hub_splits = {"test": "train"}  # the Hub calls its only split so
    fields = {"Question": str, "Correct Answer": str}

    def __init__(
        self,
        data_files: str | Path | Sequence[str | Path] | None = None,
        num_auxiliary_contexts: int = 0,
        short: bool = False,
        subset: str = "main",
    ) -> None:
        super().__init__(data_files, num_auxiliary_contexts, short)
        if subset not in SUBSETS:
            raise UserError(f"gpqa has no subset {subset!r}; use {', '.join(SUBSETS)}")
        self.hub = ("Idavidrein/gpqa", f"gpqa_{subset}")
        self.counts = {"test": SUBSETS[subset]}

    def split_of(self, raw: Raw) -> str | None:
        return "test"

    def problem(self, raw: Raw, where: str) -> Problem:
        options, answer = check_options(
            [raw["Correct Answer"], *(raw.get(f"Incorrect Answer {i}") for i in (1, 2, 3))],
            0,
            where,
            self.name,
        )
        return {
            **own_id(raw, "Record ID"),
            "key": raw["Question"].strip(),
            "question": raw["Question"].strip(),
            "options": options,
            "answer": answer,
            "rationale": (raw.get("Explanation") or "").strip(),
            "metadata": {"skill": raw["High-level domain"]} if raw.get("High-level domain") else {},
        }
