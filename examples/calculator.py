"""An environment with a tool, in one file outside the package: two turns, with feedback.

The student writes a first answer; a calculator works out the first sum or product in it and says
the result; the student answers again. All of it is one completion: tokens that the calculator said
are read by student and teacher, and carry no loss. The teacher is told what the grader says.

    python examples/calculator.py                       # a few steps on the pocket model
    python -m pytest examples/calculator.py             # its test
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from unisd import Completion, Engine, Sampling, UniSDConfig, UniSDTrainer, get_task, load_model_and_tokenizer

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "x": lambda a, b: a * b}


def calculate(text: str) -> str:
    """The first operation in a text, worked out."""
    found = re.search(r"(\d{1,9}) ([+x-]) (\d{1,9})", text)
    if found is None:
        return "nothing to work out"
    return f"{found[0]} = {OPERATIONS[found[2]](int(found[1]), int(found[3]))}"


class Calculator:
    """An engine around another one, which writes the student's turns."""

    returns_logps = False

    def __init__(self, inner: Engine, tokenizer: Any) -> None:
        self.inner, self.tokenizer = inner, tokenizer

    def sync(self) -> None:
        self.inner.sync()

    def sleep(self) -> None:
        self.inner.sleep()

    def generate(
        self, prompts: Sequence[Any], keys: Sequence[Any] | None, sampling: Sampling
    ) -> list[Completion]:
        first = self.inner.generate(prompts, keys, sampling)
        said = [f"\nCalculator: {calculate(self.tokenizer.decode(turn.ids))}\n" for turn in first]
        tool = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in said]
        again = [[*prompt, *turn.ids, *ids] for prompt, turn, ids in zip(prompts, first, tool, strict=True)]
        # another draw for the second turn: the keys of rollouts are (seed, step, row, generation)
        others = None if keys is None else [(seed, step, row, 1000 + g) for seed, step, row, g in keys]
        second = self.inner.generate(again, others, sampling)
        return [
            Completion(
                [*one.ids, *ids, *two.ids],
                truncated=two.truncated,
                written=[True] * len(one.ids) + [False] * len(ids) + [True] * len(two.ids),
            )
            for one, ids, two in zip(first, tool, second, strict=True)
        ]


def test_calculate() -> None:
    assert calculate("kine = 3 and 6 x 3 + 2") == "6 x 3 = 18"
    assert calculate("I do not know.") == "nothing to work out"


def main(output_dir: str = "unisd-output/calculator", max_steps: int = 5) -> UniSDTrainer:
    model, tokenizer, _ = load_model_and_tokenizer("pocket")
    task = get_task("pocket")
    rows = [row for row in task.load("train", limit=256) if row["skill"] == "arith"]
    args = UniSDConfig(
        output_dir=output_dir,
        max_steps=max_steps,
        max_completion_length=96,  # of both turns and the calculator's
        num_generations=4,
        rollout_contexts=["sibling+feedback", "sibling", "feedback", "none"],
        temperature=1.0,
    )
    trainer = UniSDTrainer(
        model,
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        grader=task.grade,
        engine=lambda inner: Calculator(inner, tokenizer),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
