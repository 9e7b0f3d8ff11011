"""The pocket task: teach the pocket model the facts that its pretraining had outdated.

Four skills (`mcq`, `arith`, `tool`, `code`), each about its own made-up words. `train`,
`validation` and `test` hold other problems about the same new words; `test_hard` composes two of
them or words its problems as training never does; `retention` asks for the old words, which
adaptation must not damage. No text of a problem occurs in two splits.
"""

from __future__ import annotations

import json
import random
import re
from functools import lru_cache
from typing import Any

from unisd.data.text import contains
from unisd.errors import UserError
from unisd.files import parsed
from unisd.pocket.expressions import mistake
from unisd.pocket.skills import SKILLS, Item, Problem
from unisd.pocket.world import (
    EXAMPLE_TEMPLATE,
    POCKET_AUXILIARY_TEMPLATE,
    POCKET_TEACHER_TEMPLATE,
    World,
    make_world,
    pair_is_possible,
    wrong_values,
)
from unisd.tasks.base import Grade, Row, Task

# Problems per skill. Every word has the same number of training problems.
SIZES = {"train": 128, "validation": 128, "test": 600, "test_hard": 600, "retention": 600}
NUM_CONTEXTS = 3


class PocketTask(Task):
    """`noise`: share of wrong training references.

    `reference_style`: `annotators`, `hedged` (the same after words of doubt), or `own` (the model's
    wording).
    """

    name = "pocket"
    contexts = "retrieval"  # solved problems about the row's words
    splits = ("train", "validation", "test", "test_hard", "retention")
    teacher_prompt_template = POCKET_TEACHER_TEMPLATE
    auxiliary_prompt_template = POCKET_AUXILIARY_TEMPLATE
    max_new_tokens = 56

    def __init__(self, noise: float = 0.0, reference_style: str = "annotators") -> None:
        if not 0 <= noise <= 1:
            raise UserError(f"noise is a share between 0 and 1, not {noise}")
        if reference_style not in ("annotators", "hedged", "own"):
            raise UserError(f"reference_style is 'annotators', 'hedged' or 'own', not {reference_style!r}")
        self.noise, self.reference_style = noise, reference_style

    def load(self, split: str, *, limit: int | None = None, seed: int = 0, **options: Any) -> list[Row]:
        """Rows in round-robin over the skills.

        `seed` draws annotators, noise, contexts; the problems never change.
        """
        if split not in self.splits:
            raise UserError(f"the pocket task has no split {split!r}; it has {', '.join(self.splits)}")
        if options:
            raise UserError(f"the pocket task has no option {sorted(options)[0]!r}")
        rows = self._references(split, seed, limit)
        if split != "retention":
            by_word: dict[str, list[Row]] = {}
            for row in self._references("train", seed):
                by_word.setdefault(row["words"], []).append(row)
            for row in rows:
                row["auxiliary_contexts"] = auxiliary_contexts(row, by_word, seed)
        return rows

    def retention_rows(self, limit: int | None = None, seed: int = 0) -> list[Row]:
        return self.load("retention", limit=limit, seed=seed)

    def _references(self, split: str, seed: int, limit: int | None = None) -> list[Row]:
        rows = []
        for number, problem in enumerate(problems()[split][:limit]):
            rng = random.Random(f"{split} {seed} {number}")
            skill = SKILLS[problem.skill]
            style = rng.randrange(skill.styles)
            wrong = wrong_values(rng, problem) or problem.values
            noisy = split == "train" and rng.random() < self.noise
            right_text, wrong_text = (
                skill.own(problem, v) if self.reference_style == "own" else skill.annotate(problem, v, style)
                for v in (problem.values, wrong)
            )
            if self.reference_style == "hedged":
                right_text, wrong_text = hedged(rng, right_text), hedged(rng, wrong_text)
            reference = wrong_text if noisy else right_text
            rows.append(
                {
                    "id": f"pocket-{split}-{number}",
                    "skill": problem.skill,
                    "prompt": problem.prompt,
                    "privileged_context": reference,
                    "completion": reference,
                    "negative_context": wrong_text,
                    "answer": skill.answer(problem, problem.values),
                    "negative_answer": skill.answer(problem, wrong),
                    "variable": problem.slots.get("x", ""),
                    "words": " ".join(item.word for item in problem.items),
                    "noisy": noisy,
                    # Templates differ in their slots only: the same problem is the same slots.
                    "duplicate_key": json.dumps([problem.skill, problem.slots], sort_keys=True, default=str),
                }
            )
        return rows

    def grade(self, row: Row, completion: str) -> Grade:
        extracted = extract(row["skill"], completion)
        if extracted is None:
            return Grade(False)
        if row["skill"] == "tool":
            return Grade(json.loads(extracted) == json.loads(row["answer"]), extracted)
        if row["skill"] == "code":
            wrong = mistake(extracted, row["answer"], row["variable"])
            return Grade(not wrong, extracted, feedback=wrong)
        return Grade(extracted == row["answer"], extracted)


def extract(skill: str, completion: str) -> str | None:
    """The answer that `completion` gives, in the form of its skill, or None."""
    if skill == "tool":
        return extract_call(completion)
    found = re.findall(r"Answer: *(\S[^\n]{0,199})", completion[:4000])
    if not found:
        return None
    text: str = found[-1].strip()
    if skill == "code":
        return text
    pattern = r"\(?([A-C])\b" if skill == "mcq" else r"(-?\d{1,12})(?![\d.])"
    match = re.match(pattern, text)
    return match.group(1) if match else None


def extract_call(completion: str) -> str | None:
    """The first JSON object of flat values, normalised."""
    for match in re.finditer(r"\{[^{}]{0,400}\}", completion[:4000]):
        call = parsed(match.group())
        if isinstance(call, dict):
            return json.dumps(call, separators=(",", ":"))
    return None


def auxiliary_contexts(row: Row, by_word: dict[str, list[Row]], seed: int) -> list[str]:
    """Build up to `NUM_CONTEXTS` contexts of two solved training problems about the row's word(s).

    None of them gives the row away.

    Left out are the row's own problem, in other words too, and examples that hold the row's
    reference: where two annotators of one word's four problems chose the same words for the same
    letter. A tenth of the rows have fewer than three contexts for it.
    """
    rng = random.Random(f"contexts {row['id']} {seed}")
    words = row["words"].split()

    def example(other: Row) -> str:
        return EXAMPLE_TEMPLATE.format(problem=other["prompt"], solution=other["privileged_context"])

    def may_be_shown(other: Row) -> bool:
        same = other["prompt"] == row["prompt"] or other["duplicate_key"] == row["duplicate_key"]
        return not same and not contains(example(other), row["privileged_context"])

    pools = [[other for other in by_word[word] if may_be_shown(other)] for word in words]
    contexts: list[str] = []
    for _ in range(20 if all(pools) else 0):
        pair = (
            [rng.choice(pool) for pool in pools]
            if len(words) == 2
            else rng.sample(pools[0], min(2, len(pools[0])))
        )
        text = "\n".join(map(example, pair))
        if text not in contexts:
            contexts.append(text)
        if len(contexts) == NUM_CONTEXTS:
            break
    return contexts


@lru_cache(maxsize=1)
def problems() -> dict[str, list[Problem]]:
    """The problems of every split, disjoint as texts, in round-robin over the skills.

    With the same words and slots a problem may come again in another wording: 69 of the 2,400 test
    problems are training problems so.
    """
    world = make_world()
    seen: set[str] = set()
    splits: dict[str, list[Problem]] = {}
    for split, size in SIZES.items():
        columns = [_problems(world, skill, split, size, seen) for skill in SKILLS]
        splits[split] = [problem for group in zip(*columns, strict=True) for problem in group]
    return splits


def _problems(world: World, skill: str, split: str, size: int, seen: set[str]) -> list[Problem]:
    rng = random.Random(f"problems {skill} {split}")
    words = world.old[skill] if split == "retention" else world.new[skill]
    order: list[Item] = []
    found: list[Problem] = []
    while len(found) < size:
        if not order:
            order = rng.sample(words, len(words))
        item = order.pop()
        items: tuple[Item, ...] = (item,)
        hard = split == "test_hard" and len(found) % 2 == 0
        if split == "test_hard" and not hard:
            items = (item, rng.choice([other for other in words if pair_is_possible(item, other)]))
        for _ in range(200):
            problem = SKILLS[skill].problem(rng, items, hard)
            if problem.prompt not in seen:
                seen.add(problem.prompt)
                found.append(problem)
                break
    return found


DOUBTS = ("Hmm.", "Maybe.")


def hedged(rng: random.Random, text: str) -> str:
    """`text` after some words of doubt (all of them are in `words/hedges-en.txt`)."""
    return f"{rng.choice(DOUBTS)} {text}"
