"""Raises alarms: what has gone wrong since the first steps, in plain words, with the remedy.

From the metrics of the steps.

The one place that judges a run's health. A rule compares the first `window` steps with the last
ones: medians, and of what is rare the sums of counts, with a test whether chance would do as much;
the sums of a probe are added up over the run. What was not measured says nothing. Light: it knows
metrics by their names in `metrics.jsonl`, and neither models nor torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

Values = Mapping[str, float]

NGRAM = 4
FORGOTTEN_NATS = 0.03  # a token: an answer of 60 tokens has become 6 times less likely
DOUBT_AT_LEAST = 2.0  # per 1,000 tokens at the start; with fewer there is nothing to lose
# That chance does as much with a rate that has not changed; every step asks again, so it must be
# small. 20 words that are gone pass.
DOUBT_BY_CHANCE = 1e-5
STATED_AT_LEAST = 24  # answers that state the gold answer, in either window
STATED_SIGMAS = 3.5  # of the widest variance that shares with such a mean can have
REPEATED_AT_LEAST = 0.10
CUT_AT_MOST = 0.9  # of the first step's answers
UNSURE_NATS = 0.05  # a token, beside twice the entropy of the start
PROBED_AT_LEAST = 24  # answers; of fewer a cosine is noise
PROBED_IN_WINDOW = 16
BLINDER_AT_MOST = 0.15  # than the same teacher on the same tokens, told all
BLINDED_AT_MOST = 0.45  # since the first steps: other answers, so there is more noise
SUMS = ("leak/pull_", "counted/")  # metrics that are added up, over a window and over the run
PULLS = ("leak/pull_both", "leak/pull_right", "leak/pull_wrong")
TOLD_ALL = ("leak/pull_full_both", "leak/pull_full_right", "leak/pull_full_wrong")


@dataclass(frozen=True)
class Alarm:
    """Something that went wrong, the step at which it was seen, and what to do."""

    name: str
    step: int
    text: str


def short_answers(first: Values, last: Values) -> str | None:
    before, now = first["completions/mean_length"], last["completions/mean_length"]
    if now >= 0.2 * before:
        return None
    return (
        f"answers shrank from {before:.0f} to {now:.0f} tokens: the student stops explaining; lower the rate."
    )


def long_answers(first: Values, last: Values) -> str | None:
    before, now = first["completions/mean_length"], last["completions/mean_length"]
    if now <= 5 * before:
        return None
    return (
        f"answers grew from {before:.0f} to {now:.0f} tokens: look at them; lower the rate, or set"
        " mask_truncated_completions."
    )


def no_end(first: Values, last: Values) -> str | None:
    before, now = 1 - first["completions/truncated_share"], 1 - last["completions/truncated_share"]
    if before < 0.5 or now >= 0.5 * before:
        return None
    return (
        f"only {100 * now:.0f} % of the answers end (at first {100 * before:.0f} %): raise"
        " max_completion_length, or set mask_truncated_completions."
    )


def never_ends(first: Values) -> str | None:
    """Judge the very first step: answers that hardly ever end are not worth a window of steps."""
    cut = first.get("completions/truncated_share")
    if cut is None or cut <= CUT_AT_MOST:
        return None
    return (
        f"{100 * cut:.0f} % of the first step's answers reached the limit: raise"
        " max_completion_length; if they continue after their end (see samples.jsonl), set eos_token_id"
        " in the model's"
        " generation_config.json to the token that ends a turn."
    )


def entropy_collapsed(first: Values, last: Values) -> str | None:
    before, now = first["student/entropy"], last["student/entropy"]
    if now >= 0.02 * before:
        return None
    return (
        f"the student's entropy fell from {before:.3g} to {now:.3g} nats: it always says the same"
        " thing; lower the"
        " rate."
    )


def entropy_exploded(first: Values, last: Values) -> str | None:
    before, now = first["student/entropy"], last["student/entropy"]
    if now <= 3 * before + 0.5:
        return None
    return (
        f"the student's entropy rose from {before:.3g} to {now:.3g} nats: its answers become random; lower"
        " the rate."
    )


def drift(first: Values, last: Values) -> str | None:
    before, now = first["teacher/divergence"], last["teacher/divergence"]
    if now <= 3 * before + 0.1:
        return None
    return f"student and teacher drift apart, from {before:.3g} to {now:.3g} nats per token: lower the rate."


def suppressed_doubt(first: Values, last: Values) -> str | None:
    words, words_now = first["counted/doubt"], last["counted/doubt"]
    tokens, tokens_now = max(first["counted/tokens"], 1.0), max(last["counted/tokens"], 1.0)
    before, now = 1000 * words / tokens, 1000 * words_now / tokens_now
    if before < DOUBT_AT_LEAST or now >= 0.3 * before:
        return None
    if (
        at_most(round(words_now), round(words + words_now), tokens_now / (tokens + tokens_now))
        > DOUBT_BY_CHANCE
    ):
        return None
    return (
        f"words of doubt fell from {before:.1f} to {now:.1f} per 1,000 tokens: the student stops"
        " checking itself; show the teacher less (teacher_context=hints), or lower the rate."
    )


def at_most(found: int, of: int, share: float) -> float:
    """Chance of `found` or fewer successes of `of`, each with probability `share`.

    So is the second of two counts of rare events with one rate, given their sum.
    """
    whole = math.lgamma(of + 1)
    return sum(
        math.exp(
            whole
            - math.lgamma(k + 1)
            - math.lgamma(of - k + 1)
            + k * math.log(share)
            + (of - k) * math.log1p(-share)
        )
        for k in range(found + 1)
    )


def collapse(first: Values, last: Values) -> str | None:
    """Find the first signs of collapse.

    Repetition that doubles while the divergence falls, or that grows far; answers that grow while
    the divergence falls; or entropy that doubles while the divergence does not grow: the first
    sign, where student and teacher go astray together.
    """
    divergence, divergence_now = first["teacher/divergence"], last["teacher/divergence"]
    repeated, repeated_now = first["collapse/repeated_share"], last["collapse/repeated_share"]
    length, length_now = first["completions/mean_length"], last["completions/mean_length"]
    fell = divergence > 0 and divergence_now < 0.2 * divergence
    drop = f"divergence fell {100 * (1 - divergence_now / divergence):.0f} % while " if fell else ""
    repeats = repeated_now > max(2 * repeated, REPEATED_AT_LEAST)
    if repeats and (fell or repeated_now > repeated + 0.2):
        return (
            f"{drop}repetition rose from {100 * repeated:.0f} to {100 * repeated_now:.0f} % of all"
            f" {NGRAM}-grams: the student is copying itself; use a fixed or restarted teacher"
            " (teacher_model_kind=base, restart), or lower the rate."
        )
    if fell and length_now > 1.5 * length:
        return (
            f"{drop}answers grew from {length:.0f} to {length_now:.0f} tokens: teacher and student go"
            " wrong together; restart the teacher or lower the rate."
        )
    entropy, entropy_now = first["student/entropy"], last["student/entropy"]
    if entropy_now > max(2 * entropy, entropy + UNSURE_NATS) and divergence_now < 1.5 * divergence:
        return (
            f"the student's entropy rose from {entropy:.3g} to {entropy_now:.3g} nats, and the teacher is"
            " hardly farther away: they go wrong together; lower the rate, or use a fixed or restarted"
            " teacher (teacher_model_kind=base, restart)."
        )
    return None


def early_answer(first: Values, last: Values) -> str | None:
    count, count_now = first["counted/stated"], last["counted/stated"]
    stated, stated_now = first["leak/gold_stated_share"], last["leak/gold_stated_share"]
    if min(count, count_now) < STATED_AT_LEAST or stated_now < 0.8 * stated:
        return None
    place, place_now = first["counted/places"] / count, last["counted/places"] / count_now
    middle = (first["counted/places"] + last["counted/places"]) / (count + count_now)
    noise = math.sqrt(middle * (1 - middle) * (1 / count + 1 / count_now))
    if not (place > 0.2 and place_now < 0.5 * place and place - place_now > STATED_SIGMAS * noise):
        return None
    return (
        f"the gold answer is first stated after {100 * place_now:.0f} % of an answer (at first"
        f" {100 * place:.0f} %): the student learns to state what it cannot know; show the teacher the steps"
        " (teacher_context=full, hints), or try target=pmi."
    )


def pull_cosine(both: float, right: float, wrong: float) -> float:
    """Cosine of two pulls, from their product and squares."""
    return both / math.sqrt(right * wrong)


def blind_teacher(first: Values, last: Values) -> str | None:
    """Measure how much of a teacher's pull is the same under a wrong reference.

    Of a teacher that is told less than all, and of one that is told all.

    Over all answers that the run has probed. A teacher that is told all is its own measure, and
    never blind.
    """
    if last["run/leak/pull_answers"] < PROBED_AT_LEAST:
        return None
    own, full = (pull_cosine(*(last[f"run/{metric}"] for metric in metrics)) for metrics in (PULLS, TOLD_ALL))
    if own <= full + BLINDER_AT_MOST:
        return None
    return (
        f"under a wrong reference the teacher pulls in nearly the same direction (cosine {own:.2f};"
        " shown the whole"
        f" reference {full:.2f}): it hardly knows what is true, and the student learns to write as if it"
        " knew; show the teacher the steps (teacher_context=full, hints)."
    )


def gone_blind(first: Values, last: Values) -> str | None:
    """Find a teacher that no longer reads its reference.

    Its pull has become the same under a wrong one.
    """
    if min(first["leak/pull_answers"], last["leak/pull_answers"]) < PROBED_IN_WINDOW:
        return None
    before, now = (pull_cosine(*(part[metric] for metric in PULLS)) for part in (first, last))
    if now <= before + BLINDED_AT_MOST:
        return None
    return (
        f"the teacher's pull has become nearly the same under a wrong reference (cosine from {before:.2f} to"
        f" {now:.2f}): it no longer reads what it is shown; use a fixed or restarted teacher"
        " (teacher_model_kind=base, restart), or lower the rate."
    )


def forgetting(before: float, now: float) -> str | None:
    """Compare two probes, of the same answers: that needs no window of steps."""
    if now <= before + FORGOTTEN_NATS:
        return None
    return (
        f"its own earlier answers to the probe set fell from {-before:.2f} to {-now:.2f} nats per token: the"
        " model loses what it should keep; lower the rate, or stop here."
    )


# Name of the alarm, the metrics that it looks at (`run/METRIC`: added up since the start), and the
# rule: middle of the first and of the last steps -> plain words.
RULES: tuple[tuple[str, tuple[str, ...], Callable[[Values, Values], str | None]], ...] = (
    ("short answers", ("completions/mean_length",), short_answers),
    ("long answers", ("completions/mean_length",), long_answers),
    ("no end", ("completions/truncated_share",), no_end),
    ("entropy collapsed", ("student/entropy",), entropy_collapsed),
    ("entropy exploded", ("student/entropy",), entropy_exploded),
    ("drift", ("teacher/divergence",), drift),
    ("suppressed doubt", ("counted/doubt", "counted/tokens"), suppressed_doubt),
    (
        "collapse",
        ("teacher/divergence", "collapse/repeated_share", "completions/mean_length", "student/entropy"),
        collapse,
    ),
    ("leak", ("counted/stated", "counted/places", "leak/gold_stated_share"), early_answer),
    (
        "blind teacher",
        tuple(f"run/{name}" for name in ("leak/pull_answers", *PULLS, *TOLD_ALL)),
        blind_teacher,
    ),
    ("gone blind", ("leak/pull_answers", *PULLS), gone_blind),
)
RETAINED = "retained/nll"
WATCHED = frozenset(metric.removeprefix("run/") for _, metrics, _ in RULES for metric in metrics) | {RETAINED}


def find(first: Values, last: Values) -> dict[str, str]:
    """Find what has gone wrong between the first and the last steps.

    By the name of the alarm: plain words with the remedy.
    """
    known = first.keys() & last.keys()
    found = {name: rule(first, last) for name, metrics, rule in RULES if known.issuperset(metrics)}
    return {name: text for name, text in found.items() if text is not None}


def middle(metric: str, values: Sequence[float]) -> float:
    """One bad step should not move it; but of a rare word most steps may have none.

    Sums are summed.
    """
    if metric.startswith(SUMS):
        return sum(values)
    return mean(values) if metric.startswith("words/") else median(values)


def silence(steps: int, window: int, counted: bool, probed: bool, retained: bool = False) -> str:
    """What it means that no alarm was raised in so many steps.

    Args:
        counted: whether the answers' words were (`diagnostics`).
        probed: whether a probe was taken (`diagnostics_probe_steps`).
        retained: whether what must not be lost was measured before and after.
    """
    short = steps < 2 * window
    if short and not (probed or retained):
        return (
            f"No alarm could be raised: {steps} steps are fewer than the {window} first and {window} last"
            " that alarms compare."
        )
    said = "No alarm was raised."
    if short:
        said += (
            f" Only forgetting was measured: {steps} steps are fewer than the {window} first and {window}"
            " last that the others compare."
        )
    if not counted and not short:
        said += " Not measured: words of doubt, stated answers and repetition (needs diagnostics)."
    if not probed and not short:
        what = "" if retained else "forgetting, and "
        said += f" Not measured: {what}the teacher under a wrong reference (needs diagnostics_probe_steps)."
    return said


class Watch:
    """Takes in the metrics of one optimizer step after the other, and raises alarms.

    Each is raised once, and again only after it had gone.

    Args:
        window: steps at the start, and at the end, that are compared. A metric that only some steps
            have is compared by those.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.alarms: list[Alarm] = []
        self._steps = 0
        self._first: dict[str, list[float]] = {}
        self._sums: dict[str, float] = {}
        self._last: deque[Mapping[str, float | None]] = deque(maxlen=window)
        self._present: set[str] = set()
        self._retained: float | None = None  # of the first probe
        self._is_forgetting = False

    def update(self, step: int, values: Mapping[str, float | None]) -> list[Alarm]:
        """Return the alarms that are new with optimizer step number `step`.

        They are also added to `alarms`.
        """
        self._steps += 1
        for metric, value in _finite(values).items():
            if metric.startswith(SUMS):
                self._sums[metric] = self._sums.get(metric, 0.0) + value
        new: list[Alarm] = []
        if step == 1 and (text := never_ends(_finite(values))) is not None:
            new = [Alarm("never ends", step, text)]
        new += self._forgetting(step, _finite(values).get(RETAINED))
        self.alarms += new
        if self._steps <= self.window:
            for metric, value in _finite(values).items():
                self._first.setdefault(metric, []).append(value)
            return new
        self._last.append(values)
        if len(self._last) < self.window:
            return new
        recent: dict[str, list[float]] = {}
        for earlier in self._last:
            for metric, value in _finite(earlier).items():
                recent.setdefault(metric, []).append(value)
        first, last = (
            {metric: middle(metric, found) for metric, found in part.items()}
            for part in (self._first, recent)
        )
        whole = {f"run/{metric}": value for metric, value in self._sums.items()}
        found = find(first | whole, last | whole)
        raised = [Alarm(name, step, text) for name, text in found.items() if name not in self._present]
        # What these steps did not measure has not gone: a probe may be rarer than the window is
        # long.
        judged = {name for name, metrics, _ in RULES if (last | whole).keys() >= set(metrics)}
        self._present = self._present - judged | set(found)
        self.alarms += raised
        return new + raised

    def _forgetting(self, step: int, now: float | None) -> list[Alarm]:
        """The alarm of a probe that is clearly worse than the first, once until it is better."""
        if now is None:
            return []
        self._retained = now if self._retained is None else self._retained
        text, had = forgetting(self._retained, now), self._is_forgetting
        self._is_forgetting = text is not None
        return [Alarm("forgetting", step, text)] if text is not None and not had else []


def _finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """The watched metrics that have a value."""
    return {
        name: value for name in WATCHED if (value := values.get(name)) is not None and math.isfinite(value)
    }
