"""Wrong references for the contrast, where the data holds none.

| kind | the wrong reference is |
|---|---|
| `corrupt` | the right one with its last number, date, time, option letter or yes/no changed |
| `model` | written by the model when asked for a plausible wrong answer |

What is changed keeps its form: digits, separators, leading zeros; dates and times stay valid, and a
letter becomes another option of the row. A task may word the request to the model. With a grader
each is proved wrong before it is used; one that turns out right is tried again, and a row for which
none is found goes without (it is reported, never dropped).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unisd.data.contexts import read_cache, write_cache
from unisd.data.privilege import MARK, final_answer
from unisd.data.prompts import fill
from unisd.data.rows import Row
from unisd.data.text import prompt_text, reference_of, words
from unisd.errors import UserError

KINDS = ("columns", "corrupt", "model")
FORMAT = 3  # of the cache: graders, too, are part of what is kept
TRIES = 3
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_FORM = re.compile(
    rf"""(?<![\w.])(?:
      (?P<date>\d{{4}}([-/.])\d{{1,2}}\2\d{{1,2}} | \d{{1,2}}([-/.])\d{{1,2}}\3\d{{4}}
        | {_MONTH}\s\d{{1,2}},?\s\d{{4}} | \d{{1,2}}\s{_MONTH},?\s\d{{4}})
    | (?P<time>\d{{1,2}}:\d\d(?::\d\d)?)
    | (?P<number>-?(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?)(?P<percent>\s?%)?
    )(?!\w)""",
    re.VERBOSE | re.IGNORECASE,
)
_LETTER = re.compile(r"(?<![^\W\d_])([A-Ja-j])(?=[).:,\]]*\s*$)")
_FIRST_LETTER = re.compile(r"\(?([A-Ja-j])(?![^\W_])")
_OPTION = re.compile(r"(?:^|(?<=[\s(\[]))([A-Ja-j])[).:\]](?=\s)", re.MULTILINE)
_YEARS = range(1500, 2100)
_SWAPS = {"yes": "no", "no": "yes", "true": "false", "false": "true"}

WRONG_ANSWER = (
    "{prompt}\n\nThis is the right answer:\n{privileged_context}\n\nWrite an answer in the same form that"
    " looks plausible but is wrong: another final answer, with reasons that lead to it. Write the wrong"
    " answer only."
)


def build(
    rows: Sequence[Row],
    kind: str,
    *,
    seed: int = 0,
    grade: Callable[[Row, str], Any] | None = None,
    write: Callable[[list[str], int], list[str]] | None = None,
    template: str | None = None,
    model_key: str = "",
    cache_dir: Path | None = None,
) -> list[Row]:
    """The rows with `negative_context`, where one was found; rows that have one keep it.

    Args:
        grade: proves it wrong; without one it only has to differ from the reference.
        write: for `model`: (prompts, try number) -> texts that the model writes.
        template: what the model is asked, with `{prompt}` and `{privileged_context}`; None:
            `WRONG_ANSWER`.
        model_key: name and revision of the model behind `write`, and of the grader, for the cache.
        cache_dir: where to keep what a model wrote, so that a run that goes on has the same; None:
            nowhere.

    Raises:
        UserError: an unknown kind.
    """
    if kind not in KINDS[1:]:
        raise UserError(f"negatives={kind!r} is not one of {', '.join(KINDS)}.")
    path, template = None, template or WRONG_ANSWER
    if cache_dir is not None and kind == "model":
        parts = [
            [row.get(name) for name in ("prompt", "privileged_context", "completion", "negative_context")]
            for row in rows
        ]
        key = hashlib.sha256(
            json.dumps([FORMAT, template, seed, model_key, parts], default=str).encode()
        ).hexdigest()[:24]
        path = cache_dir / f"negatives-{key}.json"
    if (kept := read_cache(path)) is None:
        kept = _proved_wrong(rows, kind, seed, grade, write, template)
        write_cache(path, kept)
    found: dict[int, str] = {int(i): text for i, text in kept.items()}
    return [row | {"negative_context": found[i]} if i in found else row for i, row in enumerate(rows)]


def _proved_wrong(
    rows: Sequence[Row],
    kind: str,
    seed: int,
    grade: Callable[[Row, str], Any] | None,
    write: Callable[[list[str], int], list[str]] | None,
    template: str,
) -> dict[int, str]:
    """By row, the wrong references of the rows that have none yet."""
    found: dict[int, str] = {}
    waiting = [i for i, row in enumerate(rows) if not row.get("negative_context")]
    for attempt in range(TRIES):
        if kind == "corrupt":
            texts = [
                corrupted(
                    reference_of(rows[i]),
                    random.Random(f"{seed} {attempt} {rows[i].get('id', i)}"),
                    options_of(prompt_text(rows[i]["prompt"])),
                )
                for i in waiting
            ]
        else:
            assert write is not None
            asked = [
                {"prompt": prompt_text(rows[i]["prompt"]), "privileged_context": reference_of(rows[i])}
                for i in waiting
            ]
            prompts = [fill(template, **of_row) for of_row in asked]
            texts = list(write(prompts, attempt)) if prompts else []
        for i, text in zip(waiting, texts, strict=True):
            if (
                text
                and words(text) != words(reference_of(rows[i]))
                and not _same_answer(text, reference_of(rows[i]))
                and not (grade is not None and grade(rows[i], text))
            ):
                found[i] = text.strip()
        waiting = [i for i in waiting if i not in found]
    return found


def _same_answer(text: str, reference: str) -> bool:
    """Whether both state the same final answer, where the reference marks one."""
    return bool(re.search(MARK, reference)) and final_answer(text) == final_answer(reference)


def options_of(prompt: str) -> str:
    """The letters of a prompt's options, in their order; empty where it shows none."""
    found = dict.fromkeys(match[1] for match in _OPTION.finditer(prompt))
    for first in "Aa":
        letters = ""
        while (letter := chr(ord(first) + len(letters))) in found:
            letters += letter
        if len(letters) > 1:
            return letters
    return ""


def corrupted(reference: str, rng: random.Random, options: str = "") -> str | None:
    """The reference with its final answer changed; None where it shows nothing that could be.

    Args:
        options: letters that are options of the row; empty: not known.
    """
    start, marked = _stated(reference)
    last = reference[start:].rstrip()
    letter = _LETTER.search(last) or (_FIRST_LETTER.match(last) if marked and options else None)
    if letter and letter[1] in (options or "ABCDE"):
        other = rng.choice([c for c in options or "ABCDE" if c != letter[1]])
        return reference[: start + letter.start(1)] + other + reference[start + letter.end(1) :]
    said = list(re.finditer(r"[A-Za-z]+", last))
    behind = last[said[0].end() :] if said else ""
    # the answer, before what it is given for; "No. 5" and "True positives: 5" are none
    ends = not re.match(r"\.?\s*\d", behind) if marked else re.match(r"[,;:]|\W*$", behind)
    if said and said[0][0].lower() in _SWAPS and ends:
        return _swapped(reference, start, said[0])
    forms = list(_FORM.finditer(reference))
    if forms:
        # of a marked answer its own, before those of its reasons
        form = next((form for form in forms if marked and form.start() >= start), forms[-1])
        return _every(reference, form[0], _other(form, rng))
    swaps = [word for word in said if word[0].lower() in _SWAPS]
    return _swapped(reference, start, swaps[-1]) if swaps else None


def _stated(reference: str) -> tuple[int, bool]:
    """Where the final answer begins, and whether a mark says so; else where the last line does."""
    marks = list(re.finditer(MARK, reference))
    if marks and reference[marks[-1].end() :].strip():
        return marks[-1].end(), True
    return reference.rstrip().rfind("\n") + 1, False


def _swapped(reference: str, start: int, word: re.Match[str]) -> str:
    """The reference with yes for no, or the reverse."""
    other = _SWAPS[word[0].lower()]
    other = other.upper() if word[0].isupper() else other.capitalize() if word[0].istitle() else other
    return reference[: start + word.start()] + other + reference[start + word.end() :]


def _other(form: re.Match[str], rng: random.Random) -> str:
    """Another date, time or number of the same form."""
    if form["date"]:
        return _other_date(form[0], rng)
    if form["time"]:
        hours, minutes, *seconds = form[0].split(":")
        new = rng.choice([minute for minute in range(60) if minute != int(minutes)])
        return ":".join([hours, f"{new:02}", *seconds])
    percent = form["percent"] or ""
    return _other_number(form["number"], rng, bool(percent)) + percent


def _other_date(old: str, rng: random.Random) -> str:
    """The same with another day, which all months have."""
    parts = list(re.finditer(r"\d+", old))
    short = [part for part in parts if len(part[0]) < 3]
    # of two, the day is what cannot be a month; else what stands after the month in ISO's order
    day = next((part for part in short if int(part[0]) > 12), short[-1 if len(parts[0][0]) == 4 else 0])
    low, high = (1, 9) if len(day[0]) == 1 else (1 if day[0][0] == "0" else 10, 28)
    if day[0][0] == "0":
        high = 9
    if len(short) > 1 and int(day[0]) <= 12:  # it may be read as a month too
        high = min(high, 12)
    new = rng.choice([number for number in range(low, high + 1) if number != int(day[0])])
    return old[: day.start()] + f"{new:0{len(day[0])}}" + old[day.end() :]


def _other_number(old: str, rng: random.Random, percent: bool = False) -> str:
    """Another number near it, with as many digits, the same sign and separators."""
    whole, point, decimals = old.partition(".")
    digits = whole.replace(",", "").removeprefix("-")
    if digits == "0" and decimals.strip("0"):  # a share, a probability: stays below 1
        return f"{whole}.{_other_number('1' + decimals, rng)[1:]}"
    if len(digits) > 15:  # beyond what a float holds: one digit changes
        place = len(whole) - 1 - rng.randrange(3)  # before it a comma may stand
        return f"{old[:place]}{(int(old[place]) + rng.randint(1, 9)) % 10}{old[place + 1 :]}"
    value = float(old.replace(",", ""))
    spread = max(3, int(abs(value)) // 4)
    if not point and "," not in old and int(value) in _YEARS:
        spread = 30

    def written(number: float) -> str:
        text = f"{abs(number):.{len(decimals)}f}"
        head, _, tail = text.partition(".")
        head = head.zfill(len(digits)) if digits[0] == "0" else head
        head = f"{int(head):,}" if "," in whole else head
        return ("-" if number < 0 else "") + head + point + tail

    step = rng.choice((-1, 1)) * rng.randint(1, spread)
    fitting = [
        text
        for number in (value + step, value - step)
        if len(text := written(number)) == len(old)
        and (number < 0) == (value < 0)
        and not (percent and abs(value) <= 100 < abs(number))
    ]
    return fitting[0] if fitting else written(value - abs(step) if value > 0 else value + abs(step))


def _every(text: str, old: str, new: str) -> str:
    """Find each mention of the last answer on the last two lines that name it.

    These are the result and the step that gives it.
    """
    mentions = [match for match in _FORM.finditer(text) if match[0] == old][-2:]
    for match in reversed(mentions):
        text = text[: match.start()] + new + text[match.end() :]
    return text
