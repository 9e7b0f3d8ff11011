"""Wrong references for the contrast, where the data holds none.

| kind | the wrong reference is |
|---|---|
| `corrupt` | the right one with its last number, option letter or yes/no changed |
| `model` | written by the model when asked for a plausible wrong answer |

A task may word that request. With a grader each is proved wrong before it is used; one that turns
out right is tried again, and a row for which none is found goes without (it is reported, never
dropped).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from unisd.data.contexts import read_cache, write_cache
from unisd.data.prompts import fill
from unisd.data.rows import Row
from unisd.data.text import prompt_text, words
from unisd.errors import UserError

KINDS = ("columns", "corrupt", "model")
FORMAT = 1  # of the cache
TRIES = 3
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?![\w])")
_LETTER = re.compile(r"(?<![A-Za-z])([A-E])(?=[).:,]?\s*$)")
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
    grade: Callable[[Row, str], bool] | None = None,
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
    grade: Callable[[Row, str], bool] | None,
    write: Callable[[list[str], int], list[str]] | None,
    template: str,
) -> dict[int, str]:
    """By row, the wrong references of the rows that have none yet."""
    found: dict[int, str] = {}
    waiting = [i for i, row in enumerate(rows) if not row.get("negative_context")]
    for attempt in range(TRIES):
        if kind == "corrupt":
            texts = [
                corrupted(_reference(rows[i]), random.Random(f"{seed} {attempt} {rows[i].get('id', i)}"))
                for i in waiting
            ]
        else:
            assert write is not None
            asked = [
                {"prompt": prompt_text(rows[i]["prompt"]), "privileged_context": _reference(rows[i])}
                for i in waiting
            ]
            prompts = [fill(template, **of_row) for of_row in asked]
            texts = list(write(prompts, attempt)) if prompts else []
        for i, text in zip(waiting, texts, strict=True):
            if (
                text
                and words(text) != words(_reference(rows[i]))
                and not (grade is not None and grade(rows[i], text))
            ):
                found[i] = text.strip()
        waiting = [i for i in waiting if i not in found]
    return found


def _reference(row: Row) -> str:
    return str(row.get("privileged_context") or row.get("completion") or "")


def corrupted(reference: str, rng: random.Random) -> str | None:
    """The reference with its final answer changed; None where it shows nothing that could be."""
    last = reference.rstrip().rpartition("\n")[2]
    start = len(reference.rstrip()) - len(last)
    if letter := _LETTER.search(last):
        other = rng.choice([c for c in "ABCDE" if c != letter[1]])
        return reference[: start + letter.start(1)] + other + reference[start + letter.end(1) :]
    numbers = list(_NUMBER.finditer(reference))
    if numbers:
        old = numbers[-1][0]
        return _every(reference, old, _other_number(old, rng))
    for word in re.findall(r"[A-Za-z]+", last)[::-1]:
        if word.lower() in _SWAPS:
            swapped = _SWAPS[word.lower()]
            place = start + last.rindex(word)
            return (
                reference[:place]
                + (swapped.capitalize() if word[0].isupper() else swapped)
                + reference[place + len(word) :]
            )
    return None


def _other_number(old: str, rng: random.Random) -> str:
    value = float(old.replace(",", ""))
    spread = max(3, int(abs(value)) // 4)
    new = value + rng.choice((-1, 1)) * rng.randint(1, spread)
    if value >= 0 > new:
        new = value + rng.randint(1, spread)
    return f"{new:,.0f}" if "," in old else f"{new:.{len(old.partition('.')[2])}f}"


def _every(text: str, old: str, new: str) -> str:
    """Find each mention of the last answer on the last two lines that name it.

    These are the result and the step that gives it.
    """
    mentions = [match for match in _NUMBER.finditer(text) if match[0] == old][-2:]
    for match in reversed(mentions):
        text = text[: match.start()] + new + text[match.end() :]
    return text
