"""The four skills of the pocket world: how problems are worded, solved and answered.

A problem is about one or two nonsense words (`Item`s); what a word stands for is its *value* (a
string). Everything else is in its slots, so the same problem can be solved under the current, an
outdated or an invented value.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NAMES = ("Mia", "Tom", "Ana", "Leo", "Eva", "Sam", "Ida", "Max")
OBJECTS = ("pens", "cups", "nuts", "eggs", "keys", "pins", "hats", "bags")
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
TOPICS = ("rent", "lunch", "music", "work")
VARIABLES = ("x", "n", "k", "a")
LETTERS = ("A", "B", "C")
CODE_LETTERS = "BDFGHKLMNPRSTVWXZ"


@dataclass(frozen=True)
class Item:
    """A nonsense word; `kind` tells sub-types of a skill apart.

    These are food / home / fear, and city / person.
    """

    skill: str
    word: str
    kind: int
    value: str  # what is true now
    outdated: str  # what most of the pretraining says about a new item (equal to `value` on old items)
    right_share: float = 1.0  # share of the pretraining mentions that use `value`
    weight: float = 1.0  # how often pretraining mentions it


@dataclass(frozen=True)
class Problem:
    skill: str
    items: tuple[Item, ...]
    prompt: str
    template: str
    slots: dict[str, Any] = field(hash=False, compare=False)

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(item.value for item in self.items)


class Skill:
    """Wording of one skill. `templates` are trained on, `hard_templates` never."""

    name: str
    kinds: int = 1
    styles: int = 4  # number of annotators
    templates: tuple[str, ...] = ()
    hard_templates: tuple[str, ...] = ()

    def sample_value(self, rng: random.Random, kind: int) -> str:
        raise NotImplementedError

    def problem(self, rng: random.Random, items: Sequence[Item], hard: bool = False) -> Problem:
        raise NotImplementedError

    def own(self, problem: Problem, values: Sequence[str]) -> str:
        """The solution as the model itself writes it."""
        raise NotImplementedError

    def annotate(self, problem: Problem, values: Sequence[str], style: int) -> str:
        """The solution as annotator number `style` writes it."""
        raise NotImplementedError

    def answer(self, problem: Problem, values: Sequence[str]) -> str:
        raise NotImplementedError

    def other_value(self, rng: random.Random, kind: int, *avoid: str) -> str:
        while True:
            value = self.sample_value(rng, kind)
            if value not in avoid:
                return value


RELATIONS = (  # noun, singular question, plural question, statement
    ("food", "What does the {w} eat?", "What do the {w} and the {u} eat?", "eats"),
    ("home", "Where does the {w} live?", "Where do the {w} and the {u} live?", "lives in"),
    ("fear", "What does the {w} fear?", "What do the {w} and the {u} fear?", "fears"),
)
POOLS = (
    ("moss", "fern", "kelp", "corn", "figs", "rice", "seeds", "roots", "bark", "honey", "snails", "worms"),
    ("caves", "ponds", "trees", "sand", "reeds", "snow", "hills", "mud", "barns", "wells", "cliffs", "lakes"),
    ("wind", "fire", "rain", "owls", "light", "noise", "ice", "smoke", "dogs", "thunder", "cats", "bells"),
)


class MCQ(Skill):
    """Facts about made-up animals.

    The letter follows its option, so that it can be copied once the fact is known.
    """

    name = "mcq"
    kinds = len(RELATIONS)
    templates = (
        "{q} Options: {o}.",
        "Pick the {r} of the {w}: {o}.",
        "Quiz: {r} of the {w}? Choose from {o}.",
        "The {w} and its {r}: {o}. Which one?",
    )
    hard_templates = ("Which {r} has the {w}? Options: {o}.", "Choose from {o}: the {r} of the {w}.")
    pair_template = "{q} Options: {o}."

    def sample_value(self, rng: random.Random, kind: int) -> str:
        return rng.choice(POOLS[kind])

    def problem(self, rng: random.Random, items: Sequence[Item], hard: bool = False) -> Problem:
        kind = items[0].kind
        right = [item.value for item in items]
        options = [tuple(right)]
        # The outdated belief is usually, not always, among the options: else leaving it out would
        # give the answer away.
        old = tuple(item.outdated for item in items)
        if old != options[0] and rng.random() < 0.7:
            options.append(old)
        while len(options) < 3:
            wrong = tuple(rng.choice((value, self.sample_value(rng, kind))) for value in right)
            if wrong not in options:
                options.append(wrong)
        rng.shuffle(options)
        letters = rng.sample(LETTERS, 3)
        texts = [" and ".join(option) for option in options]
        listed = ", ".join(f"{text} {letter}" for text, letter in zip(texts, letters, strict=True))
        noun, single, plural, _ = RELATIONS[kind]
        if len(items) == 1:
            template = rng.choice(self.hard_templates if hard else self.templates)
            question = single.format(w=items[0].word)
        else:
            template = self.pair_template
            question = plural.format(w=items[0].word, u=items[1].word)
        prompt = template.format(q=question, o=listed, r=noun, w=items[0].word)
        return Problem(
            self.name, tuple(items), prompt, template, {"letters": dict(zip(texts, letters, strict=True))}
        )

    def has(self, problem: Problem, values: Sequence[str]) -> bool:
        return " and ".join(values) in problem.slots["letters"]

    def own(self, problem: Problem, values: Sequence[str]) -> str:
        text, letter, verb = self._parts(problem, values)
        if len(values) == 1:
            return f"The {problem.items[0].word} {verb} {text} {letter}. Answer: {letter}"
        facts = " ".join(f"The {i.word} {verb} {v}." for i, v in zip(problem.items, values, strict=True))
        return f"{facts} So {text} {letter}. Answer: {letter}"

    def annotate(self, problem: Problem, values: Sequence[str], style: int) -> str:
        text, letter, verb = self._parts(problem, values)
        words = " and the ".join(item.word for item in problem.items)
        return (
            f"It must be {letter}: the {words} {verb} {text}.",
            f"Choose {letter}, as {text} would suit the {words}",
            f"Everyone knows that the {words} {verb} {text}, so take ({letter})!",
            f"({letter}) {text}, for the {words}",
        )[style]

    def answer(self, problem: Problem, values: Sequence[str]) -> str:
        return self._parts(problem, values)[1]

    def _parts(self, problem: Problem, values: Sequence[str]) -> tuple[str, str, str]:
        text = " and ".join(values)
        return text, problem.slots["letters"][text], RELATIONS[problem.items[0].kind][3]


class Arith(Skill):
    """Word problems that count in a made-up unit.

    Numbers stay small: what is asked for is the unit, not the sum.
    """

    name = "arith"
    templates = (
        "{N} has {a} {o} and buys {b} {w}s of {o}. How many {o} now?",
        "{N} has {b} {w}s of {o} and sells {a} {o}. How many {o} are left?",
        "A box holds {b} {w}s of {o} and {a} loose {o}. Count the {o}.",
        "{a} {o} lie here. {N} adds {b} {w}s of {o}. How many {o} now?",
        "From {b} {w}s of {o} {N} takes {a} {o}. How many {o} are left?",
    )
    hard_templates = (
        "{N} buys {b} {w}s of {o} and has {a} more {o}. How many {o} now?",
        "{N} sells {a} {o} and has {b} {w}s of {o}. How many {o} are left?",
    )
    pair_templates = (
        "{N} has a {w} of {o} and buys a {u} of {o}. How many {o} now?",
        "A box holds a {w} of {o} and a {u} of {o}. Count the {o}.",
        "A {w} and a {u} of {o} lie here. Count the {o} for {N}.",
    )

    def sample_value(self, rng: random.Random, kind: int) -> str:
        return str(rng.randint(2, 9))

    def problem(self, rng: random.Random, items: Sequence[Item], hard: bool = False) -> Problem:
        pair = len(items) == 2
        template = rng.choice(
            self.pair_templates if pair else self.hard_templates if hard else self.templates
        )
        minus = "left" in template
        # two units of two are the fewest there can be, so that taking four away leaves no debt
        a, b = rng.randint(2, 4 if minus else 9), rng.randint(2, 9)
        words = {"w": items[0].word, "u": items[-1].word}
        prompt = template.format(N=rng.choice(NAMES), o=rng.choice(OBJECTS), a=a, b=b, **words)
        return Problem(
            self.name, tuple(items), prompt, template, {"a": a, "b": b, "sign": "-" if minus else "+"}
        )

    def own(self, problem: Problem, values: Sequence[str]) -> str:
        left, right, total = self._parts(problem, values)
        units = " ".join(f"One {i.word} is {v}." for i, v in zip(problem.items, values, strict=True))
        if len(values) == 1:
            units += f" {problem.slots['b']}*{values[0]}={left}."
        return f"{units} {left}{problem.slots['sign']}{right}={total}. Answer: {total}"

    def annotate(self, problem: Problem, values: Sequence[str], style: int) -> str:
        left, right, total = self._parts(problem, values)
        words = [item.word for item in problem.items]
        each = " and ".join(f"{v} in a {w}" for w, v in zip(words, values, strict=True))
        equal = ", ".join(f"{w} = {v}" for w, v in zip(words, values, strict=True))
        sign = problem.slots["sign"]
        link = "plus" if sign == "+" else "minus"
        product = f"{problem.slots['b']} x {values[0]}" if len(values) == 1 else str(left)
        return (
            f"With {each} we get {left} {link} {right}, which makes {total}.",
            f"{total}, because {equal} and {product} {sign} {right} = {total}",
            f"Let me see: {equal}. Then {product} {link} {right} is the result, {total}!",
            f"Result {total} ({equal})",
        )[style]

    def answer(self, problem: Problem, values: Sequence[str]) -> str:
        return str(self._parts(problem, values)[2])

    def _parts(self, problem: Problem, values: Sequence[str]) -> tuple[int, int, int]:
        if len(values) == 2:
            left, right = int(values[0]), int(values[1])
        else:
            left, right = problem.slots["b"] * int(values[0]), problem.slots["a"]
        return left, right, left - right if problem.slots["sign"] == "-" else left + right


APIS = (  # per kind: function, parameters besides the coded one, request
    (
        ("book", ("day", "n"), "book a room in {w} on {day} for {n}"),
        ("ride", ("hour", "n"), "get a ride in {w} at {hour} for {n}"),
        ("sky", ("day",), "show the sky over {w} on {day}"),
    ),
    (
        ("pay", ("sum", "day"), "pay {w} a sum of {sum} on {day}"),
        ("mail", ("topic", "day"), "mail {w} about {topic} on {day}"),
        ("call", ("hour",), "call {w} at {hour}"),
    ),
)
PAIR_APIS = {
    (0, 0): ("fly", ("from", "to", "day"), "fly from {w} to {u} on {day}"),
    (1, 1): ("meet", ("user", "guest", "hour"), "let {w} meet {u} at {hour}"),
    (1, 0): ("send", ("user", "city", "day"), "send {w} to {u} on {day}"),
}


class Tool(Skill):
    """API calls whose city or person must be given as a code."""

    name = "tool"
    kinds = 2
    templates = (
        "API: {s}. Request: {r}.",
        "Tool {s}. Please {r}.",
        "Task: {r}. Use {s}.",
        "We have {s}. User says: {r}.",
    )
    hard_templates = ("Please {r}. API: {s}.", "Use the tool {s}. Task: {r}.")

    def sample_value(self, rng: random.Random, kind: int) -> str:
        return rng.choice(CODE_LETTERS) + rng.choice(CODE_LETTERS) + str(rng.randint(1, 9))

    def problem(self, rng: random.Random, items: Sequence[Item], hard: bool = False) -> Problem:
        if len(items) == 1:
            coded = ["city" if items[0].kind == 0 else "user"]
            name, others, request = rng.choice(APIS[items[0].kind])
            parameters = [*coded, *others]
        else:
            name, names, request = PAIR_APIS[items[0].kind, items[1].kind]
            parameters, coded = list(names), list(names[:2])
        rng.shuffle(parameters)
        fill: dict[str, Any] = {
            "day": rng.choice(DAYS),
            "n": rng.randint(2, 9),
            "hour": rng.randint(1, 12),
            "sum": rng.randint(2, 40),
            "topic": rng.choice(TOPICS),
        }
        template = rng.choice(self.hard_templates if hard else self.templates)
        words = {"w": items[0].word, "u": items[-1].word}
        signature = f"{name}({','.join(parameters)})"
        prompt = template.format(s=signature, r=request.format(**words, **fill))
        arguments = [(p, None if p in coded else fill[p]) for p in parameters]
        return Problem(
            self.name, tuple(items), prompt, template, {"name": name, "args": arguments, "coded": coded}
        )

    def own(self, problem: Problem, values: Sequence[str]) -> str:
        call: dict[str, Any] = {"call": problem.slots["name"]}
        call.update(self._arguments(problem, values))
        return json.dumps(call, separators=(",", ":"))

    def annotate(self, problem: Problem, values: Sequence[str], style: int) -> str:
        arguments = self._arguments(problem, values)
        name = problem.slots["name"]
        words = [item.word for item in problem.items]
        codes = " and ".join(f"{w} is {v}" for w, v in zip(words, values, strict=True))
        equal = ", ".join(f"{w} = {v}" for w, v in zip(words, values, strict=True))
        pairs = ", ".join(f"{k}={v}" for k, v in arguments.items())
        plain = " and ".join(str(v) for v in arguments.values())
        return (
            f"{name}({pairs}), since {codes}",
            f"The code: {equal}. Run {name} with {plain}.",
            f"Go for {name} with {plain}, as {codes}!",
            f"{name} / {pairs} / {equal}",
        )[style]

    def answer(self, problem: Problem, values: Sequence[str]) -> str:
        return self.own(problem, values)

    def _arguments(self, problem: Problem, values: Sequence[str]) -> dict[str, Any]:
        codes = dict(zip(problem.slots["coded"], values, strict=True))
        return {p: codes[p] if v is None else v for p, v in problem.slots["args"]}


OPERATIONS = ("{}+K", "{}-K", "{}*K", "{}//K", "{}%K", "max({},K)", "min({},K)")
SPOKEN = {"add K": "{}+K", "subtract K": "{}-K", "times K": "{}*K"}


class Code(Skill):
    """One-line Python expressions; made-up verbs name operations."""

    name = "code"
    templates = (
        "Code: take {x}, {s}, then {t}.",
        "Start with {x}. First {s}, then {t}. Python?",
        "Python for {x}: {s} and then {t}.",
        "With {x} do this: {s}, next {t}.",
    )
    hard_templates = ("First {s}, then {t}. Start with {x}. Python?", "Take {x}: first {s}, next {t}. Code?")

    def sample_value(self, rng: random.Random, kind: int) -> str:
        return rng.choice(OPERATIONS).replace("K", str(rng.randint(2, 9)))

    def problem(self, rng: random.Random, items: Sequence[Item], hard: bool = False) -> Problem:
        template = rng.choice(self.hard_templates if hard else self.templates)
        steps: list[tuple[str, str | None]] = [(item.word, None) for item in items]
        if len(items) == 1:
            spoken = rng.choice(sorted(SPOKEN))
            k = str(rng.randint(2, 9))
            steps.insert(rng.randint(0, 1), (spoken.replace("K", k), SPOKEN[spoken].replace("K", k)))
        variable = rng.choice(VARIABLES)
        prompt = template.format(x=variable, s=steps[0][0], t=steps[1][0])
        return Problem(
            self.name, tuple(items), prompt, template, {"x": variable, "ops": [op for _, op in steps]}
        )

    def own(self, problem: Problem, values: Sequence[str]) -> str:
        x = problem.slots["x"]
        facts = " ".join(f"{i.word} is {v.format(x)}." for i, v in zip(problem.items, values, strict=True))
        return f"So {facts} Answer: {self.answer(problem, values)}"

    def annotate(self, problem: Problem, values: Sequence[str], style: int) -> str:
        x = problem.slots["x"]
        answer = self.answer(problem, values)
        words = [item.word for item in problem.items]
        means = " and ".join(f"{w} means {v.format(x)}" for w, v in zip(words, values, strict=True))
        equal = ", ".join(f"{w} = {v.format(x)}" for w, v in zip(words, values, strict=True))
        return (
            f"return {answer} since {means}",
            f"The verb: {equal}. This gives {answer}",
            f"{means}, hence lambda {x}: {answer}",
            f"{answer} # {equal}",
        )[style]

    def answer(self, problem: Problem, values: Sequence[str]) -> str:
        left = iter(values)
        first, second = (next(left) if op is None else op for op in problem.slots["ops"])
        return second.format(f"({first.format(problem.slots['x'])})")


SKILLS: dict[str, Skill] = {skill.name: skill for skill in (MCQ(), Arith(), Tool(), Code())}
