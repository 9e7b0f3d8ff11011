"""Compare the option that a completion settles on with gold's.

What counts as a statement, in the order in which it is believed:

1. `\\boxed{B}`, `#### B`, "the answer is B", "Answer: B", "I choose B", "B is the correct answer":
   the last of them. A change of mind ("A... no, B") counts as one.
2. a line that is a letter alone, or the only line that begins with one ("B. paradise").
3. "it must be B", "so (B)", "option B is correct".
4. a letter that is merely named ("option B", "(B)"), if it is the only one.

A letter that is rejected ("not A", "A is wrong", "rule out B and C") is no answer, whatever its
form; several at once ("B or C", "A, B") settle nothing and are *ambiguous*. Where the row's options
are known, an option's own text is read like its letter. The article A and the pronoun I are no
letters.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from unisd.data.thoughts import answer_of
from unisd.errors import UserError
from unisd.tasks.base import Grade
from unisd.tasks.graders import phrases
from unisd.tasks.graders.base import Candidate, Grader, Reading, shown
from unisd.tasks.graders.letters import LEADING, LOOSE, MARKER, NAMED, Said, clean, say, without_run_on

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LAST = 12_000  # characters of a completion that are looked at
USUAL = 10  # letters that are looked for where the row's options are not known
OPTION_KEYS = ("options", "choices")
ANSWER_KEYS = (
    *("answer", "label", "answerKey", "answer_key", "correct", "correct_answer", "gold", "letter", "key"),
    *("answer_idx", "answer_index", "index", "value", "text", "aliases", "answers"),
)
_CUED = re.compile(
    r"(?:\b(?:answer|antwort|respuesta|r\u00e9ponse|risposta|resposta|\u043e\u0442\u0432\u0435\u0442)\b"
    r"|\b(?:correct|right|best) (?:option|choice|one)\b|\u7b54\u6848|\u7b54\u3048|\u6b63\u89e3|\uc815\ub2f5)"
    r"[^.!?\n]{0,60}?(?:[:=]|\b(?:is|was|es|est|ist)\b|\u662f|\u4e3a|\u306f|\uc740) ?([^\n]{1,300})",
    re.IGNORECASE,
)
_NEGATED = re.compile(
    r"\b(?:not|never|neither|cannot|wrong|incorrect|rather than|instead of)\b|n['\u2019]t\b", re.I
)


@dataclass(frozen=True)
class Option:
    """What a completion settles on: a letter, and the text that it gave (folded)."""

    letter: str
    text: str = ""


def _whole(value: object) -> int | None:
    """A small whole number, as such or in digits."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if isinstance(value, bool) else str(value).strip()
    return int(text) if text.isdecimal() and text.isascii() and len(text) < 4 else None


@dataclass(frozen=True)
class Gold:
    """Gold, parsed: letters, any of which is right, and the row's options where they are known.

    texts: gold as text, folded, where no options say which letter it is.
    """

    letters: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()
    options: tuple[str, ...] = ()


class Choice(Grader):
    """Gold is a letter or a text that settles on one ("Answer: B"), or a list of them.

    With the row's options, as `{"answer": ..., "options": [...]}`, it may also be an option's text
    or its index, a whole number from 0. Without them a number may count from 0 or from 1: rows of a
    file are refused then (`gold_of`), and to a number alone either letter is right. A text that
    names no letter is then compared with the text that a completion gives ("Answer: B) paradise"),
    and a bare letter is never right.
    """

    name = "choice"
    takes = "a letter"

    def read_gold(self, value: object) -> Gold:
        options: tuple[str, ...] = ()
        labels: tuple[str, ...] = ()
        if isinstance(value, Mapping):
            key = next((key for key in OPTION_KEYS if value.get(key) is not None), None)
            if key is not None:
                labels, options = read_options(value[key])
            value = _answer_in(value, self)
        if hasattr(value, "tolist"):
            value = value.tolist()
        several = list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
        if not several:
            raise self.refuse(value)
        letters, texts = set(), set()
        for one in several:
            if not options and (number := _whole(one)) is not None:
                letters |= set(ALPHABET[max(number - 1, 0) : number + 1])
                continue
            letter, text = self._one(one, labels, options)
            letters |= {letter} if letter else set()
            texts |= {text} if text else set()
        return Gold(frozenset(letters), frozenset(texts), options)

    def gold_of(self, row: Mapping[str, Any], answer: object) -> object:
        """Gold with the row's options, where a column holds them and gold does not."""
        key = next((key for key in OPTION_KEYS if row.get(key) not in (None, "")), None)
        held = isinstance(answer, Mapping) and any(answer.get(key) is not None for key in OPTION_KEYS)
        several = answer if isinstance(answer, (list, tuple)) else [answer]
        if key is None and any(_whole(one) is not None for one in several):
            raise UserError(
                f"choice: gold {shown(answer)} is a number, which may count from 0 or from 1: give the"
                " letter, or the row's options (a column options or choices), with which it counts from 0"
            )
        return answer if key is None or held else {"answer": answer, "options": row[key]}

    def _one(self, value: object, labels: tuple[str, ...], options: tuple[str, ...]) -> tuple[str, str]:
        """The letter of one answer, or its text where no letter is known for it."""
        if isinstance(value, Mapping):
            value = _answer_in(value, self)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
            raise self.refuse(value)
        text = str(value).strip()
        named = [i for i, option in enumerate(options) if fold(option) == fold(text)]
        letter = text.strip("()[]{}*. ").upper()
        lettered = ALPHABET.find(letter) if len(letter) == 1 else -1
        labelled = labels.index(text) if text in labels else lettered if not labels else -1
        if named and lettered >= len(options):  # options called x and y
            labelled = -1
        number = _whole(value)
        if number is not None and labelled < 0:
            return ALPHABET[self._index(number, value, named, options)], ""
        if named and labelled >= 0 and named != [labelled]:
            raise UserError(
                f"choice: gold {shown(value)} is one option's letter and another one's text: give the letter"
            )
        place = labelled if labelled >= 0 else named[0] if len(named) == 1 else None
        if place is None and (said := self._settled(text)):
            place = ALPHABET.index(said)
        if place is not None:
            if options and place >= len(options):
                raise UserError(f"choice: gold {shown(value)} is beyond the row's {len(options)} options")
            return ALPHABET[place], ""
        if options:
            raise UserError(
                f"choice: gold {shown(value)} is none of the row's {len(options)} options: give its letter"
            )
        if self.read(text).hedge and len(text) < 12:
            raise UserError(
                f"choice: gold {shown(value)} names several letters: give one, or a list of which any is"
                " right"
            )
        return "", fold(text)

    def _index(self, number: int, value: object, named: list[int], options: tuple[str, ...]) -> int:
        """The place that a number stands for."""
        if named:
            if named != [number]:
                if isinstance(value, str):
                    return named[0]
                raise UserError(
                    f"choice: gold {value!r} is an index, and the text of another option: give the letter"
                )
            return number
        if number >= len(options):
            raise UserError(
                f"choice: gold {shown(value)} is not an index of {len(options)} options, which count"
                " from 0: give"
                " the letter"
            )
        return number

    def _settled(self, text: str) -> str:
        """The letter that a gold text states ("The answer is B because ...")."""
        found = self.read(text).chosen
        if found is None or found.how == "mention":
            return ""
        return str(found.value.letter)

    def refuse(self, value: object) -> UserError:
        """The error for gold that is no answer."""
        return UserError(
            f'choice: gold {shown(value)} is not an answer: give a letter, "Answer: B", a list of them, or,'
            " with the row's options (a column options or choices), an option's text or its index from 0"
        )

    def read(self, completion: str, options: Sequence[str] = ()) -> Reading:
        text = without_run_on(clean(completion[-LAST:]))
        most = min(max(len(options), USUAL), len(ALPHABET))
        said = say(text, most)
        hints = [one for one in said if not one.rejects and len(one.letters) == 1]
        stated: Said | Candidate | None = _settle(said, MARKER)
        if stated is None:
            by_text = _option_text(text, options)
            stated = _settle(said, LOOSE) or by_text or _settle(said, NAMED) or _mentioned_text(text, options)
        candidates = [
            Candidate(one.letters[0], Option(one.letters[0], fold(one.behind)), one.how)
            for one in sorted(hints, key=lambda one: (one.strength, -one.place))
        ]
        if isinstance(stated, Candidate):
            return Reading((stated, *candidates), stated)
        if stated is None:
            return Reading(tuple(candidates))
        if len(stated.letters) > 1:
            return Reading(tuple(candidates), None, f"names {_listed(stated.letters)}")
        letter = stated.letters[0]
        chosen = Candidate(letter, Option(letter, fold(stated.behind)), stated.how)
        others = tuple(one for one in candidates if one != chosen)
        return Reading((chosen, *others), chosen)

    def equal(self, value: Any, gold: Gold) -> bool:
        given = value.text
        named = given and any(given == text or given.startswith(f"{text} ") for text in gold.texts)
        return bool(named or value.letter in gold.letters)

    def grade(self, completion: str, gold: Gold) -> Grade:
        """Judge a completion by parsed gold; options that gold knows are read by their texts."""
        found = self.read(answer_of(completion), gold.options or tuple(sorted(gold.texts)))
        grade = self.judged(found, gold)
        if found.chosen is None or grade.correct or gold.letters or found.chosen.value.text:
            return grade
        reason = "a letter alone cannot be compared with gold's text: give the row's options"
        return replace(grade, reason=reason)


choice = Choice()


def fold(text: str) -> str:
    """A text as options are compared: case, Unicode form, spaces, and what surrounds it dropped."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip(" .,:;!?()[]{}<>\"'*`_-\u2013\u2014\u201c\u201d\u2018\u2019\u3002").strip()


def read_options(value: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Labels (none where letters are meant) and texts of a row's options, in their order.

    Raises:
        UserError: they are no list of texts, no object of labels, nor labels and texts beside each
            other.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str):  # a cell
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    labels: list[object] = []
    texts: list[object] = []
    if isinstance(value, Mapping):
        pair = next(
            ((value["label"], value[k]) for k in ("text", "texts") if k in value and "label" in value), None
        )
        labels, texts = (list(pair[0]), list(pair[1])) if pair else (list(value), list(value.values()))
    elif isinstance(value, (list, tuple)):
        texts = list(value)
        if texts and all(isinstance(one, Mapping) and "text" in one for one in texts):
            labels = [one.get("label") for one in texts]  # type: ignore[attr-defined]
            texts = [one["text"] for one in texts]  # type: ignore[index]
            labels = [] if None in labels else labels
    plain = all(isinstance(one, (str, int, float)) for one in texts)
    if not 2 <= len(texts) <= len(ALPHABET) or not plain or (labels and len(labels) != len(texts)):
        raise UserError(
            f"choice: the options {shown(value)} are not a list of 2 to {len(ALPHABET)} texts, nor an"
            " object of"
            " letters and texts"
        )
    named = tuple(str(one).strip() for one in labels)
    shorn = [re.sub(rf"^[(\[]?{ALPHABET[i]}[.):\]]\s+", "", str(one).strip()) for i, one in enumerate(texts)]
    if any(short == str(one).strip() for short, one in zip(shorn, texts, strict=True)):
        shorn = [str(one).strip() for one in texts]
    return () if named == tuple(ALPHABET[: len(named)]) else named, tuple(shorn)


def _answer_in(value: Mapping[Any, Any], grader: Choice) -> object:
    """The answer that an object holds; refuses one that holds none, or several that differ."""
    found = [value[key] for key in ANSWER_KEYS if value.get(key) is not None]
    if not found:
        raise grader.refuse(dict(value))
    return found[0]


def _settle(said: Sequence[Said], weakest: int) -> Said | None:
    """The statement that is believed, of those that are at least so strong; None where none is."""
    rejections = [one for one in said if one.rejects]
    for strength in range(weakest + 1):
        kept = []
        for one in said:
            if one.rejects or one.strength != strength:
                continue
            gone = {
                letter
                for other in rejections
                for letter in other.letters
                if (other.place > one.place and (other.firmly or strength > MARKER or len(one.letters) > 1))
                or (strength in (LEADING, NAMED))
            }
            letters = tuple(letter for letter in one.letters if letter not in gone)
            if letters:
                kept.append(Said(letters, one.strength, one.how, one.place, one.behind))
        if not kept:
            continue
        if strength in (MARKER, LOOSE):
            return kept[-1]
        letters = tuple(dict.fromkeys(letter for one in kept for letter in one.letters))
        if strength == LEADING and len(letters) > 1 and list(letters) != sorted(letters):
            return kept[-1]
        last = kept[-1]
        return Said(letters, strength, last.how, last.place, last.behind if len(letters) == 1 else "")
    return None


def _listed(letters: Sequence[str]) -> str:
    return f"{', '.join(letters[:-1])} and {letters[-1]}"


def _option_text(text: str, options: Sequence[str]) -> Candidate | None:
    """An option that is given by its text: after "the answer is", as the last line, or alone."""
    if not options:
        return None
    folded = [fold(option) for option in options]
    for match in reversed([*_CUED.finditer(text), *phrases.BOXED.finditer(text)]):
        if (
            match[1]
            and not _NEGATED.search(match[0][:80])
            and (place := _begins(fold(match[1]), folded)) is not None
        ):
            return _by_text(place, options, "stated")
    lines = [line for line in text.split("\n") if line.strip()]
    for line in (text, lines[-1] if lines else ""):
        if len(line) < 400 and fold(line) in folded:
            return _by_text(folded.index(fold(line)), options, "last line")
    return None


def _begins(text: str, folded: Sequence[str]) -> int | None:
    """The longest option with which a text begins, at a border of words."""
    text = (
        re.sub(r"^(?:the|an?) (?=\S)", "", text) if not any(text.startswith(one) for one in folded) else text
    )
    fitting = [i for i, one in enumerate(folded) if one and re.match(rf"{re.escape(one)}(?!\w)", text)]
    return max(fitting, key=lambda i: len(folded[i])) if fitting else None


def _mentioned_text(text: str, options: Sequence[str]) -> Candidate | None:
    """The only option whose text occurs at all, where nothing is negated."""
    if len(options) < 2 or _NEGATED.search(text):
        return None
    whole = fold(text)
    found = [i for i, one in enumerate(options) if re.search(rf"(?<!\w){re.escape(fold(one))}(?!\w)", whole)]
    return _by_text(found[0], options, "mention") if len(found) == 1 else None


def _by_text(place: int, options: Sequence[str], how: str) -> Candidate:
    letter = ALPHABET[place] if len(options) > 1 else ""
    return Candidate(options[place], Option(letter, fold(options[place])), how)
