"""Compare texts: whole (`exact`), or as a part of the completion (`contains`).

Two texts are equal up to case, white space, canonical Unicode form and typography: quotes, dashes,
ligatures, full-width letters, invisible characters. What changes the meaning stays, as powers do.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from unisd.data.thoughts import answer_of
from unisd.tasks.base import Grade
from unisd.tasks.graders.base import TAIL, AliasGrader, shortened
from unisd.tasks.graders.numerals import Numeral, in_ascii_fractions, numerals, plain

CONTAINS_TAIL = 50_000
NUMBERS = 1_000  # of a completion, the last so many are compared with a gold that is a number
PLACES = 3_000  # of gold in a completion, the first so many are looked at

_TYPOGRAPHY = str.maketrans(
    {
        **dict.fromkeys(
            [0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2065), 0xFEFF]
        ),
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4\u02bc", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63", "-"),
        "\u2026": "...",
        "\u2044": "/",
        "\u00b5": "\u03bc",
        "\u0130": "i",
        "\u0131": "i",
    }
)
_COMPATIBLE = re.compile(
    r"[\ufb00-\ufb06\ufb13-\ufb17\uff01-\uffee\u2160-\u217f\u2103\u2109\u01c4-\u01cc\u01f1-\u01f3]+"
)
_RAISED = re.compile(r"(?<=[^\W_])[⁰¹²³⁴-⁹⁻⁺]+")
_LOWERED = re.compile(r"(?<=[^\W\d_])[₀-₉]+(?!\d)")
_RAISED_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_LOWERED_DIGITS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")


def fold(text: str) -> str:
    """A text in the form in which equal ones are equal."""
    if not text.isascii():
        text = _COMPATIBLE.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text.translate(_TYPOGRAPHY))
        text = in_ascii_fractions(text)
        text = _RAISED.sub(lambda m: "^" + m[0].translate(_RAISED_DIGITS), text)
        text = _LOWERED.sub(lambda m: m[0].translate(_LOWERED_DIGITS), text)
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.casefold().split())


class Text(AliasGrader):
    """What `exact` and `contains` have in common: gold is a text, a number, or several."""

    takes = "a text"
    remedy = "give a text that is not empty, or a list of those that are right"

    def read_one(self, value: object) -> str:
        if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
            value = int(value)
        folded = fold(str(value))
        if not folded:
            raise self.refuse(value)
        return folded


class Exact(Text):
    """The whole completion is the answer."""

    name = "exact"

    def grade(self, completion: str, gold: tuple[str, ...]) -> Grade:
        text = " ".join(answer_of(completion).split())
        if not text:
            return Grade(False, None, "no answer found")
        if len(text) > max(TAIL, 20 * max(map(len, gold))):  # no folding makes that equal
            return Grade(False, text[:TAIL], "wrong", how="whole text")
        correct = fold(text) in gold
        return Grade(correct, text[:TAIL], "" if correct else "wrong", how="whole text")


class Contains(Text):
    """Gold occurs as whole words, in the last 50,000 characters, and is not rejected there."""

    name = "contains"
    reads_json_lists = True

    def grade(self, completion: str, gold: tuple[str, ...]) -> Grade:
        answer = answer_of(completion)[-CONTAINS_TAIL:]
        if not answer.strip():
            return Grade(False, None, "no answer found")
        text = rejected = ""
        for wanted in gold:
            number = as_number(wanted)
            text = text or ("" if number else fold(answer))
            places = _numbers(answer, number) if number else _words(text, wanted)
            for before in places:
                if not _REJECTED.search(before):
                    return Grade(True, wanted, how="mention")
                rejected = f"{wanted} is rejected there"
        return Grade(False, shortened(answer), rejected or "gold is not in it", how="mention")


_REJECTED = re.compile(
    r"(?:\bnot|n't|\bnever|\brather than|\binstead of|\bnicht)\s"
    r"(?:(?!only|just|nur)[a-z]{1,12}\s)?[\"'*(]*$",
    re.IGNORECASE,
)
# Scripts that write without spaces, or that hang particles on their words (Hangul: behind).
_HANGUL = "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af"
_KATAKANA = "\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
_SPACELESS = re.compile(
    "[\u3005-\u3007\u3041-\u309f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f"
    "\u1780-\u17ff"
    "\U00020000-\U0003ffff]"
)
_IS_KATAKANA, _IS_HANGUL = re.compile(f"[{_KATAKANA}]"), re.compile(f"[{_HANGUL}]")


def _words(text: str, wanted: str) -> Iterator[str]:
    """What stands before each place where `wanted` stands as whole words."""
    start = text.find(wanted)
    for _ in range(PLACES):
        if start < 0:
            return
        end = start + len(wanted)
        if _border_before(text, start, wanted) and _border_after(text, end, wanted):
            yield text[max(0, start - 40) : start]
        start = text.find(wanted, start + 1)


def _border_before(text: str, start: int, wanted: str) -> bool:
    before, first = text[max(0, start - 3) : start], wanted[0]
    if not before or not first.isalnum():
        return True
    if first.isdigit() and re.search(r"\d[.,:/]$|(?<![^\W_])-$", before):
        return False  # 0.5, -5
    if re.search(r"[^\W_]&$", before):
        return False  # R&D
    return not _joined(before[-1], first)


def _border_after(text: str, end: int, wanted: str) -> bool:
    after, last = text[end : end + 3], wanted[-1]
    if not after:
        return True
    if unicodedata.combining(after[0]) or unicodedata.category(after[0]) == "Mc":
        return False  # another letter
    if not last.isalnum():
        return True
    if re.match(r"[.,:/]\d", after) and last.isdigit():
        return False
    if re.match(r"\+\+|#|\+(?!\s?\w)|&[^\W_]", after):
        return False  # C++, C#, A+
    if re.match(r"'(?!s\b)[^\W_]", after):
        return False  # don't
    return bool(_IS_HANGUL.match(last) and _IS_HANGUL.match(after)) or not _joined(last, after[0])


def _joined(first: str, second: str) -> bool:
    """Whether two characters side by side are of one word."""
    if not second.isalnum() and not _IS_KATAKANA.match(second):
        return False
    if not first.isalnum() and not _IS_KATAKANA.match(first):
        return False
    for one, other in ((first, second), (second, first)):
        if _SPACELESS.match(one):
            return False
        if _IS_KATAKANA.match(one) or _IS_HANGUL.match(one):
            kind = _IS_KATAKANA if _IS_KATAKANA.match(one) else _IS_HANGUL
            return bool(kind.match(other))
    return True


def as_number(text: str) -> Numeral | None:
    """The number that a text is; None where it is more, or where its form matters (007)."""
    found = numerals(text) if len(text) <= 50 and re.search(r"\d", text) else []
    whole = len(found) == 1 and found[0].readings and found[0].text == text.strip()
    return found[0] if whole and not re.match(r"-?0\d", text) else None


def _numbers(text: str, wanted: Numeral) -> Iterator[str]:
    """What stands before each number of a text that is `wanted`."""
    text = plain(text[-TAIL:])
    places = [match.start() for match in re.finditer(r"\d+", text)]
    if len(places) > NUMBERS:
        text = text[places[-NUMBERS] :]
    for numeral in numerals(text):
        parts = [numeral.text] if numeral.readings else re.split(r"[-/.]", numeral.text)  # a date
        if numeral.is_same(wanted) or (len(wanted.text) == 4 and wanted.text in parts):
            yield text[max(0, numeral.start - 40) : numeral.start]


exact = Exact()
contains = Contains()
