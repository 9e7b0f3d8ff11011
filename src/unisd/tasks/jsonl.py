"""The user's own task: rows with a prompt and an answer, graded by a named grader.

unisd eval --task jsonl --data_files rows.jsonl --grader number
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from unisd.data.formats import joined, layout_of, say_what_is_odd, suggested
from unisd.data.reading import load_file
from unisd.data.rows import check_prompt, in_our_form
from unisd.data.text import problem_key
from unisd.errors import UserError, by_caller, flag
from unisd.tasks.base import Grade, Row
from unisd.tasks.benchmark import Benchmark, Problem, Raw, own_id
from unisd.tasks.graders import check_gold, get_grader
from unisd.tasks.graders.base import aliases

logger = logging.getLogger(__name__)


class JsonlTask(Benchmark):
    """Args:
    grader: a name of `unisd.tasks.graders.GRADERS`; `code` takes the column `tests` as tests, else
        the answer, `choice` the options of a column `options` or `choices` too.
    prompt_column, answer_column: where the rows hold them; layouts of `unisd.data.formats` need
        neither. `privileged_context` (default: the answer) is the reference;
        `auxiliary_contexts` and `negative_context` are taken as they are.
    """

    name = "jsonl"
    contexts = "columns"
    evaluation_split = "all"

    def __init__(
        self,
        data_files: str | Path | Sequence[str | Path] | None = None,
        grader: str = "exact",
        prompt_column: str = "prompt",
        answer_column: str = "answer",
    ) -> None:
        if data_files is None:
            needed = f"{flag('data_files')}: your rows, with a prompt and an answer each"
            raise UserError(f"task jsonl needs {needed}")
        super().__init__(data_files, num_auxiliary_contexts=0)
        self.grader = get_grader(grader)
        self.runs_code = grader == "code"
        self.prompt_column, self.answer_column = prompt_column, answer_column
        self._seen: set[str] = set()
        # a program may be judged by a column `tests` alone
        named = [prompt_column] if self.runs_code else [prompt_column, answer_column]
        self.fields = dict.fromkeys(named, object)

    def _records(self, path: str) -> list[Raw]:
        """The rows in whatever layout `unisd train` takes too."""
        rows = load_file(path)
        columns = dict.fromkeys(column for row in rows for column in row)
        mapping = self._mapping(columns, path)
        rows = in_our_form(rows, mapping, path)
        if path not in self._seen:  # each split is read anew
            say_what_is_odd(rows, path, self.prompt_column)
        self._seen.add(path)
        for row in rows:
            row[self.prompt_column] = row.get("prompt")
            if row.get(self.answer_column) is None:  # what a conversation ends in
                row[self.answer_column] = row.get("completion")
            if "privileged_context" in mapping:
                row[self.answer_column] = row["privileged_context"]
        return rows

    def _mapping(self, columns: Collection[str], path: str) -> dict[str, str]:
        """Where prompt and answer are: as the options say, else as a layout does."""
        has_prompt = set(joined(self.prompt_column, columns)) <= set(columns)
        named = self.answer_column != "answer"  # then no layout says otherwise
        has_answer = self.runs_code or named or {self.answer_column, "completion"} & set(columns)
        given = {"prompt": self.prompt_column} if has_prompt else {}
        missing = [*([] if has_prompt else ["prompt"]), *([] if has_answer else ["privileged_context"])]
        layout = layout_of(columns, given, missing) if missing else None
        if layout is None or not (has_prompt or self.prompt_column == "prompt"):
            if not has_prompt and (near := suggested("prompt", columns)):
                given_as = by_caller("--task_options prompt_column={}", 'prompt_column="{}"').format(near[0])
                raise UserError(
                    f"{path} has no column {self.prompt_column!r}: if it is {near[0]!r}, pass {given_as}."
                )
            return given
        if path not in self._seen:
            logger.warning("%s: read as: %s; prompt_column says otherwise.", path, layout.said())
        mapping = {**layout.mapping, **given}
        if has_answer:
            mapping.pop("privileged_context", None)
        return mapping

    def problem(self, raw: Raw, where: str) -> Problem:
        prompt, answer = raw[self.prompt_column], self._answer(raw)
        if not isinstance(prompt, (str, list)) or answer is None or not str(answer).strip():
            raise UserError(
                f"jsonl: {where} has no prompt in {self.prompt_column!r} or no answer in"
                f" {self.answer_column!r}"
            )
        check_prompt(prompt, f"jsonl: {where}", self.prompt_column)
        check_gold(self.grader, raw, answer, f"jsonl: {where}")
        key = str(prompt)
        return {"raw": raw, "key": key, "same": problem_key(prompt), **own_id(raw, "id")}

    def _answer(self, raw: Raw) -> Any:
        """What gold is; tests stand in for it where a program is judged by them alone."""
        answer = raw.get(self.answer_column)
        return raw.get("tests") if answer is None and self.runs_code else answer

    def row(self, problem: Problem, rng: random.Random) -> Row:
        raw = problem["raw"]
        answer = self._answer(raw)  # as it is: a list holds several right ones
        shown = next(iter(aliases(answer)), None) or (
            answer if isinstance(answer, str) else json.dumps(answer)
        )
        reference = str(raw.get("privileged_context") or shown)
        return {
            **raw,
            "prompt": raw[self.prompt_column],
            "privileged_context": reference,
            "completion": raw.get("completion") or reference,
            "answer": answer,
        }

    def _row(self, problem: Problem, pool: list[Problem], seed: int) -> Row:
        return {**self.row(problem, random.Random(seed)), "id": problem["id"]}

    def grade(self, row: Row, completion: str) -> Grade:
        return self.grader(completion, self.grader.gold_of(row, row["answer"]))
