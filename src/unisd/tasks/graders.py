"""Named graders for the user's own rows: `GRADERS[name](completion, gold) -> Grade`.

| name | correct when |
|---|---|
| `exact` | completion and gold are equal after folding case, Unicode form and white space |
| `contains` | gold occurs in the completion, folded likewise, as whole words |
| `choice` | the option letter that the completion settles on is gold's |
| `number` | the number that the completion settles on equals gold's |
| `call` | the completion's tool calls are gold's (forms: :mod:`unisd.tasks.tool_calls`) |
| `code` | the completion's program passes gold's tests, in :mod:`unisd.tasks.sandbox` |

No grader raises, whatever the completion, and each takes time linear in its length. An answer is
looked for in what a model writes last: the last 20,000 characters (`contains`: 200,000) are enough
for that and bound the cost of a megabyte of noise.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from itertools import islice

from unisd.tasks.base import Grade

Grader = Callable[[str, str], Grade]

TAIL = 20_000  # characters
CONTAINS_TAIL = 200_000
CUES = 50  # of the places that announce an answer, the last so many are looked at

# ---------------------------------------------------------------- text


def _fold(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def exact(completion: str, gold: str) -> Grade:
    """Equal up to case, Unicode form and white space. The whole completion is the answer."""
    text = " ".join(_text(completion).split())
    if len(text) > max(TAIL, 20 * len(_text(gold))):  # no folding makes that equal
        return Grade(False, text[:TAIL])
    folded = _fold(text)
    return Grade(bool(folded) and folded == _fold(_text(gold)), folded[:TAIL] or None)


def contains(completion: str, gold: str) -> Grade:
    """Gold occurs as whole words ("cat" is not in "category"), in the last 200,000 characters.

    An empty gold is in nothing.
    """
    text, wanted = _fold(_text(completion)[-CONTAINS_TAIL:]), _fold(_text(gold))
    if not wanted:
        return Grade(False, None)
    # A border is needed only where gold itself begins or ends in a letter or digit.
    before = r"(?<![^\W_])" if wanted[0].isalnum() else ""
    after = r"(?![^\W_])" if wanted[-1].isalnum() else ""
    found = re.search(before + re.escape(wanted) + after, text)
    return Grade(found is not None, wanted if found else None)


# ---------------------------------------------------------------- numbers

# Digits with optional thousands separators; each character can be read in one way only, so matching
# is linear.
_NUMBER = (
    r"[-+\u2212\u2013]?\s{0,2}[$\u20ac\u00a3\u00a5]?\s{0,2}[-\u2212]?"
    r"(?:\d[\d,_]{0,400}(?:\.\d{0,400})?|\.\d{1,400})"
)
_PLAIN_NUMBER = re.compile(_NUMBER + r"(?:\s{0,2}/\s{0,2}\d{1,100})?(?:[eE][-+]?\d{1,3}(?!\w))?")
_HASHES = re.compile(r"#{3,6}\s{0,5}")
_BOXED = re.compile(r"\\boxed\s{0,3}\{([^{}]{0,200})")
_SAID = re.compile(
    r"answer(?:\s{1,3}to\s[^.:=\n]{0,80})?(?:\s{0,3}(?:is|was|=|:)){1,2}\s{0,3}(?:\*\*\s{0,2})?",
    re.IGNORECASE,
)


def _parse(text: str) -> Decimal | None:
    """The value of one matched number, None where the text is none."""
    cleaned = (
        re.sub(r"[\s,_$\u20ac\u00a3\u00a5+]", "", text)
        .replace("\u2212", "-")
        .replace("\u2013", "-")
        .rstrip(".")
    )
    try:
        if "/" in cleaned:
            top, _, bottom = cleaned.partition("/")
            value = Decimal(top) / Decimal(bottom)
        else:
            value = Decimal(cleaned)
    except (InvalidOperation, ArithmeticError, ValueError):
        return None
    return value if value.is_finite() else None


def _first_number(text: str) -> str | None:
    match = _PLAIN_NUMBER.search(text)
    return match[0].strip() if match else None


def _number_span(text: str, start: int) -> re.Match[str] | None:
    """Find the first number on the line that starts at `start`.

    It must lie within what a unit or a currency may take up before it.
    """
    end = text.find("\n", start)
    return _PLAIN_NUMBER.search(text, start, min(len(text) if end < 0 else end, start + 120))


def extract_number(completion: str) -> str | None:
    """Extract the number that a completion settles on, as written; None where there is none.

    It is looked for after the last `####`, else in the last `\boxed{}`, else after the last "the
    answer is" / "answer:", else it is the last number of the text.
    """
    text = _text(completion)[-TAIL:]
    for pattern in (_HASHES, _BOXED, _SAID):
        for match in reversed(list(pattern.finditer(text))[-CUES:]):
            found = _first_number(match[1]) if pattern is _BOXED else None
            if pattern is not _BOXED and (span := _number_span(text, match.end())):
                found = span[0].strip()
            if found is not None:
                return found
    last: re.Match[str] | None = None
    for last in _PLAIN_NUMBER.finditer(text):  # noqa: B007 (the last one is wanted)
        pass
    if last is None:
        return None
    # "5-3" ends in 3, not in -3: a sign that follows a digit or a letter is an operator.
    found = last[0]
    before = text[: last.start()].rstrip(" ")[-1:]
    if found[0] in "-+\u2212\u2013" and (before.isalnum() or before in {")", "%"}):
        found = found[1:]
    return found.strip()


def number(completion: str, gold: str) -> Grade:
    """Compare numbers, to 1e-6 relative.

    Commas, currency, units, percent signs and a full stop don't matter.
    """
    found = extract_number(completion)
    wanted = extract_number(gold)
    if found is None or wanted is None:
        return Grade(False, found)
    have, want = _parse(found), _parse(wanted)
    if have is None or want is None:
        return Grade(False, found)
    try:
        equal = abs(have - want) <= Decimal("1e-6") * max(abs(want), Decimal(1))
    except ArithmeticError:
        equal = False
    return Grade(bool(equal), found)


# ---------------------------------------------------------------- choices

_LETTER = r"[(\[]?\s{0,2}(?:\*\*)?\s{0,2}[(\[]?([A-J])(?![A-Za-z0-9'\u2019])"
_CHOICE_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\\boxed\s{0,3}\{\s{0,3}(?:\\text\s{0,2}\{\s{0,2})?\(?([A-J])(?![A-Za-z0-9])",
        r"#{3,6}\s{0,3}" + _LETTER,
        r"(?:[Aa]nswer|ANSWER|[Oo]ption|[Cc]hoice)(?:\s{1,3}(?:is|would\s{1,3}be|was|IS))?\s{0,3}(?:is)?\s{0,3}[:=]?\s{0,3}"
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
    text = _text(completion)[-TAIL:]
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
    gold = _text(gold).strip()
    wanted = gold.upper() if len(gold) == 1 and gold.isalpha() else extract_choice(gold)
    found = extract_choice(completion)
    return Grade(found is not None and found == wanted, found)


# ---------------------------------------------------------------- code

_CODE_STARTS = ("def ", "class ", "import ", "from ", "@", "async def ")


def extract_code(completion: str) -> str | None:
    """Extract the program that a completion holds; None where there is none.

    It is the longest fenced block with a definition, else the longest fenced block, else what
    follows the first line that begins like a program.
    """
    text = _text(completion)[-TAIL:].replace("\r\n", "\n")
    blocks = []
    for number, part in enumerate(text.split("```")):
        if number % 2:  # inside a fence; the first line names the language
            language, newline, body = part.partition("\n")
            blocks.append(body if newline and " " not in language.strip() else part)
    if blocks:
        best = max(blocks, key=lambda block: ("def " in block or "class " in block, len(block)))
        return best.rstrip() if best.strip() else None
    lines = text.split("\n")
    start = next((i for i, line in enumerate(lines) if line.startswith(_CODE_STARTS)), None)
    return None if start is None else "\n".join(lines[start:]).rstrip()


def code(completion: str, gold: str) -> Grade:
    """The program passes the tests `gold` (Python source with assertions).

    Raises `UserError` where nothing can be isolated.
    """
    from unisd.tasks import sandbox

    program = extract_code(completion)
    if program is None:
        return Grade(False, None, "no code")
    verdict = sandbox.run_program(program, gold)
    return Grade(verdict.passed, program, verdict.reason)


def call(completion: str, gold: str) -> Grade:
    """The tool calls are those of gold."""
    from unisd.tasks.tool_calls import extract_calls, grade_calls

    return grade_calls(extract_calls(_text(completion)), extract_calls(_text(gold)))


def _text(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


GRADERS: dict[str, Grader] = {
    "exact": exact,
    "choice": choice,
    "number": number,
    "contains": contains,
    "call": call,
    "code": code,
}
