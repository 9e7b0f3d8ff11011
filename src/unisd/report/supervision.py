"""Shows the supervision: completions of the training, token by token.

Coloured by what the teachers said, with every view's log-probability under the pointer. A person
sees *where the teachers disagree*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unisd.report.html import clean, data_block, escape, section

MAX_SHOWN = 16
MAX_TOKENS = 300
SHADES = {
    "divergence": "divergence of teacher and student",
    "weight": "reliability weight (stronger: trusted less)",
    "contrast": "contrast with the wrong reference",
    "contexts": "spread of the contexts' log-probabilities",
}
Record = dict[str, Any]


def supervision(records: Sequence[Record]) -> str:
    """The section, or nothing if the run recorded no completion."""
    chosen = spread(records)
    if not chosen:
        return ""
    tops = {
        name: max((x for r in chosen for x in shades(r)[name] if x is not None), default=0.0) or 1.0
        for name in SHADES
    }
    used = [name for name in SHADES if any(x for r in chosen for x in shades(r)[name] if x)] or ["divergence"]
    checked = {used[0]: " checked"}
    choices = "".join(
        f'<label class="choice"><input type="radio" name="mode" value="{name}"{checked.get(name, "")}>'
        f" {SHADES[name]}</label>"
        for name in used
    )
    cards = "".join(_card(number, record, tops) for number, record in enumerate(chosen))
    note = (
        "Answers that the student sampled while it trained. Point at a token (or tap it; arrow keys move on)"
        " for the log-probability that each view gave it, in nats. Full colour is the largest value shown"
        " here. Wavy underline: clipped. Faint: carries no loss."
    )
    view = f'<div id="supervision" data-mode="{used[0]}"><div class="controls">{choices}</div>{cards}</div>'
    return section(
        "Supervision, token by token", view, data_block("samples", [_data(r) for r in chosen]), note=note
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


def _card(number: int, record: Record, tops: dict[str, float]) -> str:
    shade = shades(record)
    tokens = []
    for place, text in enumerate(record["tokens"][:MAX_TOKENS]):
        style = "".join(
            f"--{letter}:{(shade[name][place] or 0.0) / tops[name]:.2f};"
            for letter, name in (("d", "divergence"), ("w", "weight"), ("c", "contrast"), ("s", "contexts"))
            if shade[name][place]
        )
        classes = (
            "t"
            + (" off" if record["divergence"][place] is None else "")
            + (" clip" if record["clipped"][place] else "")
        )
        classes += " nl" if "\n" in text else ""
        styled = f' style="{style}"' if style else ""
        tokens.append(f'<span class="{classes}" data-i="{place}"{styled}>{escape(text)}</span>')
    left = max(len(record["tokens"]) - MAX_TOKENS, 0) + record.get("cut", 0)
    more = f' <span class="soft">and {left} more tokens</span>' if left else ""
    correct = record.get("correct")
    verdict = (
        ""
        if correct is None
        else ', <span class="right">right</span>'
        if correct
        else ', <span class="wrong">wrong</span>'
    )
    if record.get("feedback"):
        verdict += f', <span class="soft">feedback: {escape(record["feedback"])}</span>'
    texts = f"<pre>{escape(record['prompt'])}</pre><pre>{escape(record['reference'])}</pre>"
    return (
        f'<div class="card"><span class="soft">step {int(record["step"])},'
        f" {escape(record.get('id', ''))}</span>{verdict}<details><summary>prompt and"
        f' reference</summary>{texts}</details><div class="tokens"'
        f' data-sample="{number}">{"".join(tokens)}{more}</div></div>'
    )


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
    )
    data = {name: None if record.get(name) is None else record[name][:MAX_TOKENS] for name in names}
    # Weights that look at the student are not recorded: all 1 says that there was no other.
    if data["weight"] is not None and all(weight in (None, 1.0) for weight in data["weight"]):
        data["weight"] = None
    data["auxiliary_logp"] = [values[:MAX_TOKENS] for values in record.get("auxiliary_logp") or []]
    data["tokens"] = [clean(text) for text in record["tokens"][:MAX_TOKENS]]
    return data
