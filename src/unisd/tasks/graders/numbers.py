"""Compare the number that a completion settles on.

Candidates, best first: what follows `####` or stands between `<answer>` tags (the first, unless the
text corrects itself), what is stated ("the answer is") or boxed (the last of both), the one number
in bold on the last line, the last line, the last number. Of "9 * 2 = 18" the number is 18. Several
numbers ("5 or 7", "5 to 7"), and what looks like a number but is none, settle nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from unisd.errors import UserError
from unisd.tasks.graders.base import TAIL, AliasGrader, Candidate, Reading, shortened
from unisd.tasks.graders.numerals import Numeral, in_words, numerals, plain, unmarked

CUES = 20  # of the places that announce an answer, the last so many are looked at
SENTENCE = 250  # characters after a cue
HEAD = 20_000  # characters in which a first answer is looked for

_MARKER = re.compile(r"#{3,6}[ \t]{0,5}|<answer>\s{0,5}", re.IGNORECASE)
_VERB = r"(?:is|was|are|were|(?:would|should|must|will|could|might|may) be|equals|comes (?:out )?to|=)"
_STATED = re.compile(
    r"(?P<loose>\banswer(?: (?:to|for) (?:[^\s.:=]{1,20}+ ){0,7}?[^\s.:=]{1,20}+)?"
    rf"(?: here| \w{{2,9}}ly| thus)?\s{{0,3}}{_VERB}(?![a-z])\s?:?"
    r"|\b(?:antwort|lösung) (?:ist|lautet|beträgt)\b:?|\bréponse(?: finale)? est\b:?"
    r"|\brespuesta(?: final)? es\b:?|\brisposta(?: finale)? è|\bresposta(?: final)? é"
    r"|\bantwoord is\b:?|答案(?:是|为|為)\s?:?|答えは|정답은)"
    r"|(?P<strict>(?:\banswer"
    r"|\b(?:antwort|réponse|respuesta|risposta|resposta|antwoord|ответ)(?: final[ea]?)?"
    r"|答案|答え|정답|الجواب|الإجابة)\s{0,3}(?:[:=]|$|\n))",
    re.IGNORECASE | re.MULTILINE,
)
_CUE_WORDS = (
    *("answer", "antwort", "lösung", "réponse", "respuesta", "risposta", "resposta", "antwoord", "ответ"),
    *("答案", "答え", "정답", "الجواب", "الإجابة"),
)
_CONDITION = re.compile(
    r"\b(?:if|whether|suppose|supposing|assume|assuming|unless|imagine)\s(?:that\s)?"
    r"(?:(?:the|my|your|this|our|an?)\s)?"
    r"(?:(?:final|correct|right)\s)?$"
    r"|\b(?:first|second|third|fourth|fifth|each|every|per|wrong|incorrect|previous|other|another)\s$",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s{0,3}(?:\{|(?=-?\d))")
_JOINED = re.compile(r"[}$ ]{0,5}(?:,|\bor\b|\band\b|,? ?\b(?:or|and)\b)[$ a-z]{0,20}")
_BOLD = re.compile(r"(?:\*\*|__)(?!\s)([^*_\n]{1,60}?)(?:\*\*|__)")
_FILLER = (
    r"(?:the|about|approximately|approx|around|roughly|exactly|is|it|its|s|are|there|total|of"
    r"|an?|just|only|nearly"
    r"|almost|equals|to|rs|x|y|z|n|t|usd|eur|gbp|minus|negative|final|answer|ca|ist|est|es)"
)
_NO_SUBJECT = re.compile(rf"(?:[^\w\n]|\b{_FILLER}\b)*+", re.IGNORECASE)
_HEADING = re.compile(r"\d{1,2}[.):](?:\s|\*)+[A-Za-z*]")
_SENTENCE_END = re.compile(r"\n|[.!?;](?=\s|$|[\"')])|[。！？；]|</answer>")
_CORRECTS = re.compile(
    r"\b(?:no|wait|actually|sorry|mistake|correct(?:ion|ed|ing)|rather|oops|instead|re-?check|wrong|not)\b",
    re.IGNORECASE,
)
_NEXT_QUESTION = re.compile(
    r"^[ \t]{0,3}(?:#{1,6} ?|\*\*)?(?:question|problem|exercise|instruction|q|human|user|input)"
    r"(?: ?\d{1,3})?(?:\*\*)?[ \t]?[:.)]|<\|im_start\|>|<\|user\|>|<\|endoftext\|>|\[INST\]",
    re.IGNORECASE | re.MULTILINE,
)
_EXPLAINS = re.compile(
    r"^\W{0,6}(?:explanation|notes?|justification|reason(?:ing)?|verification|check|because)\b",
    re.IGNORECASE | re.MULTILINE,
)
_ANY_DIGIT = re.compile(r"\d")
_BARE_NUMBER = re.compile(r"[^\w\n]*+\d[\d.,/ ]*+[^\w\n=<>+*^]*+(?:[^\W\d]++[^\w\n]*+)?")
_BULLET = re.compile(r"^\s{0,12}(?:\(?\d{1,3}[.)]|[-*+\u2022\u2013])\s+(?=\S)")
_LABEL = re.compile(
    r"\b(?:step|part|question|problem|case|chapter|figure|table|equation|page"
    r"|option|example|method|day|q)s?\s?#?$",
    re.IGNORECASE,
)
_REJECTED = re.compile(
    r"\b(?:not|isn't|wasn't|never|rather than|instead of|nicht|cannot be|can't be)\s(?:\w{1,12}\s)?$",
    re.IGNORECASE,
)


def numbers_same(first: Numeral, second: Numeral) -> bool:
    """Whether two numerals are one number, in either order."""
    return first.is_same(second) or second.is_same(first)


@dataclass(frozen=True)
class Run:
    """Numbers that belong together, and how each relates to the one before it."""

    text: str
    numbers: tuple[Numeral, ...]
    relations: tuple[str, ...] = ()  # one less

    def settle(self) -> tuple[tuple[Numeral, ...], str]:
        """What it comes to (two forms of one number, perhaps), or why it comes to nothing."""
        numbers, relations = self.numbers, self.relations
        if "equals" in relations:
            last = len(relations) - relations[::-1].index("equals")
            result, hedge = Run(self.text, numbers[last:], relations[last:]).settle()
            if last == 1 and len(result) == 1 and _near(numbers[0], result[0]):
                return (result[0], numbers[0]), ""  # 22/7 = 3.14
            return result, hedge
        if not relations:
            return ((numbers[0],), "") if numbers[0].readings else ((), f"{numbers[0].text} is not a number")
        if relations[0] in ("operator", "minus"):
            return (), f"{self.text} is not worked out"
        if relations[0] == "parts":
            return (), f"{self.text} is in several parts"
        if all(numbers_same(numbers[0], other) for other in numbers[1:]) and numbers[0].readings:
            return (numbers[0],), ""
        return (), f"{self.text} are several numbers"


def _near(first: Numeral, second: Numeral) -> bool:
    """Whether one is the other but for rounding."""
    if not first.readings or not second.readings:
        return False
    return abs(first.readings[0] - second.readings[0]) <= abs(first.readings[0]) / 100


_UNIT = r"[ \u202f]?(?:[^\W\d_]{1,14}|°[CF]?)?[ \u202f]?"
_MARKS = r"[\s$€£₹(){}\[\]]*"
_MEASURES = (
    r"(?:feet|ft|foot|yards?|hours?|hrs?|h|minutes?|mins?|min|m|km|kg|pounds?|lbs?|years?"
    r"|months?|weeks?|gallons?"
    r"|dollars?|meters?|metres?|days?)"
)
_RELATIONS = tuple(
    (name, re.compile(pattern, re.IGNORECASE))
    for name, pattern in (
        ("list", rf"{_UNIT}(?:,|;|&|,?\s?\band\b|,?\s?\bund\b|\bet\b){_MARKS}"),
        (
            "or",
            rf"{_UNIT}[,(]?\s?(?:\b(?:or|oder|ou)\b\s?(?:maybe|perhaps|possibly|even|else)?|或|または){_MARKS}",
        ),
        ("range", rf"{_UNIT}(?:\b(?:to|through|until|bis)\b|\u00b1|\.\.\.|~){_MARKS}"),
        ("minus", rf"{_UNIT}(?:[-\u2013]|\bminus\b){_MARKS}"),
        ("parts", rf"\s?{_MEASURES}\s?(?:and)?\s?|[ \u202f]"),
    )
)
_EQUALS = re.compile(r"[=\u2248\u2192]|->|\bequals?\b|\bmakes\b|\bgives\b", re.IGNORECASE)
_OPERATOR = re.compile(
    r"(?:^|[\s)\]])[xX](?:[\s($]|$)|[-+*/\u2013^]|\b(?:times|plus|minus|divided by|multiplied by)\b",
    re.IGNORECASE,
)


def _relation(gap: str) -> str:
    """How two numbers relate between which `gap` stands; "" where they have nothing to do."""
    if len(gap) > 60 or "\n" in gap.strip():
        return ""
    words = len(re.findall(r"[^\W\d_]+", gap))
    equals = _EQUALS.search(gap)
    if equals and "(" not in gap[: equals.start()] and words <= 5 and not re.search(r"[.;!?]\s", gap):
        return "equals"
    for name, pattern in _RELATIONS:
        if pattern.fullmatch(gap):
            return name
    if words <= 5 and _OPERATOR.search(gap) and not re.search(r"[,.;:!?]\s", gap):
        return "operator"
    return ""


def runs(text: str, found: Sequence[Numeral]) -> list[Run]:
    """The numbers of a text in groups that belong together."""
    groups: list[tuple[list[Numeral], list[str]]] = []
    for previous, numeral in zip((None, *found), found, strict=False):
        relation = _relation(text[previous.end : numeral.start]) if previous else ""
        if relation:
            groups[-1][0].append(numeral)
            groups[-1][1].append(relation)
        else:
            groups.append(([numeral], []))
    return [
        Run(shortened(text[numbers[0].start : numbers[-1].end]), tuple(numbers), tuple(relations))
        for numbers, relations in groups
    ]


@dataclass(frozen=True)
class Found:
    """A place that may give the answer: a candidate, or why it settles nothing."""

    candidate: Candidate
    place: int
    hedge: str = ""


class Number(AliasGrader):
    """Compare numbers: integers exactly, others to 1e-6 of gold's value."""

    name = "number"
    takes = "a number"
    reads_json_lists = True
    remedy = "give one number (1234, 0.5, 3/4, 2.5e3), or a list of those that are right"

    def read_one(self, value: object) -> tuple[Numeral, ...]:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise self.refuse(value)
        found = self.read(str(value))
        if found.chosen is None:
            why = UserError(f"gold {value!r} holds no single number: {found.hedge}")
            raise self.refuse(value) if not found.hedge or found.hedge.endswith("is not a number") else why
        meant: tuple[Numeral, ...] = found.chosen.value
        return meant

    def same(self, value: tuple[Numeral, ...], gold: tuple[Numeral, ...]) -> bool:
        return any(have.is_same(want) for have in value for want in gold)

    def read(self, completion: str) -> Reading:
        marked = plain(first_answer(completion)[-TAIL:], markup=True)
        text = unmarked(marked)
        ranks = (list(_final(text)), sorted([*_stated(text), *_boxed(text)], key=lambda one: one.place))
        looked_at: list[Found] = []
        for rank, found in enumerate(ranks):
            usable = [one for one in found if one.hedge or not one.candidate.why_not]
            if rank == 0:
                chosen = _first_unless_corrected(text, usable)
            else:
                chosen = usable[-1] if usable else None
            looked_at += sorted(found, key=lambda one: one is not chosen)
            if chosen is not None:
                return _reading(looked_at + [one for more in ranks[rank + 1 :] for one in more], chosen)
        last = [*_bold(marked), *_last(_before_explanation(text))]
        return _reading(looked_at + last, last[0] if last else None)


def _reading(found: Sequence[Found], chosen: Found | None) -> Reading:
    candidates = tuple(one.candidate for one in found)
    if chosen is None:
        return Reading(candidates)
    return Reading(candidates, None if chosen.hedge else chosen.candidate, chosen.hedge)


def first_answer(text: str) -> str:
    """The text up to where a model goes on with another question after its answer."""
    head = text[:HEAD]
    settled = [
        match.end()
        for pattern in (_MARKER, _BOXED, _STATED)
        for match in islice(
            pattern.finditer(head if pattern is not _STATED or _may_state(head) else ""), CUES
        )
        if _ANY_DIGIT.search(head, match.end(), match.end() + 120)
    ]
    for asked in islice(_NEXT_QUESTION.finditer(head), CUES):
        before = head[max(0, asked.start() - 200) : asked.start()].rstrip().rpartition("\n")[2]
        if (settled and min(settled) < asked.start()) or _BARE_NUMBER.fullmatch(before):
            return head[: asked.start()]
    return text


def _before_explanation(text: str) -> str:
    """The text up to an explanation of the bare number on the line before."""
    for found in islice(_EXPLAINS.finditer(text), CUES):
        if _BARE_NUMBER.fullmatch(
            text[max(0, found.start() - 200) : found.start()].rstrip().rpartition("\n")[2]
        ):
            return text[: found.start()]
    return text


def _first_unless_corrected(text: str, found: Sequence[Found]) -> Found | None:
    """The first final answer: what follows it is the next question, unless it is a correction."""
    chosen = None
    for one in found:
        if chosen is None or _CORRECTS.search(text[chosen.place : one.place][-400:]):
            chosen = one
    return chosen


def _candidate(run: Run, how: str, place: int, why_not: str = "") -> Found:
    result, hedge = run.settle()
    shown = result[0].text if result else run.text
    return Found(Candidate(shown, result, how, why_not or hedge), place, "" if why_not else hedge)


def _statement(text: str, how: str, place: int, strict: bool) -> Found | None:
    """What a sentence says that follows a cue; None where it says no number.

    strict: nothing but fillers may stand before the number, else the cue is a heading.
    """
    end = _SENTENCE_END.search(text)
    sentence = text[: end.start()] if end else text
    found = numerals(sentence, at_cue=True)
    said = [one for one in found if not _REJECTED.search(sentence[max(0, one.start - 40) : one.start])]
    if not said:
        if found:
            return _candidate(Run(found[0].text, (found[0],)), how, place, "it is rejected")
        word = in_words(sentence) if len(sentence) <= 120 else None
        said = [word] if word else []
        if word is None:
            return None
    if strict and not _NO_SUBJECT.fullmatch(sentence, 0, said[0].start):
        return None
    if said[0].start > 120:
        return None
    run = runs(sentence, said)[0]
    asked = (
        end is not None and end[0] in "?？" and not re.search(r"(?i)\b(?:right|correct|ok|yes)\W*$", sentence)
    )
    return _candidate(run, how, place, "it is a question" if asked else "")


def _final(text: str) -> Iterator[Found]:
    for match in list(_MARKER.finditer(text))[:CUES]:
        rest = text[match.end() : match.end() + SENTENCE]
        if _HEADING.match(rest):
            continue
        found = _statement(rest, "final marker", match.start(), strict=True)
        if found is not None:
            yield found


def _may_state(text: str) -> bool:
    lowered = text.lower()
    return any(word in lowered for word in _CUE_WORDS)


def _stated(text: str) -> Iterator[Found]:
    if not _may_state(text):
        return
    for match in list(_STATED.finditer(text))[-CUES:]:
        strict = match["strict"] is not None
        rest = text[match.end() : match.end() + SENTENCE]
        skipped = re.match(r"[\s*_$>#:\[{]{0,20}" if "\n" in rest[:20] else r"[ \t]{0,5}", rest)
        head = skipped[0] if skipped else ""
        found = _statement(rest[len(head.rstrip("$")) :], "stated", match.start(), strict or "\n" in head)
        if found is None:
            continue
        if _CONDITION.search(text[max(0, match.start() - 40) : match.start()]):
            found = Found(
                Candidate(
                    found.candidate.text,
                    found.candidate.value,
                    "stated",
                    "it is a condition, or another one's",
                ),
                found.place,
            )
        yield found


def _boxed(text: str) -> Iterator[Found]:
    previous: tuple[int, Found] | None = None
    for match in list(_BOXED.finditer(text))[-CUES:]:
        inside = text[match.end() : match.end() + SENTENCE]
        inside = _within_braces(inside) if match[0][-1] == "{" else re.match(r"-?[\d.,]*\d", inside)[0]  # type: ignore[index]
        found = numerals(inside, at_cue=True) or [word for word in [in_words(inside)] if word]
        if not found:
            continue
        groups, shown, hedge = runs(inside, found), shortened(inside), ""
        if len(groups) > 1:
            hedge = f"{shown} are several numbers"
        elif previous is not None and _JOINED.fullmatch(text[previous[0] : match.start()]):
            hedge = f"{previous[1].candidate.text} and {shown} are several numbers"
        one = _candidate(groups[0], "boxed", match.start())
        one = Found(Candidate(shown, (), "boxed", hedge), one.place, hedge) if hedge else one
        previous = match.end() + len(inside), one
        yield one


def _within_braces(text: str) -> str:
    """The text up to the brace that closes the one before it."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if not depth:
            return text[:place]
    return text


def _last_line(text: str) -> tuple[str, int]:
    """The last line that holds a digit, and where it begins."""
    last: re.Match[str] | None = None
    for last in re.finditer(r"\d", text):  # noqa: B007 (the last one is wanted)
        pass
    if last is None:
        return "", 0
    start = text.rfind("\n", 0, last.start()) + 1
    end = text.find("\n", last.start())
    return text[start : len(text) if end < 0 else end][-2000:], start


def _bold(marked: str) -> Iterator[Found]:
    """The one number that is in bold on the last line."""
    line, place = _last_line(marked)
    spans = []
    for match in _BOLD.finditer(line):
        found = numerals(match[1], at_cue=True)
        if (
            found
            and _NO_SUBJECT.fullmatch(match[1], 0, found[0].start)
            and not match[1].rstrip().endswith(":")
        ):
            spans += runs(match[1], found)
    if len(spans) == 1 and not re.fullmatch(r"\s*(?:\*\*|__)\d{1,2}[.)](?:\*\*|__).*\w.*", line):
        yield _candidate(spans[0], "bold", place)


def _last(text: str) -> Iterator[Found]:
    """The last number, and the ones before it on its line."""
    line, place = _last_line(text)
    bullet = _BULLET.match(line)
    found = [
        one
        for one in numerals(line)
        if not (bullet and one.start < bullet.end() - 1)
        and not _LABEL.search(line[max(0, one.start - 14) : one.start])
    ]
    said = [one for one in found if not _REJECTED.search(line[max(0, one.start - 40) : one.start])]
    if not said:
        word = in_words(text.strip().rpartition("\n")[2][:80]) if not re.search(r"\d", text) else None
        if word is not None:
            yield _candidate(Run(word.text, (word,)), "last line", place)
        return
    groups = runs(line, said)
    alone = len(groups) == 1 and len(line.strip()) <= 60 and not text[place + len(line) :].strip()
    # what stands in brackets explains what stands before them
    groups.sort(key=lambda run: not _in_brackets(line[: run.numbers[0].start]))
    for run in reversed(groups[-10:]):
        yield _candidate(run, "last line" if alone else "mention", place)


def _in_brackets(before: str) -> bool:
    return before.count("(") > before.count(")")


number = Number()


def extract_number(completion: str) -> str | None:
    """Extract the number that a completion settles on, as written; None where there is none."""
    found = number.read(completion)
    return found.chosen.text if found.chosen else None
