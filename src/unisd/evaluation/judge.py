"""Let a model judge pairs of answers to the same prompts, each pair in both orders.

A judge tends to prefer a place, mostly the first. So an answer wins only if it is preferred in both
orders; else the pair is a tie (Zheng et al., 2023), and how often the verdict follows the place is
told. No server is known here: `ask` gets the replies.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unisd.data.thoughts import answer_of
from unisd.errors import UserError
from unisd.evaluation.grading import bootstrap, percent, wilson
from unisd.files import JUDGE, write_json

SCHEMA_VERSION = 1
MAX_REPLY = 4_000  # characters of a judge's reply that are kept
WIN, TIE, LOSS = "win", "tie", "loss"
Judgement = dict[str, Any]

NOTE = (
    "Each pair was judged in both orders. An answer wins if it is preferred in both; everything else is"
    " a tie. Equal texts are ties and are not sent to the judge. A judge is a model: if its verdict"
    " often follows the position, or if it has no reference, its verdicts mean little."
)
TASK = (
    "Two answers to the same request are given below. Decide which one is better: correct, helpful and"
    " complete. Their order and their length must not count.{told} Write a short reason first, then your"
    " verdict on the last line: [[A]] if answer A is better, [[B]] if answer B is better, [[C]] if they are"
    " equally good or bad."
)
TOLD = (
    " A reference answer is given too: what agrees with it in substance is right, whatever its wording, and"
    " what contradicts it is wrong."
)
_VERDICT = re.compile(r"\[\[([ABC])\]\]")


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; `reference` may be empty."""

    id: str
    prompt: str
    reference: str
    old: str
    new: str


@dataclass(frozen=True)
class Reply:
    """What the judge says; `failed`: why it says nothing."""

    text: str
    failed: str = ""


def question(pair: Pair, new_first: bool) -> str:
    """What the judge is asked about a pair, in one of both orders."""
    one, other = (pair.new, pair.old) if new_first else (pair.old, pair.new)
    parts = {"request": pair.prompt, "reference": pair.reference, "answer A": one, "answer B": other}
    shown = [
        f"[start of {name}]\n{text.strip() or '(nothing)'}\n[end of {name}]"
        for name, text in parts.items()
        if text or name != "reference"
    ]
    return "\n\n".join([TASK.format(told=TOLD if pair.reference else ""), *shown])


def verdict_in(reply: str) -> str | None:
    """The last verdict that a reply gives after its thought: A, B, C, or None."""
    found = _VERDICT.findall(answer_of(reply))
    return found[-1] if found else None


def judged(pairs: Sequence[Pair], ask: Callable[[list[str]], list[Reply]]) -> Judgement:
    """Ask about each pair twice; wins, ties and losses of the new answers.

    Args:
        ask: replies to questions, in their order.

    Returns:
        `wins`, `ties` and `losses` (shares of the pairs that have both verdicts), `win_rate` (a tie
        is half a win), `follows_position` (share of the pairs that were asked about in which the
        verdict names the same place in both orders), all as `grading.wilson` gives them; `counts`;
        `failed` (pairs without both verdicts, which are not counted, with the reasons) and `pairs`.

    Raises:
        UserError: no pair has both verdicts.
    """
    open_pairs = [pair for pair in pairs if pair.old.strip() != pair.new.strip()]
    asked = [question(pair, new_first) for pair in open_pairs for new_first in (False, True)]
    replies = iter(ask(asked) if asked else ())
    by_pair = {id(pair): (next(replies), next(replies)) for pair in open_pairs}
    told: list[Judgement] = []
    failed: list[dict[str, str]] = []
    places: Counter[str] = Counter()
    for pair in pairs:
        if id(pair) not in by_pair:
            told.append({"id": pair.id, "verdict": TIE, "asked": False})
            continue
        both = by_pair[id(pair)]
        first, second = (verdict_in(reply.text) for reply in both)
        if first is None or second is None:
            reason = next((one.failed for one in both if one.failed), "a reply without a verdict")
            failed.append({"id": pair.id, "reason": reason})
            continue
        verdict = {("B", "A"): WIN, ("A", "B"): LOSS}.get((first, second), TIE)
        places[first if first == second != "C" else "neither"] += 1
        texts = [reply.text[:MAX_REPLY] for reply in both]
        told.append(
            {"id": pair.id, "verdict": verdict, "asked": True, "said": [first, second], "replies": texts}
        )
    if not told:
        raise UserError(
            f"no pair has a verdict (the first: {failed[0]['reason'] if failed else 'there are no pairs'}):"
            " let another model judge, or allow longer replies (--eval_max_new_tokens)."
        )
    return {**_figures(told, places), "failed": failed, "pairs": told}


def _figures(told: Sequence[Judgement], places: Counter[str]) -> Judgement:
    counts = Counter(one["verdict"] for one in told)
    points = {WIN: 1.0, TIE: 0.5, LOSS: 0.0}
    asked = places.total()
    return {
        "wins": wilson(counts[WIN], len(told)),
        "ties": wilson(counts[TIE], len(told)),
        "losses": wilson(counts[LOSS], len(told)),
        "win_rate": bootstrap([points[one["verdict"]] for one in told]),
        "follows_position": wilson(places["A"] + places["B"], asked) if asked else None,
        "counts": {
            **{name: counts[name] for name in (WIN, TIE, LOSS)},
            "same_text": len(told) - asked,
            "always_first": places["A"],
            "always_second": places["B"],
        },
    }


def head(found: Judgement) -> list[str]:
    """The first line of the table: what stands against what."""
    old, new = found["of"]
    return [f"{new} against {old}", "share", "pairs"]


def lines(found: Judgement) -> list[list[str]]:
    """Wins, ties, losses and how far the judge is to be trusted, one line each."""
    counts, place = found["counts"], found["follows_position"]
    old, new = found["of"]
    total = str(found["wins"]["n"])
    table = [
        [f"{new} is better", percent(found["wins"]), str(counts[WIN])],
        [f"tie ({counts['same_text']} of equal texts)", percent(found["ties"]), str(counts[TIE])],
        [f"{old} is better", percent(found["losses"]), str(counts[LOSS])],
        [f"win rate of {new} (a tie is half)", percent(found["win_rate"]), total],
    ]
    if place is not None:
        which = f"{counts['always_first']} the first, {counts['always_second']} the second"
        table.append([f"verdict follows the position ({which})", percent(place), str(place["n"])])
    if found["failed"]:
        table.append(["without a verdict, not counted", "", str(len(found["failed"]))])
    return table


def read(folder: Path) -> list[Judgement]:
    """The judgements of a run, oldest first; none where it has none."""
    path = folder / JUDGE
    if not path.is_file():
        return []
    try:
        kept: list[Judgement] = json.loads(path.read_text(encoding="utf-8"))["judgements"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it, and judge again.") from None
    return kept


def keep(folder: Path, found: Judgement) -> Path:
    """Keep a judgement with its run; it takes the place of the same judge's earlier one."""
    others = [one for one in read(folder) if one["judge"] != found["judge"]]
    write_json(folder / JUDGE, {"schema_version": SCHEMA_VERSION, "judgements": [*others, found]})
    return folder / JUDGE
