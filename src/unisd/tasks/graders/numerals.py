"""Read numbers as people and models write them: whole, or not at all.

`plain` turns LaTeX, Markdown and typographic forms into plain text; `numerals` finds the numbers of
such a text. A text that looks like a number but is none (`12,34,5`, a time, a date, a version) is a
numeral without a value, so that no part of it is taken for the number.

Thousands are grouped by commas, thin spaces, apostrophes or underscores, in threes (or as in India:
12,34,567); `7,5` and `1.234,50` have a decimal comma. `1.234` and `1,234` are read in the English
way, and where the text writes numbers in the European one, in that way too.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 400  # digits, and size of an exponent: more is no answer to anything

# ---------------------------------------------------------------- plain text

_INVISIBLE = dict.fromkeys(
    [0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2065), 0xFEFF]
)
_TYPES = str.maketrans(
    {
        **dict.fromkeys("\u2212\ufe63\uff0d\u2011\u2010", "-"),
        **dict.fromkeys("\u00a0\u2006\u2007\u2008\u2009\u200a\u202f", "\u202f"),
        **dict.fromkeys("\u00d7\u22c5\u2217\u00b7", "*"),
        **dict.fromkeys("\u2044\u2215\u00f7\uff0f", "/"),
        **dict.fromkeys("\u2018\u2019", "'"),
        **dict.fromkeys("\u066b\uff0e", "."),
        **dict.fromkeys("\u066c\uff0c", ","),
        **dict.fromkeys("\u2248\u2243\u2245\u223c", "\u2248"),
        **dict.fromkeys("\u21d2\u2192\u27f9", "\u2192"),
        **{"\uff1a": ":", "\uff05": "%", "\uff1d": "=", "\uff04": "$", "\uff08": "(", "\uff09": ")"},
        **{"\uff0b": "+", "\u2030": "%%"},
    }
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_RAISED = re.compile(r"(?<=[\d)])[⁰¹²³⁴-⁹⁻⁺]{1,4}")
_VULGAR = {
    character: unicodedata.normalize("NFKC", character).replace("\u2044", "/")
    for character in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
}
_MIXED = re.compile(rf"(?<=\d)\s?(?=[{''.join(_VULGAR)}])")
_FRACTIONS = str.maketrans(_VULGAR)
_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")
_WRAPPED = re.compile(
    r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname|boldsymbol|bm|underline)"
    r"\s?\{([^{}]{0,300})\}"
)
_FRACTION = re.compile(
    r"(\d?)\s?\\[dtc]?frac\s?(?:\{\s?([^{}]{1,80}?)\s?\}|(\d))\s?(?:\{\s?([^{}]{1,80}?)\s?\}|(\d))"
)
_LATEX = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|!)(?![a-z])", ""),
        (r"\{,\}", ","),
        (r"(?<=\d)\\[,;:> ](?=\d)", "\u202f"),
        (r"(?<=\d)~(?=\d{3})", "\u202f"),
        (r"\\[,;:> ]", " "),
        (r"\^\s?\{?\s?\\(?:circ|degree)\s?\}?", "°"),
        (r"\\(?:times|cdot|ast)(?![a-z])", "*"),
        (r"\\div(?![a-z])", "/"),
        (r"\\(?:approx|simeq|sim|cong)(?![a-z])", "\u2248"),
        (r"\\pm(?![a-z])", "\u00b1"),
        (r"\\pi(?![a-z])", "\u03c0"),
        (r"\\sqrt(?![a-z])", "\u221a"),
        (r"\\infty(?![a-z])", "\u221e"),
        (r"\\(?:Rightarrow|rightarrow|implies|to)(?![a-z])", "\u2192"),
        (r"\\(?:degree|circ)(?![a-z])", "°"),
        (r"\\q?quad(?![a-z])", " "),
        (r"\\([$%#&_])", r"\1"),
        (r"\\[()\[\]]", " "),
        (r"\^\s?\{\s?([^{}]{1,20})\}", r"^(\1)"),
    )
)
_NOTE = re.compile(r"<<[^<>\n]{0,500}>>")  # GSM8K's calculator
_POWER = re.compile(r"(?<=\d)\s?\*\*\s?(?=-?\d)(?!\d+\*\*)")
_UNIT_POWER = re.compile(r"(?<=[a-z])\s?\^\s?\(?-?\d{1,2}\)?")  # cm^2
_MARKUP = re.compile(r"\*\*|__|`")
_RUPEES = re.compile(r"\bRs\.?\s?(?=\d)")
_ABBREVIATED = re.compile(r"\b(approx|ca|c|resp|incl)\.(?=\s?[\d$€£])", re.IGNORECASE)


def plain(text: str, markup: bool = False) -> str:
    """The text without LaTeX, notes and typography; `markup` keeps Markdown's."""
    text = text.translate(_INVISIBLE)
    if not text.isascii():
        text = _RAISED.sub(lambda m: f"^({m[0].translate(_SUPERSCRIPTS)})", text)
        text = in_ascii_fractions(text).translate(_TYPES)
        text = _FOREIGN_DIGIT.sub(lambda m: str(unicodedata.decimal(m[0])), text)
    if "<<" in text:
        text = _NOTE.sub("", text)
    if "\\" in text or "{" in text:
        for _ in range(2):  # one may stand in the other
            text = _WRAPPED.sub(r" \1 ", text)
            text = _FRACTION.sub(_fraction, text)
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    if "^" in text:
        text = _UNIT_POWER.sub("", text)
    text = _ABBREVIATED.sub(r"\1", _RUPEES.sub("₹", _POWER.sub("^", text)))
    return text if markup else unmarked(text)


def unmarked(text: str) -> str:
    """A plain text without Markdown's marks."""
    return _MARKUP.sub("", text)


def in_ascii_fractions(text: str) -> str:
    """The text with 1\u00bd as 1 1/2."""
    return _MIXED.sub(" ", text).translate(_FRACTIONS)


def _fraction(match: re.Match[str]) -> str:
    whole, top, bottom = match[1], match[2] or match[3], match[4] or match[5]
    simple = re.fullmatch(r"-?[\d.,]+", top) and re.fullmatch(r"[\d.,]+", bottom)
    written = f"{top}/{bottom}" if simple else f"({top})/({bottom})"
    return f"{whole} {written}" if whole else written


# ---------------------------------------------------------------- numerals


@dataclass(frozen=True)
class Numeral:
    """A number as written, and what it may mean.

    readings: none where it cannot be read; two where its separators can be read in two ways.
    percent: whether a percent sign follows.
    """

    start: int
    end: int
    text: str
    readings: tuple[Fraction, ...]
    percent: bool = False

    def is_same(self, other: Numeral) -> bool:
        """Whether both are one number: integers exactly, others to 1e-6 of the other's value."""
        if self.text == other.text:
            return bool(self.readings)
        mine, theirs = self._meant(other), other._meant(self)
        return any(_close(have, want) for have in mine for want in theirs)

    def _meant(self, other: Numeral) -> tuple[Fraction, ...]:
        """The readings; of 60 % beside a number without the sign also 0.6."""
        shares = tuple(value / 100 for value in self.readings)
        return self.readings + shares if self.percent and not other.percent else self.readings


def _close(have: Fraction, want: Fraction) -> bool:
    if have == want:
        return True
    if have.denominator == want.denominator == 1:
        return False
    tolerance = abs(want) / 10**6
    return abs(have - want) <= (min(tolerance, Fraction(1, 1000)) if want.denominator == 1 else tolerance)


_DIGITS = r"(?:(?:\d{1,3}(?:[ \u202f]\d{3})++(?!\d)|\d++)(?:[.,_']\d++)*+|\.\d++)"
_NUMERAL = re.compile(
    r"(?P<odd>\d{1,4}(?P<mark>[-/.])\d{1,2}(?P=mark)\d{1,4}(?![\d,])|\d++(?::\d++)++)"  # dates, times
    rf"|(?P<digits>{_DIGITS})"
    r"(?:(?P<exponent>[eE][-+]?\d{1,4}(?![\w]))"
    r"|\s?[*xX]\s?10\s?\^\s?\(?(?P<tens>\s?[-+]?\d{1,4})\s?\)?"
    r"|\s?\^\s?\(?(?P<power>\s?[-+]?\d{1,3}\b)\s?\)?"
    rf"|\s?/\s?(?P<bottom>{_DIGITS})(?P<chain>\s?/\s?\d)?"
    r"|\s(?P<top>\d{1,3})\s?/\s?(?P<under>\d{1,3})(?!\s?/)(?![\d.,]\d))?"
)
_SIGN = re.compile(r"[-+\u2013][ \u202f]?$")
_MINUS_WORD = re.compile(r"([\d%)]\s?)?\b(?:minus|negative) $", re.IGNORECASE)
_CURRENCIES = ("$", "€", "£", "¥", "₹")
_CODES = ("USD", "EUR", "GBP", "CHF", "INR")
_WITHIN = re.compile(r"√[({]?$|\^\(?$|/\s?\(?$")  # a part of a formula
_GOES_ON = re.compile(r"[π√∞^]|\)\s?/")
_SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "k": 10**3,
    "millionen": 10**6, "milliarden": 10**9, "mio": 10**6, "mrd": 10**9, "lakh": 10**5, "crore": 10**7,
    "万": 10**4, "億": 10**8, "亿": 10**8,
}  # fmt: skip
_SCALE = re.compile(r"[ \u202f-]?(?P<word>[Mm]illi(?:on|arde)(?:s|en)?|[^\W\d_]{3,9})\b|(?P<k>k\b|[万億亿])")
_PERCENT = re.compile(r"\s?(?:%(?!%)|percent\b|per cent\b|Prozent\b)")
_EUROPEAN = re.compile(
    r"\d\.\d{3},\d|(?<![\d.,])\d+,\d{1,2}(?![\d,])|\bEuros?\b|\b(?:Antwort|réponse"
    r"|respuesta|risposta|resposta)\b"
)


def numerals(text: str, at_cue: bool = False) -> list[Numeral]:
    """The numbers of a plain text, in order.

    at_cue: the text follows what announces an answer, so that a dash before it is a minus.
    """
    european = bool(_EUROPEAN.search(text))
    return list(_numerals(text, european, at_cue))


def _numerals(text: str, european: bool, at_cue: bool) -> Iterator[Numeral]:
    for match in _NUMERAL.finditer(text):
        start, end = match.span()
        money = _money_before(text, start)
        sign = _SIGN.search(text, max(0, money - 2), money)
        glued = text[money - 1 : money] if money else ""
        if glued.isascii() and glued.isalpha() and money == start:
            continue  # a part of a name: H2O
        readings = () if match["odd"] else _value(match, european)
        if _WITHIN.search(text[max(0, start - 3) : start]) or _GOES_ON.match(text, end):
            readings = ()
        start, written = money, match[0]
        if (negative := _negative_from(text, start, sign, at_cue)) is not None:
            readings, start, written = tuple(-value for value in readings), negative, "-" + written
        percent = _PERCENT.match(text, end)
        if percent:
            end, written = percent.end(), written + "%"
        elif (scale := _SCALE.match(text, end)) and (
            factor := _SCALES.get((scale["word"] or scale["k"]).lower().rstrip("s"))
        ):
            end, written = scale.end(), written + scale[0]
            readings = tuple(value * factor for value in readings)
        yield Numeral(start, end, written.strip(), readings, percent is not None)


def _money_before(text: str, start: int) -> int:
    """Where a number begins with its currency, and with a minus behind that."""
    place = start - (
        text[start - 1 : start] in ("-", "\u2013") and text[start - 2 : start - 1] in _CURRENCIES
    )
    place -= place > 0 and text[place - 1] in " \u202f"
    if place and text[place - 1] in _CURRENCIES:
        return place - 3 if text[max(0, place - 3) : place - 1] == "US" else place - 1
    code = text[max(0, place - 3) : place]
    return place - 3 if code in _CODES and not text[max(0, place - 4) : place - 3].isalpha() else start


def _negative_from(text: str, start: int, sign: re.Match[str] | None, at_cue: bool) -> int | None:
    """Where the sign begins that makes a number negative; None for bullets, hyphens, operators."""
    if text[start : start + 1] in _CURRENCIES and text[start + 1 : start + 2] in ("-", "\u2013"):
        return start
    if text[start - 2 : start] in ("s ", "e ") and (
        word := _MINUS_WORD.search(text, max(0, start - 14), start)
    ):
        return None if word[1] else word.start()
    if sign is None or sign[0][0] == "+":
        return None
    touching = text[sign.start() - 1 : sign.start()] if sign.start() else ""
    prior = text[max(0, sign.start() - 20) : sign.start()].rstrip(" \u202f")[-1:]
    if prior.isdigit() or prior in (")", "%") or touching.isalpha():
        return None
    if sign[0][-1] in " \u202f":  # a dash and a space: a bullet, or text goes on
        is_minus = prior in ("=", "(", "[", "{", ":", "\u2248") or (at_cue and not prior)
        return sign.start() if is_minus else None
    return sign.start()


def _value(match: re.Match[str], european: bool) -> tuple[Fraction, ...]:
    """What a matched number may mean, without its sign."""
    found = digits(match["digits"], european)
    if match["exponent"] or match["tens"]:
        exponent = int((match["exponent"] or "e" + match["tens"])[1:])
        return tuple(value * Fraction(10) ** exponent for value in found) if abs(exponent) <= LONGEST else ()
    if match["power"]:
        power = int(match["power"])
        return tuple(v**power for v in found if (v or power > 0) and v < 10**6 and abs(power) <= 60)
    if match["bottom"]:
        bottoms = [value for value in digits(match["bottom"], european) if value]
        return () if match["chain"] or not bottoms else tuple(value / bottoms[0] for value in found)
    if match["top"]:
        top, under = int(match["top"]), int(match["under"])
        return tuple(v + Fraction(top, under) for v in found if v.denominator == 1 and 0 < top < under)
    return found


def digits(written: str, european: bool = False) -> tuple[Fraction, ...]:
    """What digits with separators may mean; nothing where they are no number."""
    if len(written) > LONGEST:
        return ()
    if re.fullmatch(r"\d+|\.\d+|\d+\.\d+", written):
        plainly = Fraction(written)
        grouped = european and re.fullmatch(r"[1-9]\d{0,2}\.\d{3}", written)
        return (plainly, Fraction(written.replace(".", ""))) if grouped else (plainly,)
    for group in (" ", "\u202f", "_", "'"):
        if group in written:
            whole, mark, rest = re.fullmatch(r"([^.,]*)([.,]?)(.*)", written, re.DOTALL).groups()  # type: ignore[union-attr]
            if not re.fullmatch(rf"\d{{1,3}}(?:{group}\d{{3}})+", whole) or (mark and not rest.isdigit()):
                return ()
            return (Fraction(whole.replace(group, "") + (f".{rest}" if mark else "")),)
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?", written):
        if written.startswith("0"):
            return (Fraction(written.replace(",", ".")),) if written.count(",") == 1 else ()
        english = Fraction(written.replace(",", ""))
        decimal = european and re.fullmatch(r"\d+,\d+", written)
        return (english, Fraction(written.replace(",", "."))) if decimal else (english,)
    if re.fullmatch(r"\d{1,3}(?:\.\d{3})+(?:,\d+)?|\d+,\d+", written):
        return (Fraction(written.replace(".", "").replace(",", ".")),)
    return ()


# ---------------------------------------------------------------- words

_UNITS = {
    word: number
    for number, word in enumerate(
        re.findall(
            r"\w+",
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
            " sixteen seventeen eighteen nineteen",
        )
    )
}
_TENS = {
    word: 10 * number
    for number, word in enumerate(
        re.findall(r"\w+", "twenty thirty forty fifty sixty seventy eighty ninety"), 2
    )
}
_BIG = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_WORD = "|".join((*_UNITS, *_TENS, *_BIG, "hundred"))
_WORDS = re.compile(
    rf"\b(?P<minus>(?:minus|negative)\s)?(?P<words>(?:{_WORD})\b(?:(?:\s|-|\sand\s)(?:{_WORD})\b){{0,12}})",
    re.IGNORECASE,
)
_MORE = re.compile(
    r"\s(?:and\sa\s)?(?:half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|eighths?"
    r"|tenths?|point|of|or|to"
    r"|more|another|that|who|which)\b|-\w",
    re.IGNORECASE,
)


def in_words(text: str) -> Numeral | None:
    """The number that a text says in English words, where it says one alone."""
    found = [match for _, match in zip(range(2), _WORDS.finditer(text), strict=False)]
    if len(found) != 1 or _MORE.match(text, found[0].end()):
        return None
    total = part = 0
    for word in re.findall(r"[a-z]+", found[0]["words"].lower()):
        if word in _BIG:
            total, part = total + (part or 1) * _BIG[word], 0
        elif word == "hundred":
            part = (part or 1) * 100
        elif word != "and":
            part += _UNITS.get(word, _TENS.get(word, 0))
    value = Fraction(-(total + part) if found[0]["minus"] else total + part)
    return Numeral(*found[0].span(), found[0][0], (value,))
