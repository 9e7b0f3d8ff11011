"""General skills: did training damage what a model of any size could do before?

Six parts of short items with a checkable answer (the split `test`: common facts, arithmetic,
reading, instructions about form, lines of Python, everyday choices), meant to be partly in the
reach of models from 135M to 8B parameters; and everyday requests (the split `chat`) whose free
answers have no grade, to see how far they drift. All were written for this project (Apache-2.0)
and are for evaluation only. Nothing that a model writes is run.
"""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from unisd.data.thoughts import answer_of
from unisd.errors import UserError
from unisd.tasks.base import Grade, Row, Task
from unisd.tasks.graders import get_grader
from unisd.tasks.graders.base import as_text, shortened
from unisd.tasks.graders.choices import ALPHABET
from unisd.tasks.instructions import unmet
from unisd.tasks.python_values import python

FILE = Path(__file__).with_suffix(".jsonl")
CHAT = "chat"
PARTS = ("facts", "arithmetic", "reading", "format", "code", "choice")
"""The graded parts, in the order in which a limit takes from them."""

# What stands behind a question of each part.
_ENDINGS = {
    "facts": " Answer in a few words.",
    "arithmetic": " Reply with the number alone.",
    "reading": " Answer in a few words.",
    "code": "\n\nReply with that alone.",
    "choice": "\n\nReply with the letter of the best answer.",
}
_SHOWN = ("id", "skill", "grader", "answer", "options", "checks")


class General(Task):
    name = "general"
    splits = ("test", CHAT)
    max_new_tokens = 64
    evaluation_only = True

    def load(self, split: str, *, limit: int | None = None, seed: int = 0, **options: Any) -> list[Row]:
        """Rows of `split`, in turn from each part; `seed` changes nothing."""
        if split not in self.splits:
            raise UserError(f"general has no split {split!r}; it has {', '.join(self.splits)}")
        if options:
            raise UserError(f"general has no option {sorted(options)[0]!r}")
        parts = [[item for item in items() if item["skill"] == part] for part in (*PARTS, CHAT)]
        chosen = parts[-1:] if split == CHAT else parts[:-1]
        in_turn = chain.from_iterable(zip_longest(*chosen))
        return [_row(item) for item in in_turn if item is not None][:limit]

    def grade(self, row: Row, completion: str) -> Grade:
        if row["grader"] == "format":
            return _form(row, completion)
        if row["grader"] == "choice":
            return get_grader("choice")(completion, {"answer": row["answer"], "options": row["options"]})
        grader = python if row["grader"] == "python" else get_grader(row["grader"])
        return grader(completion, row["answer"])


def _form(row: Row, completion: str) -> Grade:
    text = answer_of(as_text(completion)).strip()
    if not text:
        return Grade(False, None, "no answer found")
    failed = unmet(text, row["checks"])
    return Grade(not failed, shortened(text), ", ".join(failed), how="whole text")


def _row(item: dict[str, Any]) -> Row:
    prompt = item["prompt"]
    if "options" in item:
        listed = zip(ALPHABET, item["options"], strict=False)
        prompt += "".join(f"\n{letter}. {option}" for letter, option in listed)
    prompt += _ENDINGS.get(item["skill"], "")
    return {"prompt": prompt, **{name: item[name] for name in _SHOWN if name in item}}


@lru_cache(maxsize=1)
def items() -> list[dict[str, Any]]:
    """The items of the file, with examples of right and wrong answers that rows do not have."""
    found = map(json.loads, FILE.read_text(encoding="utf-8").splitlines())
    return [item for item in found if "id" in item]
