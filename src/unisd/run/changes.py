"""Says what a run has changed: acquisition, retention and drift, each apart.

Acquisition is the task's accuracy. Retention is what the model could do before, item by item. Drift
is how far its free answers have moved. A single number for "forgetting" would hide which of them it
is. Light: a report reads it without torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from unisd.console import BETTER, NOISE, WORSE, number
from unisd.errors import by_caller
from unisd.evaluation.grading import detail_lines, percent, unsettled_lines
from unisd.monitoring.alarms import FORGOTTEN_NATS, at_most

CLEARLY = 0.01
"""Chance of as many lost items, with as many gained, in a model that has kept its skills."""
LOST_AT_LEAST = 0.05  # of the items, less those gained
CHANCE = 0.05
"""Chance below which lost and gained items are more than noise, as of the 95 % intervals."""
DRIFT = {
    "reverse": "drift: perplexity of the base's answers",
    "forward": "drift: perplexity of answers under the base",
    "kl": "drift: KL from the base, nats per token",
}
HEAD = ("measure", "before", "after", "change")
"""Of the table of `change_lines`; a terminal leaves the first empty."""
Figures = dict[str, Any]
Line = tuple[list[str], str]
"""Measure, before, after and change; and how a terminal shows the change."""


def items(before: Sequence[bool], after: Sequence[bool]) -> Figures:
    """Count the items that were kept, lost, gained and right neither time.

    `p`: of McNemar's exact test, that lost and gained ones differ by chance alone.
    """
    pairs = list(zip(before, after, strict=True))
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    p = min(1.0, 2 * at_most(min(lost, gained), lost + gained, 0.5)) if lost + gained else 1.0
    kept, neither = pairs.count((True, True)), pairs.count((False, False))
    return {"kept": kept, "lost": lost, "gained": gained, "neither": neither, "p": p}


def change(before: float | None, after: float | None) -> Figures | None:
    """A figure before and after, and its change; None where it was not measured."""
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return None
    return {"before": before, "after": after, "change": after - before}


def drift_of(detail: Mapping[str, Any] | None, name: str) -> Figures | None:
    """The part `drift` of `results.json`, from what `evaluation.retention` gives.

    `reverse`: perplexity of the base's answers, under the base and under the model. `forward`:
    perplexity under the base, of its own answers and of the model's. `kl`: of base and model on the
    base's answers, nats per token. A model that has not changed has the changes 0.
    """
    if detail is None:
        return None
    reverse, forward = detail["reverse"], detail["forward"]
    return {
        "set": name,
        "rows": detail["n"],
        "tokens": reverse["tokens"],
        "reverse": change(reverse["own_ppl"], reverse["ppl"]),
        "forward": change(reverse["own_ppl"], forward["ppl"]),
        "kl": change(0.0, reverse["kl"]),
        "nats": reverse["delta"],
    }


def clearly_lost(found: Figures) -> bool:
    """Whether items (see `items`) were lost beyond chance, and by a share that matters."""
    count = sum(found[name] for name in ("kept", "lost", "gained", "neither"))
    return bool(found["p"] < CLEARLY and found["lost"] - found["gained"] >= LOST_AT_LEAST * count)


def moved_far(drift: Figures) -> bool:
    """Whether the base's own answers have become clearly less likely, by an amount that matters."""
    nats = drift["nats"]
    return nats is not None and bool(nats["value"] > FORGOTTEN_NATS and nats["low"] > 0)


def forgotten(retention: Sequence[Figures], drift: Figures | None) -> str | None:
    """Say in words what was lost from before the training to after it; None: nothing clear.

    Items lost beyond chance and by a share that matters, or the base's own answers less likely by
    more than `FORGOTTEN_NATS` a token, beyond chance.
    """
    said = []
    for one in retention:
        found = one["items"]
        if clearly_lost(found):
            said.append(
                f"{found['lost']} of {found['kept'] + found['lost']} items of {one['name']} that were right"
                f" are lost, {found['gained']} gained"
            )
    if drift is not None and moved_far(drift):
        nats = drift["nats"]
        said.append(
            f"the base's own answers to {drift['set']} lost {nats['value']:.2f} nats per token (perplexity"
            f" {drift['reverse']['before']:.2f} to {drift['reverse']['after']:.2f})"
        )
    if not said:
        return None
    part = by_caller("--graft_scales", "`unisd merge`")
    return f"{'; '.join(said)}: lower the rate, train for fewer steps, or keep a part of the change ({part})."


def change_lines(results: Figures) -> list[list[str]]:
    """Measure, before, after and change, one line each; skills indented under their total.

    First what was acquired, then what was kept, then how far answers have moved.
    """
    return [cells for cells, _ in _lines(results)]


def change_styles(results: Figures) -> list[str]:
    """How a terminal shows the change of each of these lines; "" where noise is not told apart."""
    return [style for _, style in _lines(results)]


def _lines(results: Figures) -> list[Line]:
    before, after = results["before"], results["after"]
    old, new = (side_of(side, "task_accuracy", "skills") for side in (before, after))
    lines = _accuracy_lines("task accuracy", old, new, results["acquisition"]["items"])
    lines += [(cells, "") for cells in detail_lines(before, after) + unsettled_lines(before, after)]
    if after["gold_ppl"] is not None and before["gold_ppl"] is not None:
        found = change(before["gold_ppl"], after["gold_ppl"])
        lines.append((_ppl_line("perplexity of the references", found), ""))
    for one in results["retention"]:
        old, new, found = *(side["retention"][one["name"]] for side in (before, after)), one["items"]
        lines += _accuracy_lines(f"retention: {one['name']}", old, new, found)
        counts = f"{found['kept']} / {found['lost']} / {found['gained']}"
        cells = ["  items kept / lost / gained", "", counts, f"p {found['p']:.2g}"]
        lines.append((cells, _style_of_items(found)))
    return lines + _drift_lines(results["drift"])


def direction(found: Figures) -> int:
    """1 where more items were gained than lost beyond chance, -1 where fewer, else 0."""
    if found["p"] >= CHANCE:
        return 0
    return 1 if found["gained"] > found["lost"] else -1


def _style_of_items(found: Figures) -> str:
    """By McNemar's test of the very items, which tells more than two intervals."""
    return {0: NOISE, 1: BETTER, -1: WORSE}[direction(found)]


def _style_of_shares(was: Figures, now: Figures) -> str:
    if now["low"] <= was["high"] and was["low"] <= now["high"]:
        return NOISE
    return BETTER if now["value"] > was["value"] else WORSE


def _style_of_nats(lost: Figures | None) -> str:
    """Of the nats per token that the base's own answers have lost."""
    if lost is None:
        return ""
    return WORSE if lost["low"] > 0 else BETTER if lost["high"] < 0 else NOISE


def side_of(side: Figures, accuracy: str, skills: str) -> Figures:
    """An accuracy and its skills, as each retention set has them."""
    return {"accuracy": side[accuracy], "skills": side[skills]}


def _accuracy_lines(name: str, old: Figures, new: Figures, found: Figures | None = None) -> list[Line]:
    """Lines of an accuracy and its skills; `found`: its items, where they are known."""
    if old["accuracy"] is None or new["accuracy"] is None:
        return []
    pairs = [(name, old["accuracy"], new["accuracy"])]
    pairs += [(f"  {skill}", old["skills"][skill], share) for skill, share in (new["skills"] or {}).items()]
    styles = [_style_of_shares(was, now) for _, was, now in pairs]
    if found is not None:
        styles[0] = _style_of_items(found)
    return [
        ([what, percent(was), percent(now), f"{100 * (now['value'] - was['value']):+.1f}"], style)
        for (what, was, now), style in zip(pairs, styles, strict=True)
    ]


def _ppl_line(name: str, found: Figures | None) -> list[str]:
    if found is None:
        return [name, "-", "-", "-"]
    return [name, number(found["before"]), number(found["after"]), f"{found['change']:+.3f}"]


def _drift_lines(drift: Figures | None) -> list[Line]:
    if drift is None:
        return []
    styles = {"reverse": _style_of_nats(drift["nats"])}
    return [(_ppl_line(name, drift[what]), styles.get(what, "")) for what, name in DRIFT.items()]
