"""MBPP: short Python functions with three assertions each; full (974) or sanitized (427).

By Austin et al., 2021 (CC BY 4.0).

From the Hub (`google-research-datasets/mbpp`) or the original files. Splits by task_id: prompt
1-10, test 11-510, validation 511-600, train 601-974, in both versions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from unisd.errors import UserError
from unisd.tasks.base import Row
from unisd.tasks.benchmark import Problem, Raw
from unisd.tasks.code import CodeTask, fenced

SPLITS = {
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}
COUNTS = {
    "full": {"prompt": 10, "test": 500, "validation": 90, "train": 374},
    "sanitized": {"prompt": 7, "test": 257, "validation": 43, "train": 120},
}


class MBPPTask(CodeTask):
    """Args:
    version: full or sanitized (the Hub's configurations; a file says itself).
    """

    name = "mbpp"
    splits = ("train", "validation", "test", "prompt", "all")
    hub_splits = {"train": "train", "validation": "validation", "test": "test", "prompt": "prompt"}
    fields = {"task_id": int, "code": str, "test_list": list}

    def __init__(
        self,
        data_files: str | Path | Sequence[str | Path] | None = None,
        num_auxiliary_contexts: int = 3,
        version: str = "full",
    ) -> None:
        super().__init__(data_files, num_auxiliary_contexts)
        if version not in COUNTS:
            raise UserError(f"mbpp has no version {version!r}; use {' or '.join(COUNTS)}")
        self.hub = ("google-research-datasets/mbpp", version)
        self.counts = COUNTS[version]

    def split_of(self, raw: Raw) -> str | None:
        return next((name for name, ids in SPLITS.items() if raw.get("task_id") in ids), None)

    def problem(self, raw: Raw, where: str) -> Problem:
        text = raw.get("text") or raw.get("prompt")
        if not isinstance(text, str) or not all(isinstance(test, str) for test in raw["test_list"]):
            raise UserError(f"mbpp: {where} has no text (or prompt), or tests that are not text")
        setup = [*(raw.get("test_imports") or []), raw.get("test_setup_code") or ""]
        return {
            "id": str(raw["task_id"]),
            "key": text.strip(),
            "text": text.strip(),
            "code": raw["code"].replace("\r\n", "\n").strip(),
            "asserts": [test.strip() for test in raw["test_list"]],
            "tests": "\n".join([*filter(None, setup), *raw["test_list"]]),
        }

    def row(self, problem: Problem, rng: random.Random) -> Row:
        reference = fenced(problem["code"])
        row = {
            "prompt": self._prompt(problem),
            "privileged_context": reference,
            "completion": reference,
            "tests": problem["tests"],
        }
        # Only training needs wrong references, and each costs a few runs.
        if self.loading == "train" and (wrong := self.wrong_program(problem["code"], problem["tests"], rng)):
            row["negative_context"] = fenced(wrong)
        return row

    def solved(self, problem: Problem) -> str:
        return f"Problem: {self._prompt(problem)}\nSolution:\n{fenced(problem['code'])}"

    def _prompt(self, problem: Problem) -> str:
        tests = "\n".join(problem["asserts"])
        return (
            f"{problem['text']}\n\nYour code must pass these tests:\n{tests}\n\nReply with one Python code"
            " block."
        )
