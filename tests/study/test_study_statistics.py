"""The statistics of a study against simulated data with known effects, and against other ways to
compute them.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy import stats

pytest.importorskip("statsmodels")

from unisd.study.contrasts import Effect, effects_of
from unisd.study.design import cells_of, from_dict
from unisd.study.estimate import Estimate, Fit, holm
from unisd.study.recommend import verdict

SIMULATIONS = 1000
MECHANISMS = ["agreement", "ema", "contrast", "features", "clip"]
TRUE = {"agreement": 0.0, "ema": 0.1, "contrast": 0.0, "features": -0.05, "clip": 0.03}


def design(**study: Any) -> tuple[list[Any], list[Any]]:
    spec = from_dict({"mechanisms": MECHANISMS, **study})
    return cells_of(spec), spec.factors


def simulate(
    cells: list[Any], rng: np.random.Generator, seeds: int, problems: int, run_sd: float, problem_sd: float
) -> np.ndarray[Any, Any]:
    """Right or wrong `[C,S,P]`: additive effects, noise of each run, problems that react to a
    mechanism in ways of their own.
    """
    on = np.array([[float(cell.levels[name] == "on") for name in MECHANISMS] for cell in cells])
    chance = 0.5 + (on @ np.array(list(TRUE.values())))[:, None, None]
    chance = chance + rng.normal(0, run_sd, (len(cells), seeds, 1)) + rng.normal(0, 0.05, (1, seeds, 1))
    reaction = on @ rng.normal(0, problem_sd, (len(MECHANISMS), problems))
    difficulty = rng.normal(0, 0.1, problems)
    return (rng.random((len(cells), seeds, problems)) < chance + (reaction + difficulty)[:, None, :]).astype(
        float
    )


@pytest.mark.long
@pytest.mark.parametrize(("seeds", "run_sd", "problem_sd"), [(3, 0.02, 0.05), (2, 0.0, 0.0)])
def test_intervals_cover_the_truth(
    seeds: int, run_sd: float, problem_sd: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # statsmodels collects garbage at every adjustment, a quarter of a second each time.
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    cells, factors = design()
    effects = [effect for effect in effects_of(cells, factors) if effect.kind == "main"]
    rng = np.random.default_rng(7)
    covered = {name: 0 for name in MECHANISMS}
    recommended = {name: 0 for name in MECHANISMS}
    for _ in range(SIMULATIONS):
        answers = simulate(cells, rng, seeds, 120, run_sd, problem_sd)
        fit = Fit(answers.mean(2), answers)
        estimates = [fit.contrast(effect.weights) for effect in effects]
        adjusted = holm(
            [estimate.p for estimate in estimates if estimate is not None and estimate.p is not None]
        )
        for effect, estimate, p in zip(effects, estimates, adjusted, strict=True):
            assert estimate is not None and estimate.low is not None and estimate.high is not None
            covered[effect.name] += estimate.low <= TRUE[effect.name] <= estimate.high
            recommended[effect.name] += verdict({"task": (estimate.scaled(100), p)}, 1.0, None)[0] == "keep"
    mean_coverage = sum(covered.values()) / (SIMULATIONS * len(MECHANISMS))
    assert 0.93 <= mean_coverage <= 0.97, covered
    assert all(0.92 <= count / SIMULATIONS <= 0.98 for count in covered.values()), covered
    for name in ("agreement", "contrast"):  # no effect at all
        assert recommended[name] <= 0.05 * SIMULATIONS, recommended
    if seeds == 3:
        assert recommended["ema"] > 0.5 * SIMULATIONS, "a large effect is found"


@pytest.mark.long
def test_a_single_cell_pair_with_few_problems_is_covered_too() -> None:
    """One-in alone: two cells and three seeds leave 2 degrees of freedom."""
    cells, factors = design(mechanisms=["ema"], design="one-in")
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(SIMULATIONS):
        chance = (
            0.5
            + 0.06 * np.array([0.0, 1.0])[:, None, None]
            + rng.normal(0, 0.03, (2, 3, 1))
            + rng.normal(0, 0.1, 150)
        )
        chance[1] += rng.normal(0, 0.1, 150)  # problems react in ways of their own
        answers = (rng.random((2, 3, 150)) < chance).astype(float)
        estimate = Fit(answers.mean(2), answers).contrast(effects_of(cells, factors)[0].weights)
        assert estimate is not None and estimate.low is not None and estimate.high is not None
        covered += estimate.low <= 0.06 <= estimate.high
    assert 0.93 <= covered / SIMULATIONS <= 0.97


def test_without_problem_variance_two_cells_are_a_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    runs = rng.normal(size=(2, 6))
    estimate = Fit(runs).contrast(np.array([-1.0, 1.0]))
    expected = stats.ttest_rel(runs[1], runs[0])
    low, high = expected.confidence_interval(0.95)
    assert estimate is not None
    assert (estimate.p, estimate.low, estimate.high) == pytest.approx((expected.pvalue, low, high))


def test_one_seed_compares_problems_only() -> None:
    rng = np.random.default_rng(1)
    answers = (rng.random((2, 1, 80)) < 0.5).astype(float)
    estimate = Fit(answers.mean(2), answers).contrast(np.array([-1.0, 1.0]))
    assert estimate is not None and "training noise" in estimate.note
    sure = Estimate(9.0, 8.0, 10.0, None, None, None, f"mean of 1 matched pairs; {estimate.note}; aliased")
    decision, text = verdict({"task": (sure, 0.001)}, 1.0, None)
    assert decision == "undecided" and "one seed" in text and text.endswith("[aliased]")
    assert estimate.p == pytest.approx(stats.ttest_rel(answers[1, 0], answers[0, 0]).pvalue)


def test_answers_that_never_differ_do_not_prove_equality() -> None:
    answers = np.ones((2, 3, 40))
    estimate = Fit(answers.mean(2), answers).contrast(np.array([-1.0, 1.0]))
    assert estimate is not None and estimate.value == 0 and estimate.p == 1.0
    # The exact binomial bound for 0 of 40.
    assert estimate.high == pytest.approx(stats.beta.ppf(0.95, 1, 40)) and estimate.low == pytest.approx(
        -estimate.high
    )
    assert verdict({"task": (estimate.scaled(100), 1.0)}, 1.0, None)[0] == "undecided"


def test_a_difference_without_variance_is_not_certain() -> None:
    """In each of two seeds one problem more is right: no part of the variance is above 0."""
    answers = np.ones((2, 2, 200))
    answers[0, 0, 3] = answers[0, 1, 7] = 0
    estimate = Fit(answers.mean(2), answers).contrast(np.array([-1.0, 1.0]))
    assert (
        estimate is not None
        and estimate.low is not None
        and estimate.low < 0 < estimate.value == pytest.approx(0.005)
    )
    assert estimate.p == pytest.approx(0.995**200)


def test_cells_that_share_no_seed_cannot_be_compared() -> None:
    runs = np.array([[0.5, np.nan], [np.nan, 0.9]])
    assert Fit(runs).contrast(np.array([-1.0, 1.0])) is None


def test_a_missing_run_is_left_out_and_a_missing_cell_gives_nothing() -> None:
    rng = np.random.default_rng(2)
    answers = (rng.random((3, 3, 50)) < 0.5).astype(float)
    answers[0, 1] = np.nan
    estimate = Fit(answers.mean(2), answers).contrast(np.array([-1.0, 1.0, 0.0]))
    assert estimate is not None and estimate.df is not None and np.isfinite(estimate.value)
    answers[0] = np.nan
    assert Fit(answers.mean(2), answers).contrast(np.array([-1.0, 1.0, 0.0])) is None


def by_name(effects: list[Effect], kind: str) -> dict[str, Effect]:
    return {effect.name: effect for effect in effects if effect.kind == kind}


def test_one_in_and_leave_one_out_average_to_the_main_effect() -> None:
    cells, factors = design()
    assert len(cells) == 12
    effects = effects_of(cells, factors)
    for name in MECHANISMS:
        both = by_name(effects, "one-in")[name].weights + by_name(effects, "leave-one-out")[name].weights
        assert by_name(effects, "main")[name].weights == pytest.approx(both / 2)
    assert not by_name(effects, "interaction") and not by_name(effects, "shapley")


@pytest.mark.parametrize("study", [{"design": "full"}, {"design": "fractional", "resolution": 5}])
def test_factorials_find_what_was_put_in(study: dict[str, Any]) -> None:
    cells, factors = design(**study)
    assert len(cells) == (32 if study["design"] == "full" else 16)
    on = np.array([[float(cell.levels[name] == "on") for name in MECHANISMS] for cell in cells])
    main, pairs = np.array([3.0, -1.0, 0.5, 0.0, 2.0]), {(0, 1): 4.0, (2, 4): -1.5}
    truth = on @ main + sum(size * on[:, i] * on[:, j] for (i, j), size in pairs.items())
    effects = effects_of(cells, factors)
    for number, name in enumerate(MECHANISMS):
        # Over the other factors' levels, half of the pairs have the partner on.
        expected = main[number] + sum(size / 2 for pair, size in pairs.items() if number in pair)
        assert by_name(effects, "main")[name].weights @ truth == pytest.approx(expected)
    for i, j in itertools.combinations(range(5), 2):
        effect = by_name(effects, "interaction")[f"{MECHANISMS[i]} x {MECHANISMS[j]}"]
        assert effect.weights @ truth == pytest.approx(pairs.get((i, j), 0.0))


def test_a_coarse_fraction_says_that_it_is_aliased() -> None:
    cells, factors = design(design="fractional", resolution=3)
    effects = effects_of(cells, factors)
    assert len(cells) == 8 and "aliased" in by_name(effects, "main")["ema"].note
    assert len(by_name(effects, "main")) == 5 and not by_name(effects, "interaction")


def test_shapley_shares_add_up_and_agree_with_all_orders() -> None:
    cells, factors = design(mechanisms=["agreement", "ema", "clip"], design="full")
    worth = dict(
        zip(
            [tuple(cell.levels.values()) for cell in cells],
            np.random.default_rng(0).normal(size=8),
            strict=True,
        )
    )
    values = np.array([worth[tuple(cell.levels.values())] for cell in cells])
    shares = by_name(effects_of(cells, factors), "shapley")
    for number, name in enumerate(("agreement", "ema", "clip")):
        gains = []
        for order in itertools.permutations(range(3)):
            state = ["off"] * 3
            for switched in order:
                before = worth[tuple(state)]
                state[switched] = "on"
                if switched == number:
                    gains.append(worth[tuple(state)] - before)
        assert shares[name].weights @ values == pytest.approx(np.mean(gains))
    total = sum(effect.weights @ values for effect in shares.values())
    assert total == pytest.approx(worth["on", "on", "on"] - worth["off", "off", "off"])


def test_levels_of_an_option_are_compared_with_the_first() -> None:
    spec = from_dict(
        {"mechanisms": ["ema"], "factors": {"learning_rate": [1e-4, 2e-4, 4e-4]}, "design": "full"}
    )
    effects = effects_of(cells_of(spec), spec.factors)
    assert set(by_name(effects, "main")) == {"ema", "learning_rate=0.0002", "learning_rate=0.0004"}
    assert set(by_name(effects, "interaction")) == {
        "ema x learning_rate=0.0002",
        "ema x learning_rate=0.0004",
    }


@pytest.mark.parametrize(
    ("task", "retention", "expected"),
    [
        ((3.0, 1.2, 4.8, 0.01), (0.0, -0.5, 0.5, 1.0), ("keep", "keep")),
        ((0.2, -0.5, 0.9, 1.0), (2.0, 1.0, 3.0, 0.01), ("keep", "forgets less")),
        ((-3.0, -5.0, -1.0, 0.01), (0.0, -0.5, 0.5, 1.0), ("drop", "loses on the task")),
        ((3.0, 1.0, 5.0, 0.01), (-2.0, -3.0, -1.0, 0.01), ("trade", "forgets more")),
        ((0.0, -0.8, 0.9, 1.0), (0.1, -0.5, 0.7, 1.0), ("no effect", "not worth 4 % time")),
        ((3.0, 0.1, 5.9, 0.2), (0.1, -0.5, 0.7, 1.0), ("undecided", "more seeds")),
        ((0.0, -0.8, 0.9, 1.0), (0.1, -2.5, 2.7, 1.0), ("undecided", "more seeds")),
        ((0.5, 0.2, 0.8, 0.01), (2.0, 1.0, 3.0, 0.01), ("keep", "keep")),
        # Beyond chance, but too small to matter, or at a price on the other side that is not ruled
        # out.
        ((0.3, 0.1, 0.5, 0.01), (0.0, -0.2, 0.2, 1.0), ("no effect", "not worth 4 % time")),
        (
            (0.3, 0.1, 0.5, 0.01),
            (0.5, -0.5, 1.5, 1.0),
            ("undecided", "gains on the task, but by no more than 1 points"),
        ),
        (
            (-4.0, -8.5, 0.5, 0.2),
            (2.0, 1.2, 2.8, 0.01),
            ("undecided", "forgets less, but perhaps loses on the task"),
        ),
        ((-0.3, -0.5, -0.1, 0.01), (0.0, -0.2, 0.2, 1.0), ("no effect", "above 1 points are ruled out")),
        (
            (-3.0, -5.0, -1.0, 0.01),
            (1.0, -0.5, 2.5, 0.4),
            ("undecided", "loses on the task, but perhaps forgets less"),
        ),
    ],
)
def test_verdicts(task: tuple[float, ...], retention: tuple[float, ...], expected: tuple[str, str]) -> None:
    def estimate(value: float, low: float, high: float, _: float) -> Estimate:
        return Estimate(value, low, high, None, None, None)

    accuracies = {"task": (estimate(*task), task[3]), "retention": (estimate(*retention), retention[3])}
    decision, text = verdict(accuracies, 1.0, estimate(4.0, 3.0, 5.0, 0.0))
    assert decision == expected[0] and expected[1] in text
    assert f"task {task[0]:+.1f} [{task[1]:.1f}, {task[2]:.1f}]" in text and "+4 [3, 5] % time" in text


def test_a_gain_is_not_kept_while_any_retention_set_may_have_lost() -> None:
    gains, same = Estimate(6.0, 4.0, 8.0, None, None, None), Estimate(0.0, -0.7, 0.7, None, None, None)
    lost, unclear = (Estimate(v, v - 4, v + 4, None, None, None, "n") for v in (-30.0, 0.0))
    known = {"task": (gains, 0.001), "retention": (same, 1.0)}
    assert verdict({**known, "general": (same, 1.0)}, 1.0, None)[0] == "keep"
    decision, text = verdict({**known, "general": (unclear, 1.0)}, 1.0, None)
    assert (decision, "but perhaps forgets more of general" in text) == ("undecided", True)
    decision, text = verdict({**known, "general": (lost, 0.001)}, 1.0, None)
    assert (decision, "gains on the task, forgets more of general" in text) == ("trade", True)
    assert "general -30.0 [-34.0, -26.0]" in text and text.endswith("[general: n]")


def test_a_cost_that_is_not_told_from_none_is_no_price() -> None:
    small = Estimate(0.1, -0.2, 0.4, None, None, None)
    time, saved = Estimate(4.0, -3.0, 11.0, None, None, None), Estimate(-30.0, -40.0, -20.0, None, None, None)
    assert verdict({"task": (small, 1.0)}, 1.0, time)[1].endswith(
        "+4 [-3, 11] % time: no gain (effects above 1 points are ruled out)"
    )
    assert "saves 30 % operations" in verdict({"task": (small, 1.0)}, 1.0, saved, "operations")[1]
