"""New facts: two dozen invented facts about a company that does not exist, in plain English.

They are in `new_facts.json` (Apache-2.0).

No model can know them before, and every model can say them after. `train` asks for each fact in
three wordings, `validation` in another and `test` in two more, so that a test question has never
been trained on. The retention rows are sixty questions of general knowledge. An answer is right if
it names the fact (or the knowledge) as whole words; `candidates` holds the right statement first
and three wrong ones, so that knowledge can be measured by likelihood, without the answer's form.
"""

from __future__ import annotations

import json
import random
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from unisd.errors import UserError
from unisd.tasks.base import Grade, Row, Task

FILE = Path(__file__).with_suffix(".json")
NUM_CONTEXTS = 3


class NewFactsTask(Task):
    name = "new_facts"
    splits = ("train", "validation", "test", "retention")
    max_new_tokens = 48

    def load(self, split: str, *, limit: int | None = None, seed: int = 0, **options: Any) -> list[Row]:
        """Rows in the file's order, wording by wording.

        `seed` draws the auxiliary contexts and the wrong references.
        """
        if split not in self.splits:
            raise UserError(f"new_facts has no split {split!r}; it has {', '.join(self.splits)}")
        if options:
            raise UserError(f"new_facts has no option {sorted(options)[0]!r}")
        if split == "retention":
            return self.retention_rows(limit, seed)
        facts = content()["facts"]
        wordings = len(facts[0][split])
        return [_row(fact, split, wording, seed) for wording in range(wordings) for fact in facts][:limit]

    def retention_rows(self, limit: int | None = None, seed: int = 0) -> list[Row]:
        return [
            {"id": f"general-{i}", "prompt": item["question"], "answers": item["answers"]}
            for i, item in enumerate(content()["general"][:limit])
        ]

    def grade(self, row: Row, completion: str) -> Grade:
        text = " ".join(completion[:4000].split())
        for answer in row["answers"]:
            if re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE):
                return Grade(True, answer)
        return Grade(False, text[:80] or None, "names no right answer")


def _row(fact: dict[str, Any], split: str, wording: int, seed: int) -> Row:
    rng = random.Random(f"{seed} {split} {fact['id']} {wording}")
    others = rng.sample([other for other in content()["facts"] if other is not fact], NUM_CONTEXTS)
    statements = [fact["sentence"].format(a=answer) for answer in (fact["answer"], *fact["wrong"])]
    return {
        "id": f"{fact['id']}-{split}-{wording}",
        "prompt": fact[split][wording],
        "privileged_context": statements[0],
        "completion": statements[0],
        "negative_context": rng.choice(statements[1:]),
        "auxiliary_contexts": [
            f"Problem: {other['train'][0]}\nSolution: {other['sentence'].format(a=other['answer'])}"
            for other in others
        ],
        "candidates": statements,
        # "the Halvard lens" is named by "a Halvard lens", too
        "answers": [re.sub(r"^(the|a|an) ", "", fact["answer"])],
    }


@lru_cache(maxsize=1)
def content() -> dict[str, Any]:
    """What the file holds: `facts` and `general`."""
    loaded: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return loaded
