"""The pocket world: its words, its facts and the shapes of its prompts.

Each skill has *old* words (well trained; they measure retention), *new* words (rare, and mostly
with an outdated value; they are the adaptation task) and throw-away words, invented for one
document, which force a model to read its prompt. Everything follows from `WORLD_SEED`; the shipped
base belongs to the default one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from unisd.pocket.skills import SKILLS, Item, Problem

WORLD_SEED = 7
OLD_ITEMS = 40  # per skill
NEW_ITEMS = 32  # per skill

POCKET_TEACHER_TEMPLATE = "{prompt}\nExample response: {privileged_context}\nNow answer in your own way."
POCKET_AUXILIARY_TEMPLATE = "{context}\n{prompt}\nNow answer in your own way."
EXAMPLE_TEMPLATE = "Example: {problem}\nResponse: {solution}"


@dataclass(frozen=True)
class World:
    old: dict[str, tuple[Item, ...]]
    new: dict[str, tuple[Item, ...]]


def make_word(rng: random.Random) -> str:
    """Two or three open syllables: `misu`, `kalo`, `tezabu`."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((2, 3))))


def make_world(seed: int = WORLD_SEED) -> World:
    rng = random.Random(f"world {seed}")
    taken: set[str] = set()

    def word() -> str:
        while True:
            candidate = make_word(rng)
            if candidate not in taken:
                taken.add(candidate)
                return candidate

    old: dict[str, tuple[Item, ...]] = {}
    new: dict[str, tuple[Item, ...]] = {}
    for name, skill in SKILLS.items():
        olds, news = [], []
        for i in range(OLD_ITEMS):
            kind = i % skill.kinds
            value = skill.sample_value(rng, kind)
            # A tail of rarely mentioned words keeps retention from being perfect.
            olds.append(
                Item(name, word(), kind, value, value, weight=1.0 if i < OLD_ITEMS * 3 // 4 else 0.25)
            )
        for i in range(NEW_ITEMS):
            kind = i % skill.kinds
            value = skill.sample_value(rng, kind)
            share = 0.85 if i % 8 in (2, 5, 7) else 0.15
            news.append(Item(name, word(), kind, value, skill.other_value(rng, kind, value), share))
        old[name], new[name] = tuple(olds), tuple(news)
    return World(old, new)


def pair_is_possible(first: Item, second: Item) -> bool:
    """Say whether one problem can speak of both.

    Animals share a relation; no API takes a city before a person.
    """
    if first.word == second.word:
        return False
    return first.kind == second.kind if first.skill == "mcq" else (first.kind, second.kind) != (0, 1)


def wrong_values(rng: random.Random, problem: Problem) -> tuple[str, ...] | None:
    """Choose values that give another, plausible answer.

    The outdated ones where there are, else invented ones.
    """
    skill = SKILLS[problem.skill]
    right = skill.answer(problem, problem.values)
    for attempt in range(20):
        if attempt == 0:
            values = tuple(item.outdated for item in problem.items)
        elif problem.skill == "mcq":
            values = tuple(rng.choice(sorted(problem.slots["letters"])).split(" and "))
        else:
            values = tuple(skill.other_value(rng, item.kind, item.value) for item in problem.items)
        possible = problem.skill != "mcq" or " and ".join(values) in problem.slots["letters"]
        if possible and values != problem.values and skill.answer(problem, values) != right:
            return values
    return None
