"""The documents that the pocket base is trained on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from experiments.pocket_base.messages import Message, assistant, auxiliary_messages, teacher_messages, user
from unisd.pocket.skills import CODE_LETTERS, LETTERS, POOLS, SKILLS, Item, Problem
from unisd.pocket.world import EXAMPLE_TEMPLATE, World, make_word, pair_is_possible, wrong_values

# Other ways to show solved examples, so that reading them is a skill and not a reflex to one
# format.
DEMONSTRATION_TEMPLATES = (
    EXAMPLE_TEMPLATE,
    EXAMPLE_TEMPLATE,
    "Q: {problem}\nA: {solution}",
    "{problem}\n-> {solution}",
)


@dataclass(frozen=True)
class Document:
    """A chat whose last assistant turn is what the base learns; `kind` names its format."""

    messages: tuple[Message, ...]
    kind: str


def throwaway(rng: random.Random, skill: str, kind: int | None = None, word: str | None = None) -> Item:
    """Invent a value for a word.

    `word` lends a known word to be used against what is known of it.
    """
    kind = rng.randrange(SKILLS[skill].kinds) if kind is None else kind
    value = SKILLS[skill].sample_value(rng, kind)
    return Item(skill, word or make_word(rng), kind, value, SKILLS[skill].other_value(rng, kind, value))


class DocumentSampler:
    """Draws the base model's training documents.

    Shares were set by measurement; see the model card.
    """

    skills = ("mcq", "arith", "tool", "code")

    def __init__(self, world: World, rng: random.Random, drills: float = 0.05) -> None:
        self.world, self.rng, self.drills = world, rng, drills
        self.weights = {name: [item.weight for item in items] for name, items in world.old.items()}

    def sample(self) -> Document:
        rng = self.rng
        if rng.random() < self.drills:
            return self.drill()
        skill = rng.choices(self.skills, (0.26, 0.25, 0.25, 0.24))[0]
        draw = rng.random()
        if draw < 0.38:
            return self.plain(skill)
        return self.reference(skill) if draw < 0.68 else self.examples(skill)

    def old_item(self, skill: str) -> Item:
        return self.rng.choices(self.world.old[skill], self.weights[skill])[0]

    def items(self, source: str, skill: str) -> tuple[Item, ...]:
        """One item, or sometimes two that can be composed.

        New words are never composed before the hard test.
        """
        rng = self.rng
        if source == "new":
            return (rng.choice(self.world.new[skill]),)
        first = self._one(source, skill)
        if source != "borrowed" and rng.random() < 0.12:
            for _ in range(20):
                second = self._one(source, skill)
                if pair_is_possible(first, second):
                    return (first, second)
        return (first,)

    def _one(self, source: str, skill: str) -> Item:
        if source == "old":
            return self.old_item(skill)
        # a new word, for this document with an invented value: memory must yield to the prompt
        if source == "borrowed":
            known = self.rng.choice(self.world.new[skill])
            return throwaway(self.rng, skill, known.kind, known.word)
        return throwaway(self.rng, skill)

    def plain(self, skill: str) -> Document:
        rng = self.rng
        source = "new" if rng.random() < 0.2 else "old"
        items = self.items(source, skill)
        if source == "new":
            item = items[0]
            if rng.random() >= item.right_share:  # outdated: the world in which `outdated` is the truth
                item = replace(item, value=item.outdated, outdated=item.value)
            items = (item,)
        problem = SKILLS[skill].problem(rng, items)
        return self._document([user(problem.prompt)], problem, problem.values, source)

    def reference(self, skill: str) -> Document:
        rng = self.rng
        how = rng.choices(
            ("throwaway", "borrowed", "old", "wrong", "irrelevant"), (0.50, 0.20, 0.14, 0.08, 0.08)
        )[0]
        problem = SKILLS[skill].problem(
            rng, self.items(how if how in ("throwaway", "borrowed") else "old", skill)
        )
        shown, values, target = problem, problem.values, problem.values
        if how == "wrong":
            values = wrong_values(rng, problem) or values
            # Obedience is earned: where memory is strong the model holds on to it in some of the
            # cases.
            target = values if rng.random() < 0.8 else target
        elif how == "irrelevant":
            shown = SKILLS[skill].problem(rng, (throwaway(rng, skill),))
            values = shown.values
        reference = self._solution(shown, values, own=0.2)
        layout = "append" if rng.random() < 0.65 else "turn"
        return self._document(
            teacher_messages(problem.prompt, reference, layout), problem, target, f"{how}-{layout}"
        )

    def examples(self, skill: str) -> Document:
        rng = self.rng
        how = rng.choices(("throwaway", "borrowed", "old", "irrelevant"), (0.64, 0.18, 0.12, 0.06))[0]
        items = self.items(how if how in ("throwaway", "borrowed") else "old", skill)
        problem = SKILLS[skill].problem(rng, items)
        count = rng.choices((1, 2, 3), (0.25, 0.6, 0.15))[0]
        template = rng.choice(DEMONSTRATION_TEMPLATES)
        own = rng.random() < 0.25
        shown = []
        for i in range(max(count, len(items))):
            about: Sequence[Item] = (items[i % len(items)],)
            if how == "irrelevant":
                about = (throwaway(rng, skill),)
            example = SKILLS[skill].problem(rng, about)
            solution = self._solution(example, example.values, own=float(own))
            shown.append(template.format(problem=example.prompt, solution=solution))
        messages = auxiliary_messages(problem.prompt, "\n".join(shown))
        return self._document(messages, problem, problem.values, f"{how}-examples")

    def drill(self) -> Document:
        """Copying for its own sake, which everything that reads its prompt is built on."""
        rng = self.rng
        if rng.random() < 0.5:
            text = " ".join(rng.choice((self._key, self._entry))() for _ in range(rng.randint(5, 25)))
            return Document((user(f"Repeat: {text}."), assistant(f"Again: {text}.")), "drill-repeat")
        keys = list(dict.fromkeys(self._key() for _ in range(rng.randint(3, 8))))
        letters = rng.sample(LETTERS, 3) * 3 if rng.random() < 0.5 else None
        pairs = {key: letters[i] if letters else self._entry() for i, key in enumerate(keys)}
        asked = rng.sample(keys, min(len(keys), rng.randint(1, 3)))
        listed = ", ".join(f"{key} {entry}" for key, entry in pairs.items())
        found = ", ".join(f"{key} {pairs[key]}" for key in asked)
        return Document(
            (user(f"List: {listed}. Find {', '.join(asked)}."), assistant(f"Found {found}")), "drill-lookup"
        )

    def _key(self) -> str:
        return self.rng.choice(self.rng.choice(POOLS)) if self.rng.random() < 0.5 else make_word(self.rng)

    def _entry(self) -> str:
        rng = self.rng
        code = rng.choice(CODE_LETTERS) + rng.choice(CODE_LETTERS) + str(rng.randint(1, 9))
        return rng.choice((rng.choice(LETTERS), str(rng.randint(1, 9)), str(rng.randint(10, 130)), code))

    def _solution(self, problem: Problem, values: Sequence[str], own: float) -> str:
        skill = SKILLS[problem.skill]
        if self.rng.random() < own:
            return skill.own(problem, values)
        return skill.annotate(problem, values, self.rng.randrange(skill.styles))

    @staticmethod
    def _document(messages: list[Message], problem: Problem, values: Sequence[str], kind: str) -> Document:
        reply = assistant(SKILLS[problem.skill].own(problem, values))
        return Document((*messages, reply), f"{problem.skill}-{kind}")
