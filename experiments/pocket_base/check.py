"""Print the acceptance table of the pocket base.

`python -m experiments.pocket_base.check [--n 500] [--model DIR]`.

Greedy accuracy per skill on the test split: alone, with the reference in the prompt (both layouts),
with two solved examples about the same word, with a wrong reference; and on the retention and the
hard split. Exit code 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.pocket_base.messages import Message, auxiliary_messages, teacher_messages, user
from unisd.pocket import BASE_DIR
from unisd.pocket.task import PocketTask
from unisd.tasks.base import Row

SKILLS = ("mcq", "arith", "tool", "code")


def alone(row: Row) -> list[Message]:
    return [user(row["prompt"])]


# name: split, prompt, least and most accuracy in every skill
MEASURES: dict[str, tuple[str, Callable[[Row], list[Message]], float, float]] = {
    "test, zero-shot": ("test", alone, 0.15, 0.60),
    "reference (append)": (
        "test",
        lambda r: teacher_messages(r["prompt"], r["privileged_context"]),
        0.90,
        1.0,
    ),
    "reference (turn)": (
        "test",
        lambda r: teacher_messages(r["prompt"], r["privileged_context"], "turn"),
        0.90,
        1.0,
    ),
    "two solved examples": (
        "test",
        lambda r: auxiliary_messages(r["prompt"], r["auxiliary_contexts"][0]),
        0.80,
        1.0,
    ),
    "retention, zero-shot": ("retention", alone, 0.85, 1.0),
    "wrong reference": ("test", lambda r: teacher_messages(r["prompt"], r["negative_context"]), 0.0, 1.0),
    "test_hard, zero-shot": ("test_hard", alone, 0.0, 1.0),
    "test_hard, reference": (
        "test_hard",
        lambda r: teacher_messages(r["prompt"], r["privileged_context"]),
        0.0,
        1.0,
    ),
}


@torch.no_grad()
def complete(
    model: Any, tokenizer: Any, prompts: list[list[Message]], max_new_tokens: int, batch: int = 125
) -> list[str]:
    """Greedy completions, batched by length."""
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    completions = [""] * len(texts)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer(
            [texts[i] for i in chosen],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_token_type_ids=False,
        )
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        replies = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, reply in zip(chosen, replies, strict=True):
            completions[i] = reply
    return completions


def measure(
    model: Any, tokenizer: Any, name: str, n: int, task: PocketTask | None = None
) -> dict[str, float]:
    """Accuracy per skill of one measure over `n` rows per skill."""
    task = task or PocketTask()
    split, prompt, _, _ = MEASURES[name]
    rows = task.load(split, limit=n * len(SKILLS))
    completions = complete(model, tokenizer, [prompt(row) for row in rows], task.max_new_tokens)
    right: dict[str, list[bool]] = {skill: [] for skill in SKILLS}
    for row, completion in zip(rows, completions, strict=True):
        right[row["skill"]].append(task.grade(row, completion).correct)
    return {skill: sum(values) / len(values) for skill, values in right.items()}


def load(directory: str | Path = BASE_DIR) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=500, help="problems per skill (600 at most)")
    parser.add_argument("--model", type=Path, default=BASE_DIR)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    title = f"accuracy, n = {args.n} per skill"
    print(f"{title:<26}" + "".join(f"{skill:>8}" for skill in SKILLS) + "   bound")
    missed = False
    for name, (_, _, least, most) in MEASURES.items():
        accuracy = measure(model, tokenizer, name, args.n)
        bounded = (least, most) != (0.0, 1.0)
        holds = all(least <= value <= most for value in accuracy.values())
        missed |= not holds
        verdict = f"   {least:.2f}-{most:.2f} {'ok' if holds else 'MISSED'}" if bounded else "   -"
        print(f"{name:<26}" + "".join(f"{accuracy[skill]:>8.3f}" for skill in SKILLS) + verdict, flush=True)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
