"""Reused rollouts and importance correction, against written-out sums."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.steps import STAR
from unisd import StepScores, UniSDConfig, UserError
from unisd import testing as tiny
from unisd.methods.aggregation import importance_ratio, importance_stats
from unisd.rollout.engine import Completion
from unisd.rollout.replay import RepeatedSteps, RolloutStore, behaviour_logp
from unisd.testing import trainer
from unisd.training.coefficients import loss_coefficients
from unisd.training.plan import Plan

NAN = math.nan


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_ratio_is_its_closed_form() -> None:
    student = torch.tensor([[-1.0, -2.0, -0.5, 7.0], [-3.0, -1e4, -0.1, -4.0]])
    drawn = torch.tensor([[-1.5, -1.0, -9.0, NAN], [NAN, -1.0, -1e4, -4.0]])
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    expected = [[math.exp(0.5), math.exp(-1.0), 2.0, 1.0], [1.0, 0.0, 2.0, 1.0]]
    ratio = importance_ratio(student, drawn, mask, cap=2.0)
    torch.testing.assert_close(ratio, torch.tensor(expected))
    stats = importance_stats(student, drawn, mask, cap=2.0)
    sampled = [math.exp(0.5), math.exp(-1.0), 2.0, 0.0, 2.0, 1.0]
    assert stats["importance/mean"] == pytest.approx(sum(sampled) / 6)
    assert stats["importance/capped_share"] == pytest.approx(2 / 6) and stats[
        "importance/max"
    ] == pytest.approx(2.0)
    assert importance_stats(student, torch.full_like(drawn, NAN), mask, cap=2.0) == {}


@pytest.mark.parametrize("gate", [1.0, 0.7])
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_ratio_multiplies_the_divergence_and_not_the_normaliser(
    tmp_path: Path, aggregation: str, gate: float
) -> None:
    torch.manual_seed(0)
    B, T = 3, 4
    D, student, drawn = torch.rand(B, T), -torch.rand(B, T), -torch.rand(B, T) * 2
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]]).bool()
    drawn[2] = NAN
    args = UniSDConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        loss_aggregation=aggregation,
        importance_cap=1.5,
        token_weights=[f"confidence_gate:threshold={gate}"],
    )
    scores = StepScores(mask, torch.zeros(B, T).long(), student, student_logp=student, behaviour_logp=drawn)
    plan = Plan.of(args)
    found = loss_coefficients(args, plan, scores)
    loss = float((found.divergence_BT * D).sum())

    rows = []
    for i in range(B):
        terms = []
        for t in range(T):
            if mask[i, t] and math.exp(float(student[i, t])) <= gate:
                ratio = 1.0 if i == 2 else min(math.exp(float(student[i, t] - drawn[i, t])), 1.5)
                terms.append(ratio * float(D[i, t]))
        rows.append(terms)
    if aggregation == "sequence":
        means = [sum(terms) / len(terms) for terms in rows if terms]
        expected = sum(means) / len(means)
    else:
        expected = sum(map(sum, rows)) / sum(map(len, rows))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert found.metrics["importance/max"] <= 1.5 + 1e-6
    without = loss_coefficients(args, plan, replace(scores, behaviour_logp=None))
    assert float((without.divergence_BT * D).sum()) != pytest.approx(expected, rel=1e-3)


def test_weights_do_not_wait_for_the_student_where_the_ratio_is_taken(tmp_path: Path) -> None:
    """They would be divided by a sum that holds the ratio."""
    built = trainer(tmp_path, num_iterations=2, token_weights=["dash"], weight_normalizer="mean1")
    assert built.plan.deferred == () and built.plan.needs >= {"student", "divergence"}
    assert trainer(tmp_path, num_iterations=2, token_weights=["dash"], importance_cap=None).plan.deferred


def test_second_step_of_a_rollout_has_the_written_out_loss(tmp_path: Path) -> None:
    built = trainer(
        tmp_path, num_iterations=2, importance_cap=1.02, max_steps=2, learning_rate=0.01, optim="sgd"
    )
    score, seen = built.scorer.score, []

    def watched(rows: Any, device: Any, **named: Any) -> Any:
        scores, states = score(rows, device, **named)
        seen.append((rows, scores))
        return scores, states

    built.scorer.score = watched
    built.train()
    (rows_1, first), (rows_2, second) = seen
    assert [(row.number, row.completion) for row in rows_1] == [
        (row.number, row.completion) for row in rows_2
    ]
    expected = 0.0
    capped = count = 0
    for i in range(len(rows_2)):
        terms = []
        for t in second.mask[i].nonzero()[:, 0].tolist():
            ratio = math.exp(float(second.student_logp[i, t]) - float(first.student_logp[i, t]))
            capped, count = capped + (ratio > 1.02), count + 1
            terms.append(min(ratio, 1.02) * float(second.divergence[i, t]))
        expected += sum(terms) / len(terms) / len(rows_2)
    one, two = metrics(tmp_path)
    assert one["importance/mean"] == one["importance/max"] == 1.0 and one["importance/gap"] == 0.0
    assert two["loss"] == pytest.approx(expected, rel=1e-4)
    assert 0 < capped < count and two["importance/capped_share"] == pytest.approx(capped / count)
    assert one["step_time/rollout"] > two["step_time/rollout"]


@pytest.mark.long
def test_stopping_inside_a_rollout_changes_nothing(tmp_path: Path) -> None:
    options = {
        "num_iterations": 3,
        "train_dataset": tiny.rows(18),
        "save_strategy": "steps",
        "save_steps": 1,
        "num_train_epochs": 9,
        **STAR,
    }
    whole = trainer(tmp_path / "whole", max_steps=8, **options)
    whole.train()
    for steps in (2, 7, 8):  # within the first rollout, within the third one (of the second epoch)
        built = trainer(tmp_path / "parts", max_steps=steps, **options)
        built.train(resume_from_checkpoint=True if steps > 2 else None)
    a, b = whole.model.state_dict(), built.model.state_dict()
    assert all(a[name].equal(b[name]) for name in a)
    assert [line["loss"] for line in metrics(tmp_path / "whole")] == [
        line["loss"] for line in metrics(tmp_path / "parts")
    ]
    other = trainer(tmp_path / "parts", max_steps=9, **{**options, "num_iterations": 5})
    with pytest.raises(UserError, match="which are not there: resume with the num_iterations"):
        other.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-7"))


class Shifted:
    """The student's own engine, which says that its log-probabilities are 0.3 nats lower than the
    trainer's.
    """

    returns_logps = True

    def __init__(self, inner: Any, shift: float) -> None:
        self.inner, self.shift, self.student_logp = inner, shift, None

    def sync(self) -> None:
        pass

    def sleep(self) -> None:
        pass

    def generate(self, prompts: Any, keys: Any, sampling: Any) -> list[Completion]:
        written = self.inner.generate(prompts, keys, sampling)
        return [
            replace(c, logps=self.logps(prompt, c.ids, sampling))
            for prompt, c in zip(prompts, written, strict=True)
        ]

    def logps(self, prompt: Any, ids: list[int], sampling: Any) -> list[float]:
        with torch.no_grad():
            logits = self.inner.model.eval()(torch.tensor([list(prompt) + ids])).logits[
                0, len(prompt) - 1 : -1
            ]
        logp = (logits / sampling.temperature).log_softmax(-1)
        return [float(logp[t, token]) - self.shift for t, token in enumerate(ids)]


@pytest.mark.parametrize(
    ("cap", "mean"), [pytest.param(2.0, math.exp(0.3), marks=pytest.mark.long), (1.1, 1.1)]
)
def test_engine_with_other_log_probabilities_is_corrected(tmp_path: Path, cap: float, mean: float) -> None:
    plain = trainer(tmp_path / "plain", max_steps=1)
    plain.train()
    model = tiny.model()
    from unisd.rollout.transformers_engine import TransformersEngine

    engine = Shifted(TransformersEngine(model, [2], 0), 0.3)
    built = trainer(tmp_path / "engine", model=model, max_steps=1, importance_cap=cap, engine=engine)
    built.train()
    line = metrics(tmp_path / "engine")[0]
    assert line["importance/mean"] == pytest.approx(mean, rel=1e-4)
    assert line["loss"] == pytest.approx(mean * metrics(tmp_path / "plain")[0]["loss"], rel=1e-4)


def test_references_are_not_corrected(tmp_path: Path) -> None:
    rows = [{**row, "completion": f"answer {i}"} for i, row in enumerate(tiny.rows(8))]
    built = trainer(
        tmp_path, train_dataset=rows, completion_source="mixture", on_policy_share=0.5, num_iterations=2,
        max_steps=1, max_completion_length=12,
    )  # fmt: skip
    built.train()
    kept = built.store.completions([(i, 0) for i in range(8)], 1)
    assert {c.sampled for c in kept} == {True, False}
    assert all((c.logps is None) != c.sampled for c in kept)
    assert behaviour_logp(kept, 12).isnan().all(-1).tolist() == [not c.sampled for c in kept]


def test_order_repeats_each_step_and_differs_by_epoch() -> None:
    epoch = 0
    sampler = RepeatedSteps(11, per_step=4, times=3, seed=5, epoch=lambda: epoch)
    order = list(sampler)
    assert len(order) == len(sampler) == 24
    assert order[:4] == order[4:8] == order[8:12] and order[12:16] == order[16:20] == order[20:24]
    assert len(set(order)) == 8 and order == list(sampler)
    epoch = 1
    assert list(sampler) != order
    with pytest.raises(UserError, match="a full step of 12 rows, but there are 11: lower"):
        RepeatedSteps(11, 12, 2, 0, lambda: 0)


def test_store_survives_a_checkpoint(tmp_path: Path) -> None:
    store = RolloutStore(2)
    store.keep(
        [(3, 0), (1, 1)], [Completion([5, 6], True, [-0.1, -1 / 3]), Completion([7], False, None, False)], 4
    )
    store.save(tmp_path, True, 1)
    loaded = RolloutStore(2)
    loaded.load(tmp_path)
    assert loaded.completions([(1, 1), (3, 0)], 5) == store.completions([(1, 1), (3, 0)], 5)
    with pytest.raises(UserError, match="not there"):
        loaded.completions([(2, 0)], 5)
    RolloutStore(2).load(tmp_path / "nothing")


def test_options_that_cannot_be_reused() -> None:
    with pytest.raises(UserError, match="num_iterations reuses the student's answers"):
        UniSDConfig(num_iterations=2, completion_source="reference")
    with pytest.raises(UserError, match="importance_cap"):
        UniSDConfig(importance_cap=0.5)
