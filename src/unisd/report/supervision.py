"""Shows the supervision: completions of the training, token by token.

Coloured by what the teachers said, with every view's log-probability under the pointer. A person
sees *where the teachers disagree*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from unisd.report.html import clean, data_block, render

MAX_SHOWN = 16
MAX_TOKENS = 300
SHADES = {
    "divergence": "divergence of teacher and student",
    "weight": "reliability weight (stronger: trusted less)",
    "contrast": "contrast with the wrong reference",
    "contexts": "spread of the contexts' log-probabilities",
}
"""Modes and their names; the style sheet knows each by the custom property `--MODE`."""
Record = dict[str, Any]


def supervision(records: Sequence[Record]) -> Markup:
    """The section, or nothing if the run recorded no completion."""
    chosen = spread(records)
    tops = {
        name: max((x for r in chosen for x in shades(r)[name] if x is not None), default=0.0) or 1.0
        for name in SHADES
    }
    used = [name for name in SHADES if any(x for r in chosen for x in shades(r)[name] if x)] or ["divergence"]
    return render(
        "supervision.html",
        modes=[(name, SHADES[name]) for name in used],
        tops=any(any(record.get("teacher_top") or ()) for record in chosen),
        cards=[_card(record, tops) for record in chosen],
        data=data_block("samples", [_data(record) for record in chosen]),
    )


def spread(records: Sequence[Record]) -> list[Record]:
    """At most `MAX_SHOWN` whole records from all over the training, in its order."""
    whole = [
        record for record in records if "student_logp" in record and isinstance(record.get("tokens"), list)
    ]
    if len(whole) <= MAX_SHOWN:
        return whole
    return [whole[round(place * (len(whole) - 1) / (MAX_SHOWN - 1))] for place in range(MAX_SHOWN)]


def shades(record: Record) -> dict[str, list[float | None]]:
    """What each mode colours by, per token: 0 is no colour, None a token without loss."""
    count = len(record["tokens"])
    contexts = record.get("auxiliary_logp") or []
    spans: list[float | None] = [None] * count
    if len(contexts) > 1:
        for place in range(count):
            values = [values[place] for values in contexts if values[place] is not None]
            spans[place] = max(values) - min(values) if values else None
    margin = min((x for x in record.get("contrast") or [] if x is not None), default=0.0)
    return {
        "divergence": [None if x is None else max(x, 0.0) for x in record["divergence"]],
        "weight": [None if x is None else max(1.0 - x, 0.0) for x in record["weight"]],
        # Tokens on which the two references agree have the margin, and no colour.
        "contrast": [
            None if x is None else max(x - margin, 0.0) for x in record.get("contrast") or [None] * count
        ],
        "contexts": spans,
    }


def _card(record: Record, tops: dict[str, float]) -> Record:
    """What the template shows of an answer."""
    shade = shades(record)
    likelier = record.get("teacher_top") or [None] * len(record["tokens"])
    tokens = []
    for place, text in enumerate(record["tokens"][:MAX_TOKENS]):
        style = "".join(
            f"--{name}:{(shade[name][place] or 0.0) / tops[name]:.2f};"
            for name in SHADES
            if shade[name][place]
        )
        marks = {
            "off": record["divergence"][place] is None,
            "clip": record["clipped"][place],
            "nl": "\n" in text,
        }
        classes = " ".join(["t", *(name for name, marked in marks.items() if marked)])
        tokens.append({"text": text, "style": style, "classes": classes, "top": likelier[place]})
    return {
        "step": int(record["step"]),
        "id": record.get("id", ""),
        "correct": record.get("correct"),
        "feedback": record.get("feedback"),
        "prompt": record["prompt"],
        "reference": record["reference"],
        "tokens": tokens,
        "left": max(len(record["tokens"]) - MAX_TOKENS, 0) + record.get("cut", 0),
    }


def _data(record: Record) -> Record:
    """What the pointer asks for."""
    names = (
        "student_logp",
        "teacher_logp",
        "negative_logp",
        "divergence",
        "weight",
        "contrast",
        "entropy",
        "clipped",
        "teacher_top",
        "teacher_top_logp",
    )
    data = {name: None if record.get(name) is None else record[name][:MAX_TOKENS] for name in names}
    # Weights that look at the student are not recorded: all 1 says that there was no other.
    if data["weight"] is not None and all(weight in (None, 1.0) for weight in data["weight"]):
        data["weight"] = None
    data["auxiliary_logp"] = [values[:MAX_TOKENS] for values in record.get("auxiliary_logp") or []]
    if (likelier := data["teacher_top"]) is not None:
        data["teacher_top"] = [None if text is None else clean(text) for text in likelier]
    data["tokens"] = [clean(text) for text in record["tokens"][:MAX_TOKENS]]
    return data
