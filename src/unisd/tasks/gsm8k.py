"""GSM8K: grade-school word problems, from local files or from the Hub.

By Cobbe et al., 2021 (MIT licence).

Local files have no official split, so a tenth of the problems, chosen by a hash of the question, is
held out: `test` (and `validation`, the same rows) never meets `train`, whichever file or order the
problems come in. A file whose name says `test` is taken whole for `test`. From the Hub
(`openai/gsm8k`, 7473 / 1319 rows), the official splits are used.

    unisd train --task gsm8k --data_files path/to/train.jsonl.gz
"""

from __future__ import annotations

import random
import re

from unisd.errors import UserError
from unisd.tasks.base import Grade, Row
from unisd.tasks.benchmark import Benchmark, Problem, Raw
from unisd.tasks.graders.numbers import extract_number, number

INSTRUCTION = 'Think step by step, briefly, and end with "#### <number>".'
_NOTE = re.compile(r"<<[^<>\n]{0,500}>>")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


class GSM8KTask(Benchmark):
    """Word problems with a solution in steps; graded by the final number."""

    name = "gsm8k"
    hub = ("openai/gsm8k", "main")
    hub_splits = {"train": "train", "validation": "test", "test": "test"}
    counts = {"train": 7473, "validation": 1319, "test": 1319}
    fields = {"question": str, "answer": str}

    def problem(self, raw: Raw, where: str) -> Problem:
        if "####" not in raw["answer"] or extract_number(raw["answer"].rpartition("####")[2]) is None:
            raise UserError(
                f"gsm8k: the answer of {where} does not end with '#### number'; is it another dataset?"
            )
        reference = _NOTE.sub("", raw["answer"]).strip()
        question = raw["question"].strip()
        return {
            "key": question,
            "reference": reference,
            "answer": reference.rpartition("####")[2].strip(),
        }

    def row(self, problem: Problem, rng: random.Random) -> Row:
        return {
            "prompt": f"{problem['key']}\n\n{INSTRUCTION}",
            "privileged_context": problem["reference"],
            "completion": problem["reference"],
            "negative_context": wrong_reference(problem["reference"], rng),
            "answer": problem["answer"],
        }

    def solved(self, problem: Problem) -> str:
        return f"Problem: {problem['key']}\nSolution: {problem['reference']}"

    def grade(self, row: Row, completion: str) -> Grade:
        return number(completion, f"#### {row['answer']}")


def wrong_reference(reference: str, rng: random.Random) -> str:
    """Change the final answer of the reference, and so that number in the last step.

    The earlier steps stay right, which is what a slip in the last step looks like.
    """
    steps, _, answer = reference.rpartition("####")
    old = answer.strip()
    value = int(re.sub(r"[^\d-]", "", old.split(".")[0]) or 0)
    wrong = value
    while wrong == value:
        spread = max(3, abs(value) // 4)
        wrong = value + rng.choice((-1, 1)) * rng.randint(1, spread)
        if value >= 0 and wrong < 0:
            wrong = value
    new = f"{wrong:,}" if "," in old else str(wrong)
    lines = steps.rstrip("\n").split("\n")
    # Only the last mention is the result; an operand may have the same value.
    mentions = [
        m for m in _NUMBER.finditer(lines[-1]) if m[0].replace(",", "") == old.replace(",", "").lstrip("-")
    ]
    if mentions:
        start, end = mentions[-1].span()
        lines[-1] = lines[-1][:start] + new.lstrip("-") + lines[-1][end:]
    return "\n".join(lines) + f"\n#### {new}"
