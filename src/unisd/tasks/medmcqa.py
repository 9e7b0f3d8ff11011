"""MedMCQA (Pal et al., 2022; MIT): questions of Indian medical entrance exams with four options.

From the Hub (`openlifescienceai/medmcqa`: `opa` .. `opd`, `cop`) or files with `choices` and
`answer`. The Hub's validation rows are the test: the answers of its test rows are not public.
"""

from __future__ import annotations

import re

from unisd.tasks.benchmark import Problem, Raw, as_list, own_id
from unisd.tasks.multiple_choice import MultipleChoice, check_options

_LETTER = re.compile(r"^[A-D]\.\s*")


class MedMCQATask(MultipleChoice):
    name = "medmcqa"
    hub = ("openlifescienceai/medmcqa", None)
    hub_splits = {"train": "train", "validation": "validation", "test": "validation"}
    counts = {"train": 182822, "validation": 4183, "test": 4183}
    fields = {"question": str}

    def problem(self, raw: Raw, where: str) -> Problem:
        if "opa" in raw:
            options, answer = [raw[name] for name in ("opa", "opb", "opc", "opd")], raw["cop"]
        else:
            options, answer = as_list(raw.get("choices")), raw.get("answer")
            options = [option if option is None else _LETTER.sub("", str(option)) for option in options]
        unique = ["" if option is None else str(option).strip() for option in options]
        if len(set(unique)) < len(unique):  # a handful repeat an option: told apart by their place
            unique = [
                f"{text} ({i + 1})" if unique.count(text) > 1 else text for i, text in enumerate(unique)
            ]
        texts, index = check_options(unique, answer, where, self.name)
        key = f"{raw['question'].strip()}\n{texts}"
        return {
            **own_id(raw, "id"),
            "key": key,
            "question": raw["question"].strip(),
            "options": texts,
            "answer": index,
            "rationale": (raw.get("exp") or "").strip(),
            "metadata": {"skill": raw["subject_name"]} if raw.get("subject_name") else {},
        }
