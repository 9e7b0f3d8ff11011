"""HumanEval (Chen et al., 2021; MIT): 164 Python functions to complete.

Evaluation only, like all benchmarks of its kind.

From the Hub (`openai/openai_humaneval`) or its .jsonl file.
"""

from __future__ import annotations

import random

from unisd.tasks.base import Row
from unisd.tasks.benchmark import Problem, Raw
from unisd.tasks.code import CodeTask, fenced
from unisd.tasks.graders.base import Reading
from unisd.tasks.graders.programs import read_program


class HumanEvalTask(CodeTask):
    name = "humaneval"
    splits = ("test", "all")
    evaluation_only = True
    hub = ("openai/openai_humaneval", None)
    hub_splits = {"test": "test"}
    counts = {"test": 164}
    fields = {
        "task_id": str,
        "prompt": str,
        "canonical_solution": str,
        "test": str,
        "entry_point": str,
    }

    def split_of(self, raw: Raw) -> str | None:
        return "test"

    def problem(self, raw: Raw, where: str) -> Problem:
        return {
            "id": raw["task_id"],
            "key": raw["prompt"].strip(),
            "stub": raw["prompt"],
            "code": raw["prompt"] + raw["canonical_solution"],
            "entry_point": raw["entry_point"],
            "tests": f"{raw['test']}\n\ncheck({raw['entry_point']})\n",
        }

    def row(self, problem: Problem, rng: random.Random) -> Row:
        reference = fenced(problem["code"])
        return {
            "prompt": (
                "Complete this function. Reply with the whole function in one Python code"
                f" block.\n\n{fenced(problem['stub'])}"
            ),
            "privileged_context": reference,
            "completion": reference,
            "tests": problem["tests"],
            "entry_point": problem["entry_point"],
            "stub": problem["stub"],
        }

    def solved(self, problem: Problem) -> str:
        return f"Problem: {problem['stub']}\nSolution:\n{fenced(problem['code'])}"

    def read(self, row: Row, completion: str) -> Reading:
        """The whole function, or what completes the stub."""
        return read_program(completion, row["tests"], row["stub"], row["entry_point"])
