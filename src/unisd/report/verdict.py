"""Says what a run has come to: the task, what must not be lost, drift and alarms, each apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unisd.console import number
from unisd.monitoring.alarms import FORGOTTEN_NATS
from unisd.run.changes import clearly_lost, direction, moved_far

GOOD, BAD, OPEN = "good", "bad", ""
CHANGED = {1: ("learned", GOOD), 0: ("no clear change", OPEN), -1: ("worse", BAD)}
TASK, ALARMS = "task", "alarms"
MOVED_KL = 0.1
"""Nats per token from the base, up to which a model still says about what it said."""
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Tile:
    """A figure with a verdict in words; `kind` colours it."""

    name: str
    value: str
    word: str = ""
    note: str = ""
    kind: str = OPEN


def tiles_of(results: Figures) -> list[Tile]:
    """The verdicts on a finished run."""
    return [*_task(results), *_retention(results), *_drift(results), _alarms(results.get("alarms"))]


def sentence(tiles: Sequence[Tile]) -> str:
    """The same in one line: the figures of the task, the words of the others, alarms if any."""
    task = [f"{tile.value}{f' ({tile.word})' if tile.word else ''}" for tile in tiles if tile.name == TASK]
    others = [f"{tile.name}: {tile.word}" for tile in tiles if tile.word and tile.name not in (TASK, ALARMS)]
    alarms = [f"alarms: {tile.value}" for tile in tiles if tile.name == ALARMS and tile.kind == BAD]
    return "; ".join([*task, *others, *alarms])


def _task(results: Figures) -> Iterator[Tile]:
    before, after = (results[when]["task_accuracy"] for when in ("before", "after"))
    if before is None or after is None:
        old, new = (results[when]["gold_ppl"] for when in ("before", "after"))
        if old is not None and new is not None:
            value = f"{number(old)} \u2192 {number(new)}"
            yield Tile(TASK, value, note="perplexity of the references: nothing grades the answers")
        return
    change = after["value"] - before["value"]
    note = f"{100 * change:+.1f} points, {after['n']} rows"
    found = results["acquisition"]["items"]
    word, kind = "", OPEN
    if found is not None:
        note += f", p {found['p']:.2g}"
        word, kind = CHANGED[direction(found)]
    yield Tile(TASK, _from_to(before, after), word, note, kind)


def _retention(results: Figures) -> Iterator[Tile]:
    before, after = results["before"], results["after"]
    for one in results["retention"]:
        old, new = (side["retention"][one["name"]]["accuracy"] for side in (before, after))
        found, several = one["items"], len(results["retention"]) > 1
        if clearly_lost(found):
            word, kind = "forgotten", BAD
        elif direction(found) < 0:  # beyond chance, but below the share that is an alarm
            word, kind = "small loss", OPEN
        else:
            word, kind = "no clear loss", GOOD
        yield Tile(
            f"retention of {one['name']}" if several else "retention",
            _from_to(old, new),
            word,
            f"{found['lost']} lost, {found['gained']} gained, p {found['p']:.2g}",
            kind,
        )


def _drift(results: Figures) -> Iterator[Tile]:
    drift = results["drift"]
    if drift is None or drift["kl"] is None:
        return
    far, nats = moved_far(drift), drift["nats"]
    note = "KL from the base, nats per token"
    if nats is not None:
        note += f"; its own answers lost {nats['value']:.3f} [{nats['low']:.3f}, {nats['high']:.3f}]"
    near = drift["kl"]["after"] <= MOVED_KL and (nats is None or nats["high"] <= FORGOTTEN_NATS)
    word = "far from the base" if far else "near the base" if near else "moved; no clear loss"
    yield Tile("drift", number(drift["kl"]["after"]), word, note, BAD if far else GOOD if near else OPEN)


def _alarms(alarms: Any) -> Tile:
    if alarms is None:
        return Tile(ALARMS, "-", "not watched")
    names = ", ".join(dict.fromkeys(str(alarm["name"]) for alarm in alarms))
    return Tile(ALARMS, str(len(alarms)), note=names[:200], kind=BAD if alarms else OPEN)


def _from_to(old: Figures, new: Figures) -> str:
    return f"{100 * old['value']:.1f} \u2192 {100 * new['value']:.1f} %"
