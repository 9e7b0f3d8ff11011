"""CoS-E v1.11 over CommonsenseQA: everyday questions with five options and an explanation.

By Rajani et al., 2019 (BSD-3-Clause); the explanations are a crowd's.

From the Hub (`Salesforce/cos_e`, v1.11) or files with its fields. CommonsenseQA's own files
(`question.stem`, `answerKey`) work too, without explanations. The Hub's validation rows are the
test: its test answers are not public.
"""

from __future__ import annotations

from unisd.errors import UserError
from unisd.tasks.benchmark import Problem, Raw
from unisd.tasks.multiple_choice import MultipleChoice, check_options


class CosETask(MultipleChoice):
    name = "cos_e"
    hub = ("Salesforce/cos_e", "v1.11")
    hub_splits = {"train": "train", "validation": "validation", "test": "validation"}
    counts = {"train": 9741, "validation": 1221, "test": 1221}
    fields = {"id": str, "question": object}

    def problem(self, raw: Raw, where: str) -> Problem:
        question, options, answer = raw["question"], raw.get("choices"), raw.get("answer")
        if isinstance(question, dict):  # CommonsenseQA's own form
            labels = [option["label"] for option in question["choices"]]
            options = [option["text"] for option in question["choices"]]
            question, answer = question["stem"], options[labels.index(raw["answerKey"])]
        if (
            not isinstance(question, str)
            or not isinstance(options, list)
            or not isinstance(answer, str)
            or answer not in options
        ):
            raise UserError(f"cos_e: {where} has no question with choices and an answer among them")
        # A few rows name an option twice; a letter would then not say which.
        unique = list(dict.fromkeys(option.strip() for option in options))
        texts, index = check_options(unique, unique.index(answer.strip()), where, self.name)
        return {
            "id": raw["id"],
            "key": f"{question.strip()}\n{sorted(texts)}",
            "question": question.strip(),
            "options": texts,
            "published": [option.strip() for option in options],
            "answer": index,
            "rationale": (raw.get("abstractive_explanation") or "").strip(),
        }
