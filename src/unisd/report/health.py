"""Shows a run's diagnostics: alarms in plain words, and the curves that critics ask to watch.

The critics are those of self-distillation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from unisd.files import GRADIENT
from unisd.monitoring.alarms import silence
from unisd.report import plots
from unisd.report.html import render

MAX_ALARMS = 50
MAX_WORDS = 4  # words of doubt with a line of their own: those used most
CURVES: plots.Wanted = (
    ("Words of doubt", "per 1,000 tokens", {"all": "words/all"}),
    ("Where the gold answer is first stated", "share of an answer", {"place": "leak/gold_first_place"}),
    ("Answers that state the gold answer", "share", {"stated": "leak/gold_stated_share"}),
    (
        "The final answer's share",
        "share",
        {"of the loss": "leak/answer_loss_share", "of the tokens": "leak/answer_token_share"},
    ),
    ("Teacher under a wrong reference", "JSD, nats", {"JSD": "leak/wrong_jsd"}),
    (
        "Pull that a wrong reference shares",
        "cosine",
        {"run": "leak/wrong_cosine", "told all": "leak/full_wrong_cosine"},
    ),
    (
        "The signal without the question",
        "",
        {"cosine": "leak/shift_cosine", "ratio of norms": "leak/shift_ratio"},
    ),
    ("Repeated 4-grams", "share", {"repeated": "collapse/repeated_share"}),
    (
        "Form",
        "share",
        {"in the asked form": "collapse/form_share", "style tokens": "collapse/style_token_share"},
    ),
    ("Loss on style tokens", "share", {"share": "words/style_loss_share"}),
    ("Own earlier answers to the probe set", "nats per token", {"loss": "retained/nll"}),
    ("KL to the initial model", "nats per token", {"KL": "retained/kl_to_base"}),
)


def health(
    alarms: Sequence[Mapping[str, Any]] | None,
    metrics: Sequence[Mapping[str, Any]],
    window: int,
    retained: bool = False,
) -> Markup:
    """The section; nothing where the run has neither alarms nor diagnostic metrics.

    `alarms` is None where nobody watched.

    window: the run's `alarm_window`. retained: whether skills were measured before and after.
    """
    shown = list(alarms or ())[:MAX_ALARMS]
    said = ""
    if alarms is not None and not shown:
        probed = any("retained/nll" in line or "leak/wrong_jsd" in line for line in metrics)
        counted = any("words/all" in line for line in metrics)
        steps = max((int(line["step"]) for line in metrics), default=0)
        said = silence(steps, window, counted, probed, retained)
    return render(
        "health.html",
        alarms=shown,
        more=len(alarms or ()) - len(shown),
        silence=said,
        drawn=plots.curves(
            (*CURVES, *_by_word(metrics), *_by_mechanism(metrics)),
            metrics,
            sorted({int(alarm["step"]) for alarm in shown}),
        ),
    )


def _by_mechanism(metrics: Sequence[Mapping[str, Any]]) -> plots.Wanted:
    """One figure of what each mechanism makes of the gradient."""
    keys = dict.fromkeys(key for line in metrics for key in line if key.startswith(GRADIENT))
    names = {key.removeprefix(GRADIENT): key for key in keys}
    return [("Share of the gradient", "share", names)] if names else []


def _by_word(metrics: Sequence[Mapping[str, Any]]) -> plots.Wanted:
    """One figure of the words that are used most: a loop of one word hides in the sum."""
    total: dict[str, float] = {}
    for line in metrics:
        for key, value in line.items():
            if key.startswith("words/") and key not in ("words/all", "words/style_loss_share"):
                total[key] = total.get(key, 0.0) + (value or 0.0)
    most = sorted((key for key in total if total[key] > 0), key=lambda key: (-total[key], key))[:MAX_WORDS]
    names = {key.removeprefix("words/")[:24]: key for key in most}
    title = "Doubt, word by word" if len(names) > 1 else f"Word of doubt: {''.join(names)}"
    return [(title, "per 1,000 tokens", names)] if names else []
