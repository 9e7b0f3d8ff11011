"""Compare the option letter that a completion settles on."""

from __future__ import annotations

import re
from itertools import islice

from unisd.tasks.base import Grade
from unisd.tasks.graders.base import TAIL, as_text

_LETTER = r"[(\[]?\s{0,2}(?:\*\*)?\s{0,2}[(\[]?([A-J])(?![A-Za-z0-9'\u2019])"
_CHOICE_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\\boxed\s{0,3}\{\s{0,3}(?:\\text\s{0,2}\{\s{0,2})?\(?([A-J])(?![A-Za-z0-9])",
        r"#{3,6}\s{0,3}" + _LETTER,
        r"(?:[Aa]nswer|ANSWER|[Oo]ption|[Cc]hoice)(?:\s{1,3}(?:is|would\s{1,3}be|was|IS))?"
        r"\s{0,3}(?:is)?\s{0,3}[:=]?\s{0,3}"
        r"(?:\*\*)?\s{0,3}(?:(?:the\s{1,3})?(?:[Oo]ption|[Cc]hoice|letter)\s{1,3})?" + _LETTER,
    )
)
_ALONE = re.compile(r"^[\s*_>\"'(\[]{0,8}([A-Ja-j])[\s*_)\]\"'.:,!]{0,8}$")
_LEADING = re.compile(r"^[\s*_>\"'(\[]{0,8}([A-J])(?:[).:\]]|\*\*|\s{0,3}[-\u2013\u2014]\s)")
_MARKED = re.compile(r"[(\[]([A-J])[)\]]")


def extract_choice(completion: str) -> str | None:
    """Extract the option letter (A-J) that a completion settles on, upper case.

    None where it settles on none.

    In this order: `\\boxed{B}`, `#### B`, "answer is (B)" / "Answer: B" / "option B" (the last of
    each); a line that is a letter alone (the last one); a line that begins "B." or "B)" (the only
    such letter); one letter in brackets (the only one). A bare "A" within a sentence is the English
    article and never counts.
    """
    text = as_text(completion)[-TAIL:]
    for pattern in _CHOICE_PATTERNS:
        found = None
        for match in pattern.finditer(text):
            # "the answer is A good one" has the article, "The answer is I think ..." the pronoun.
            rest = text[match.end() : match.end() + 2]
            if (
                match[1] in "AI"
                and rest[:1] == " "
                and rest[1:2].islower()
                and not match[0].rstrip().endswith((")", "]"))
            ):
                continue
            found = match[1]
        if found is not None:
            return found
    lines = [line for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if len(line) <= 24 and (alone := _ALONE.match(line)):
            return alone[1].upper()
    for letters in (
        # "(A) or (B)" begins with a letter too, but settles on nothing
        {
            m[1]
            for line in lines
            if (m := _LEADING.match(line[:40])) and set(_MARKED.findall(line[:200])) <= {m[1]}
        },
        {m[1] for m in islice(_MARKED.finditer(text), 1000)},
    ):
        if len(letters) == 1:
            return letters.pop()
    return None


def choice(completion: str, gold: str) -> Grade:
    """Compare letters.

    Gold is a letter, or text that `extract_choice` understands ("Answer: B").
    """
    gold = as_text(gold).strip()
    wanted = gold.upper() if len(gold) == 1 and gold.isalpha() else extract_choice(gold)
    found = extract_choice(completion)
    return Grade(found is not None and found == wanted, found)
