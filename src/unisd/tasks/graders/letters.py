"""Find option letters in a text, and what is said of each: stated, rejected, weighed, or named.

A text is cleaned of markup, cut into lines and sentences, and each sentence is searched for groups
of letters ("B", "B or C", "options A, C and D"). What stands before and behind a group within its
sentence says what it is. All patterns have bounded repeats, so that time is linear.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from unisd.tasks.graders import phrases

MOST_LETTERS = 200
MOST_SENTENCES = 1000
WINDOW = 160  # characters before a letter that say what it is
MARKER, LEADING, LOOSE, NAMED = range(4)
"""How strong a statement is; NAMED is a mere mention."""


@dataclass(frozen=True)
class Said:
    """What one place of a text says of one or several letters.

    place: where, in the order of the text. behind: the text that follows the letter.
    rejects: they are said to be wrong; firmly: as the answer ("it is not A"), not in passing.
    """

    letters: tuple[str, ...]
    strength: int
    how: str
    place: int
    behind: str = ""
    rejects: bool = False
    firmly: bool = False


def clean(text: str) -> str:
    """A text in one Unicode form, without markup, white space within lines collapsed."""
    text = unicodedata.normalize("NFKC", text)
    text = phrases.ANSWER_TAG.sub(r" \\boxed{\2} ", text)
    for _ in range(2):
        text = phrases.TEX.sub(r"\1", text)
    text = phrases.TAG.sub("", phrases.MARKUP.sub("", text))
    text = "\n".join(" ".join(line.split()) for line in text.splitlines())
    text = phrases.BOTH_BOXED.sub(", ", text)
    return phrases.OR_ELSE.sub(" or ", phrases.NEXT_LINE.sub(r"\1 ", text))


def without_run_on(text: str) -> str:
    """What stands before the first question that a model went on to ask itself."""
    found = phrases.RUN_ON.search(text, 1)
    return text[: found.start()] if found and text[: found.start()].strip() else text


def say(text: str, most: int) -> list[Said]:
    """All that a cleaned text says of its first `most` letters, in its order.

    Of a text with more than `MOST_LETTERS` letters, or `MOST_SENTENCES`, the end is looked at.
    """
    places = [match.start() for match in phrases.ONE.finditer(text)]
    if len(places) > MOST_LETTERS:
        text = text[max(0, places[-MOST_LETTERS] - WINDOW) :]
    ends = [match.end() for match in phrases.ENDS.finditer(text)]
    if len(ends) > MOST_SENTENCES:
        text = text[ends[-MOST_SENTENCES] :]
    found: list[Said] = []

    def mark(how: str, match: re.Match[str]) -> str:
        taken = how == "boxed"
        inner = next((part for part in match.groups() if part), "").strip()
        inner = re.sub(
            r"^(?:the )?(?:final )?(?:answer|ans)(?: is)? ?[:=]? ?", "", inner, flags=re.IGNORECASE
        )
        if group := phrases.GROUP.match(inner):
            letters, behind = _letters(group[0], most), inner[len(group[0].rstrip()) :]
            sure = how != "final marker" and (
                letters not in (("A",), ("I",)) or phrases.GOES_ON.match(behind)
            )
            if letters and (sure or not behind.strip(" .")):
                found.append(Said(letters, MARKER, how, match.start(), behind))
                taken = True
        return " " * len(match[0]) if taken else match[0]

    for pattern, how in (
        (phrases.BOXED, "boxed"),
        (phrases.HASHES, "final marker"),
        (phrases.DOUBLE, "final marker"),
    ):
        text = pattern.sub(lambda match, how=how: mark(how, match), text)  # type: ignore[misc]
    found += _Lines(text, most).said()
    return sorted(found, key=lambda one: one.place)


def _letters(group: str, most: int) -> tuple[str, ...]:
    """The different letters of a group, upper case; empty where one is beyond the options."""
    found = phrases.ONE.findall(group)
    if any(letter.isupper() for letter in found):  # "B o C": the others are words
        found = [letter for letter in found if letter.isupper()]
    letters = tuple(dict.fromkeys(letter.upper() for letter in found))
    return letters if all(ord(letter) - 65 < most for letter in letters) else ()


class _Context(NamedTuple):
    """A group of letters, what stands before and behind it, and how its sentence ends."""

    group: str
    before: str
    behind: str
    ends: str


class _Lines:
    """The lines of a text, one after another: what they say may depend on those before."""

    def __init__(self, text: str, most: int) -> None:
        self.text, self.most = text, most
        self.revising = 0  # sentences for which a change of mind still counts
        self.found: list[Said] = []

    def said(self) -> list[Said]:
        place, labels = 0, []
        for line in self.text.split("\n"):
            head = phrases.LINE_HEAD.match(line)
            start = place + (head.end() if head else 0)
            body = line[head.end() if head else 0 :]
            label = phrases.LABEL.match(body)
            if (
                label
                and _letters(label[1], self.most)
                and not phrases.VERB.match(body[label.end() : label.end() + 12])
            ):
                labels.append((label[1].upper(), start, body[label.end() :]))
            elif body.strip():
                self._sentences(body, start)
            place += len(line) + 1
        self._labels(labels)
        return self.found

    def _labels(self, labels: list[tuple[str, int, str]]) -> None:
        """Lines that begin "B." or "B)": an answer where it is one, else options with verdicts."""
        for letter, place, rest in labels:
            first = rest[:80]
            others = {
                found
                for group in phrases.GROUP.finditer(rest[:200])
                for found in _letters(group[0], self.most)
                if group[0].strip()[:1] in "(["
            }
            no = re.match(r"\W{0,3}no\b", first, re.IGNORECASE)
            if (no or phrases.SAID_WRONG.search(f"is{first}")) and not phrases.RIGHT.match(first):
                self.found.append(Said((letter,), NAMED, "mention", place, rest, rejects=True))
            elif re.match(r"\W{0,3}(?:this is )?(?:correct|right|true|yes)\b", first.strip(), re.IGNORECASE):
                self.found.append(Said((letter,), LOOSE, "stated", place, rest))
            elif len({name for name, _, _ in labels}) == 1 and others <= {letter}:
                self.found.append(Said((letter,), LEADING, "last line", place, rest))
            elif len({name for name, _, _ in labels}) == 1:  # several are the options, repeated
                self.found.append(Said((letter,), NAMED, "mention", place, rest))
                self._sentences(rest, place + 1)

    def _sentences(self, line: str, place: int) -> None:
        """The sentences of a line."""
        start = 0
        alone = re.fullmatch(rf" ?{phrases.ITEM} ?[.,:!)]{{0,3}} ?", line, re.IGNORECASE)
        if alone and (letters := _letters(line, self.most)) and (letters != ("I",) or _named(line)):
            self.found.append(Said(letters, LEADING, "last line", place))
            return
        for cut in [*(match for match in phrases.SENTENCE.finditer(line)), None]:
            end = cut.end() if cut else len(line)
            sentence = line[start:end]
            self.revising -= 1
            if phrases.STARTS_AGAIN.match(sentence.lstrip()):
                self.revising = 3
            if phrases.THAT_IS_WRONG.match(sentence):
                self._void(place + start)
            self.found += self._groups(sentence, place + start)
            start = end

    def _void(self, place: int) -> None:
        """ "But that is wrong": of what was stated last."""
        stated = [one for one in self.found if not one.rejects and one.strength < NAMED]
        if stated:
            self.found.append(Said(stated[-1].letters, NAMED, "mention", place, rejects=True, firmly=True))

    def _groups(self, sentence: str, place: int) -> Iterator[Said]:
        """What a sentence says of its groups of letters."""
        kept: list[tuple[int, str]] = []
        last = 0
        for match in phrases.GROUP.finditer(sentence):
            written = match[0].rstrip()
            end = match.start() + len(written)
            group, rest = self._article(written, sentence[end : end + 60])
            before = sentence[max(last, match.start() - WINDOW) : match.start()]
            if _letters(group, self.most) and self._counts(group, before, rest, whole=sentence):
                kept.append((match.start(), group))
                last = match.start() + len(group)
        earlier, last = None, 0
        ends, mark = [start for start, _ in kept[1:]] + [len(sentence)], sentence.rstrip()[-1:]
        for (start, group), until in zip(kept, ends[: len(kept)], strict=True):
            before, behind = sentence[max(last, start - WINDOW) : start], sentence[start + len(group) : until]
            letters, last = _letters(group, self.most), start + len(group)
            if earlier is not None and self._goes_with(earlier, group, before, behind):
                joined = tuple(dict.fromkeys(earlier.letters + letters))
                earlier = Said(joined, earlier.strength, earlier.how, place + start)
                yield earlier
                continue
            for one, ahead, after in _split(group, letters, before, behind):
                said = self._judge(one, _Context(group, ahead, after, mark), place + start, earlier)
                if said is not None:
                    yield said
                    earlier = said

    @staticmethod
    def _article(group: str, behind: str) -> tuple[str, str]:
        """Drop a last "A" or "I" that is an article or a pronoun: "B, I think"."""
        tail = re.search(r"[ ,;]{1,2}(?:and |or )?[AaI]$", group)
        if tail and not phrases.GOES_ON.match(behind):
            return group[: tail.start()], group[tail.start() :] + behind
        return group, behind

    @staticmethod
    def _goes_with(earlier: Said, group: str, before: str, behind: str) -> bool:
        """Whether a group belongs to the one before: "(B) paradise or (C) hell"."""
        conjunction = phrases.OR.search(before)
        if (
            not conjunction
            or earlier.rejects
            or earlier.strength == NAMED
            or phrases.BREAK.search(before[: conjunction.start()])
        ):
            return False
        if conjunction[0].startswith("and") and group.strip()[:1] not in "([":
            return False
        return not phrases.VERB.match(behind) and not phrases.SAID_WRONG.search(behind[:80])

    def _counts(self, group: str, before: str, behind: str, whole: str) -> bool:
        """Whether a group names options: no article, no pronoun, no abbreviation in a sentence."""
        letter = phrases.ONE.findall(group)[0]
        if letter.isupper():
            if _named(group):
                spoken = (
                    len(phrases.ONE.findall(group)) > 1
                    or " " in group
                    or group.strip()[:1] in phrases.BRACKETS
                )
                return spoken or letter not in "AI" or bool(phrases.GOES_ON.match(behind))
            if letter == "I":
                return bool(re.match(r" ?(?:[).:;!?]|$)| (?:because|since)\b", behind)) and _cued(before)
            return letter != "A" or bool(phrases.GOES_ON.match(behind))
        ends = (
            re.match(r" ?(?:[).,:;!?\]]|$)| (?:because|since|-|\u2014)", behind)
            or group.strip()[-1:] in ")]\"'"
        )
        if group.strip()[:1] in phrases.BRACKETS and (len(whole) < 40 or phrases.LOOSELY.search(before)):
            return True
        if _named(group) and letter not in "ai" and " " in group.strip() and phrases.GOES_ON.match(behind):
            return True
        if not ends:
            return False
        return _named(group) or (len(whole) < 30 and bool(phrases.MUSES.search(before))) or _cued(before)

    def _judge(
        self, letters: tuple[str, ...], context: _Context, place: int, earlier: Said | None
    ) -> Said | None:
        """What the words around a group say of it; None where they say nothing of an option."""
        group, before, behind, ends = context
        parts = phrases.BREAK.split(before)
        clause = phrases.NO_DOUBT.sub("", parts[-1])[-60:]
        states = phrases.STATES.search(before)
        if states and phrases.LISTS.search(states["mid"] or ""):
            states = None
        short = phrases.BREAK.split(behind, maxsplit=1)[0][:80]
        firmly = bool(states or phrases.LOOSELY.search(before) or self.revising > 0)
        rejected = (
            phrases.NOT.search(clause) and not phrases.UNDECIDED.search(clause)
        ) or phrases.BAD_LABEL.search(before[-60:])
        passing = phrases.SAID_NOT.match(behind) or (
            phrases.SAID_WRONG.search(short) and not re.search(r"\bnot\b", short)
        )
        denied = phrases.SAID_NOT.match(behind)
        if rejected or denied or (passing and not states):
            strict = firmly and bool(rejected or self.revising > 0)
            how = "denied" if rejected or denied else "mention"
            return Said(letters, NAMED, how, place, behind, rejects=True, firmly=strict)
        if phrases.THAT_IS_WRONG.match(behind.lstrip(" ,")):
            return Said(letters, NAMED, "mention", place, behind, rejects=True, firmly=True)
        near = before[_clause_start(before, states.start()) :] if states else parts[-1]
        unsure: object = ends == "?" or phrases.MAYBE.search(near) or phrases.MAYBE.match(behind.lstrip(" ,"))
        unsure = unsure or (phrases.WERE.search(before) and not re.search(r"\bi\b", near, re.IGNORECASE))
        revised = phrases.REVISES.search(before)
        strength = NAMED
        if unsure and not revised:
            strength = NAMED
        elif (
            states
            or revised
            or phrases.CHOOSES.search(before)
            or phrases.THE_ANSWER.match(behind)
            or (
                earlier is not None
                and earlier.how == "denied"
                and phrases.INSTEAD.search(before)
                and not phrases.VERB.match(behind)
            )
        ):
            strength = MARKER
        elif (phrases.LOOSELY.search(before) and not re.match(r" ?[=<>+^]", behind)) or phrases.RIGHT.match(
            behind
        ):
            strength = LOOSE
        elif not before.strip(" -\u2022") and re.match(
            r" ?(?:[,.:;!\u2014]|$)| -| (?:because|since|as)\b", behind
        ):
            strength = LEADING if _named(group) or letters != ("I",) else NAMED
        if strength in (LOOSE, LEADING) and self.revising > 0:
            strength = MARKER
        if strength == NAMED and not _named(group) and not states and not phrases.MUSES.search(before):
            return None
        how = {MARKER: "stated", LEADING: "last line", LOOSE: "stated", NAMED: "mention"}[strength]
        return Said(letters, strength, how, place, behind)


def _cued(before: str) -> bool:
    """Whether what stands before a letter announces an answer."""
    return bool(
        phrases.STATES.search(before) or phrases.CHOOSES.search(before) or phrases.REVISES.search(before)
    )


def _clause_start(text: str, end: int) -> int:
    """Where the clause that goes on at `end` begins."""
    return max((match.end() for match in phrases.BREAK.finditer(text, 0, end)), default=0)


def _named(group: str) -> bool:
    """Whether a group is more than a bare letter: "(B)", "option B", "A, B"."""
    return len(group.strip(" \"'")) > 1


def _split(
    group: str, letters: tuple[str, ...], before: str, behind: str
) -> list[tuple[tuple[str, ...], str, str]]:
    """Groups with what stands before and behind: "B, A is wrong" says something of A alone."""
    singular = re.match(
        r" ?(?:is|was|(?:is|was|does|has)n['\u2019]t|has|does|fits|works|looks|seems|remains|makes)\b", behind
    )
    if len(letters) > 1 and singular:
        last = phrases.ONE.findall(group)[-1].upper()
        others = tuple(letter for letter in letters if letter != last)
        return [(others, before, ""), ((last,), "", behind)]
    return [(letters, before, behind)]
