"""Alarms against made-up histories: each rule, what a healthy run may do, once and again, and a run
that goes on.
"""

from __future__ import annotations

import numpy as np
import pytest

from unisd.monitoring import alarms
from unisd.monitoring.alarms import Watch

PULL = {"both": -0.1, "right": 2.0, "wrong": 2.0}
HEALTHY = {
    "counted/doubt": 40.0,
    "counted/tokens": 5000.0,
    "student/entropy": 1.0,
    "teacher/divergence": 0.5,
    "collapse/repeated_share": 0.05,
    "completions/mean_length": 40.0,
    "completions/truncated_share": 0.05,
    "counted/stated": 40.0,
    "counted/places": 32.0,
    "leak/gold_stated_share": 0.4,
    "leak/pull_answers": 40.0,
    **{
        f"{run}leak/pull_{told}{name}": value
        for run in ("", "run/")
        for told in ("", "full_")
        for name, value in PULL.items()
    },
    "run/leak/pull_answers": 40.0,
}
NOISE = [1.0, 0.9, 1.1, 0.8, 1.2]

CASES = [
    ({"counted/doubt": 5.0}, "suppressed doubt", "from 8.0 to 1.0"),
    (
        {"teacher/divergence": 0.05, "collapse/repeated_share": 0.2},
        "collapse",
        "divergence fell 90 % while repetition rose",
    ),
    ({"collapse/repeated_share": 0.6}, "collapse", "repetition rose from 5 to 60 % of all 4-grams"),
    ({"teacher/divergence": 0.05, "completions/mean_length": 90.0}, "collapse", "answers grew from 40 to 90"),
    (
        {"student/entropy": 2.5},
        "collapse",
        "entropy rose from 1 to 2.5 nats, and the teacher is hardly farther away",
    ),
    ({"completions/mean_length": 3.0}, "short answers", "from 40 to 3 tokens"),
    ({"completions/mean_length": 300.0}, "long answers", "from 40 to 300 tokens"),
    ({"completions/truncated_share": 0.8}, "no end", "only 20 %"),
    ({"student/entropy": 0.01}, "entropy collapsed", "from 1 to 0.01"),
    ({"student/entropy": 6.0, "teacher/divergence": 1.2}, "entropy exploded", "from 1 to 6"),
    ({"teacher/divergence": 2.0}, "drift", "from 0.5 to 2 nats"),
    ({"counted/places": 4.0}, "leak", "first stated after 10 %"),
    ({"run/leak/pull_both": 1.0}, "blind teacher", "cosine 0.50; shown the whole reference -0.05"),
    ({"leak/pull_both": 1.0}, "gone blind", "cosine from -0.05 to 0.50"),
]


@pytest.mark.parametrize(("changed", "name", "words"), CASES)
def test_each_alarm(changed: dict[str, float], name: str, words: str) -> None:
    found = alarms.find(HEALTHY, {**HEALTHY, **changed})
    assert list(found) == [name] and words in found[name]


def test_every_rule_has_a_case_and_reads_only_what_it_names() -> None:
    assert {name for _, name, _ in CASES} == {name for name, _, _ in alarms.RULES}
    for _, metrics, rule in alarms.RULES:
        of_rule = {metric: HEALTHY[metric] for metric in metrics}
        assert rule(of_rule, of_rule) is None


def test_a_healthy_run_raises_none() -> None:
    better = {
        "teacher/divergence": 0.02,
        "leak/gold_stated_share": 0.9,
        "counted/places": 30.0,
        "counted/doubt": 25.0,
    }
    assert alarms.find(HEALTHY, {**HEALTHY, **better}) == {}
    assert alarms.find({}, {}) == alarms.find(HEALTHY, {}) == {}  # what was not measured says nothing


@pytest.mark.parametrize(
    ("changed", "name", "words"), [case for case in CASES if not next(iter(case[0])).startswith("run/")]
)
def test_an_alarm_is_raised_once_and_again_after_it_had_gone(
    changed: dict[str, float], name: str, words: str
) -> None:
    watch = Watch(5)

    # Without teachers that are told all: a pull that is shared now would be told over the run too.
    history = {metric: value for metric, value in HEALTHY.items() if metric not in alarms.TOLD_ALL}

    def steps(count: int, changed: dict[str, float]) -> list[str]:
        first = watch._steps
        values = {**history, **changed}
        return [
            alarm.name
            for step in range(first, first + count)
            for alarm in watch.update(
                step + 1, {key: value * NOISE[step % 5] for key, value in values.items()}
            )
        ]

    assert steps(40, {}) == []
    assert watch.update(41, {**history, "student/entropy": float("nan"), "retained/nll": None}) == []
    assert steps(5, {}) == []
    assert steps(20, changed) == [name]
    assert steps(20, {}) == []
    assert steps(20, changed) == [name]
    assert [alarm.name for alarm in watch.alarms] == [name, name] and 46 < watch.alarms[0].step <= 66


def test_one_bad_step_is_no_alarm_and_rare_words_count() -> None:
    watch = Watch(5)
    for step in range(1, 30):
        broken = (
            {"teacher/divergence": 99.0, "student/entropy": 99.0, "completions/mean_length": 1.0}
            if step % 7 == 0
            else {}
        )
        # the median of these is 0, also at the start
        rare = {"counted/doubt": 100.0 if step % 5 == 0 else 0.0}
        assert watch.update(step, {**HEALTHY, **broken, **rare}) == []
    for step in range(30, 36):
        watch.update(step, {**HEALTHY, "counted/doubt": 0.0})
    assert [alarm.name for alarm in watch.alarms] == ["suppressed doubt"]


@pytest.mark.parametrize(("rate", "tokens"), [(3.0, 256), (5.0, 800), (10.0, 3200)])
def test_rare_words_of_a_steady_run_raise_nothing_by_chance(rate: float, tokens: int) -> None:
    """Poisson counts of one rate: the rule is asked at every step, and most of its windows hold a
    handful of words.
    """
    rng = np.random.default_rng(0)
    raised = 0
    for _ in range(40):
        watch = Watch(5)
        for step in range(1, 151):
            watch.update(
                step,
                {"counted/doubt": float(rng.poisson(rate * tokens / 1000)), "counted/tokens": float(tokens)},
            )
        raised += bool(watch.alarms)
    assert raised <= 1
    lost = {"counted/doubt": 0.0, "counted/tokens": 8000.0}  # told as soon as there was enough to lose
    assert "suppressed doubt" in alarms.find({"counted/doubt": 25.0, "counted/tokens": 8000.0}, lost)


@pytest.mark.parametrize("rows", [4, 16])
def test_where_answers_are_stated_raises_nothing_by_chance(rows: int) -> None:
    rng = np.random.default_rng(1)
    watch = Watch(5)
    for step in range(1, 1001):
        stated = int(rng.binomial(rows, 0.4))
        places = {
            "counted/stated": float(stated),
            "counted/places": float(rng.uniform(0.05, 1.0, stated).sum()),
        }
        watch.update(step, {**places, "leak/gold_stated_share": stated / rows})
    assert watch.alarms == []


def test_a_probe_now_and_then_is_compared_by_the_steps_that_have_it() -> None:
    watch = Watch(5)
    for step in range(1, 31):
        probe = {"retained/nll": 0.1 if step < 15 else 0.9} if step % 5 == 1 else {}
        watch.update(step, probe)
    # of steps 12 to 16, only the last
    assert [(alarm.name, alarm.step) for alarm in watch.alarms] == [("forgetting", 16)]


def test_an_alarm_is_not_gone_where_nobody_measured() -> None:
    watch = Watch(2)
    for step in range(1, 40):
        watch.update(step, {"retained/nll": 0.1 if step == 1 else 0.9} if step % 10 == 1 else {})
    assert [alarm.step for alarm in watch.alarms] == [11]


def test_the_probes_of_a_run_are_added_up() -> None:
    """Eight answers are too few to tell, 24 are not; a teacher that is told all has nothing to be
    compared with.
    """
    pull = {"leak/pull_both": 0.5, "leak/pull_right": 1.0, "leak/pull_wrong": 1.0, "leak/pull_answers": 8.0}
    told_all = {"leak/pull_full_both": 0.3, "leak/pull_full_right": 1.0, "leak/pull_full_wrong": 1.0}
    for probe, raised in ((pull | told_all, [("blind teacher", 7)]), (pull, [])):
        watch = Watch(2)
        for step in range(1, 20):
            watch.update(step, probe if step % 3 == 1 else {})
        assert [(alarm.name, alarm.step) for alarm in watch.alarms] == raised


def test_a_history_read_again_raises_the_same_alarms() -> None:
    history = [HEALTHY] * 5 + [{**HEALTHY, "counted/doubt": 0.0}] * 6
    whole, cut = Watch(3), Watch(3)
    for watch, values in ((whole, history), (cut, history[:6])):
        for step, line in enumerate(values, 1):
            watch.update(step, line)
    for step in range(7, 12):
        cut.update(step, history[step - 1])
    assert whole.alarms == cut.alarms != []


def test_a_first_step_that_is_cut_raises_an_alarm() -> None:
    watch = Watch(3)
    [alarm] = watch.update(1, HEALTHY | {"completions/truncated_share": 0.95})
    assert (alarm.name, alarm.step) == ("never ends", 1)
    assert alarm.text.startswith(
        "95 % of the first step's answers reached the limit: raise max_completion_length"
    )
    assert "set eos_token_id" in alarm.text
    assert watch.update(2, HEALTHY | {"completions/truncated_share": 0.95}) == []
    assert watch.alarms == [alarm]
    assert Watch(3).update(1, HEALTHY | {"completions/truncated_share": 0.9}) == []
