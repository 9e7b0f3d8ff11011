"""Multiple choice: options in an order shuffled row by row, graded by the letter.

A reference ends in "Answer: <letter>". What another system answered refers to the data set's order,
which rows keep in `published_options` and `published_answers` (letters, any of which is right).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from unisd.errors import UserError
from unisd.tasks.base import Grade, Row
from unisd.tasks.benchmark import Benchmark, Problem
from unisd.tasks.graders.choices import ALPHABET as LETTERS
from unisd.tasks.graders.choices import Gold, choice

REASONED = 'Reason briefly, then end with "Answer: <letter>".'
SHORT = 'Reply with "Answer: <letter>" alone.'


class MultipleChoice(Benchmark):
    """Asks problems with `question`, `options` (texts), `answer` (index), `rationale`, `key`, `id`.

    The rationale is a text or "".

    Args:
        short: references without their rationale, for answers of a few tokens.
    """

    max_new_tokens = 256

    def __init__(
        self,
        data_files: str | Path | Sequence[str | Path] | None = None,
        num_auxiliary_contexts: int = 3,
        short: bool = False,
    ) -> None:
        super().__init__(data_files, num_auxiliary_contexts)
        self.short = short

    def choices(self, problem: Problem) -> tuple[list[str], int]:
        """The options in this row's order, and where the right one is.

        The order depends on the problem alone.
        """
        if "order" not in problem:
            problem["order"] = list(range(len(problem["options"])))
            random.Random(f"options {problem['key']}").shuffle(problem["order"])
        order = problem["order"]
        return [problem["options"][i] for i in order], order.index(problem["answer"])

    def prompt(self, problem: Problem) -> str:
        options, _ = self.choices(problem)
        return f"{problem['question']}\n\nOptions:\n{_listed(options)}\n\n{SHORT if self.short else REASONED}"

    def reference(self, problem: Problem, index: int) -> str:
        """Write a solution that settles on option `index`.

        For a wrong one the rationale speaks for it.
        """
        options, right = self.choices(problem)
        rationale = "" if self.short else problem["rationale"]
        if rationale and index != right:
            named = options[right].lower() in rationale.lower()
            swapped = rationale.replace(options[right], options[index]) if options[right] in rationale else ""
            rationale = swapped if named and swapped else f"What fits best here is {options[index]}."
        return (f"{rationale}\n" if rationale else "") + f"Answer: {LETTERS[index]}"

    def row(self, problem: Problem, rng: random.Random) -> Row:
        options, right = self.choices(problem)
        wrong = rng.choice([i for i in range(len(options)) if i != right])
        reference = self.reference(problem, right)
        return {
            "prompt": self.prompt(problem),
            "privileged_context": reference,
            "completion": reference,
            "negative_context": self.reference(problem, wrong),
            "answer": LETTERS[right],
            "options": options,
            **self.published(problem),
            **problem.get("metadata", {}),
        }

    def solved(self, problem: Problem) -> str:
        _, right = self.choices(problem)
        return f"Problem: {self.prompt(problem)}\nSolution: {self.reference(problem, right)}"

    def published(self, problem: Problem) -> Row:
        """The options as the data set has them, and the letters that are right there."""
        options: list[str] = problem.get("published") or problem["options"]
        right = problem["options"][problem["answer"]]
        same = [i for i, option in enumerate(options) if option == right]
        places = same if "published" in problem else [problem["answer"]]
        return {"published_options": list(options), "published_answers": [LETTERS[i] for i in places]}

    def arranged(self, row: Row, order: Sequence[int] | None) -> Row:
        """The row with its options in another order: places in the data set's own; None: that."""
        options, answers = row["published_options"], row["published_answers"]
        places = list(range(len(options))) if order is None else list(order)
        right = [LETTERS[i] for i, place in enumerate(places) if LETTERS[place] in answers]
        shown = [options[place] for place in places]
        prompt = row["prompt"].replace(_listed(row["options"]), _listed(shown))
        return {**row, "prompt": prompt, "options": shown, "answer": right}

    def grade(self, row: Row, completion: str) -> Grade:
        return choice.grade(completion, Gold(frozenset(row["answer"]), options=tuple(row["options"])))


def _listed(options: Sequence[str]) -> str:
    return "\n".join(f"{LETTERS[i]}. {option}" for i, option in enumerate(options))


def check_options(options: Sequence[object], answer: object, where: str, name: str) -> tuple[list[str], int]:
    """Options as distinct texts and the right one's index.

    Raises `UserError` where they are not.
    """
    texts = ["" if option is None else str(option).strip() for option in options]
    if not 2 <= len(texts) <= len(LETTERS) or len(set(texts)) != len(texts) or not all(texts):
        raise UserError(f"{name}: {where} has no 2 to {len(LETTERS)} different options: {texts!r:.200}")
    if isinstance(answer, str) and answer.strip().lstrip("-").isdecimal():  # a cell of a CSV file
        answer = int(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(texts):
        raise UserError(f"{name}: {where}: the answer {answer!r} is not an index of its {len(texts)} options")
    return texts, answer
