"""What a run records of its tokens and its cost, against plain forward passes and counts by
hand.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unisd import UniSDConfig, UniSDTrainer
from unisd import testing as tiny
from unisd.files import read_lines
from unisd.memory import ModelSize
from unisd.monitoring.cost import account, cost_of, energy_of, peak_memory
from unisd.monitoring.token_records import MAX_RECORDS, SampleRecorder, token_texts
from unisd.run.baseline import key_of, measured_once
from unisd.run.inputs import RunData
from unisd.run.resolve import parse

STAR: dict[str, Any] = {
    "agreement": "token",
    "agreement_gamma": 1.0,
    "contrastive_weight": 0.1,
    "feature_weight": 0.1,
    "token_clip": 0.5,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 12,
    "num_loss_tokens_to_skip": 1,
    "temperature": 0.8,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def trained(folder: Path, **options: Any) -> UniSDTrainer:
    args = UniSDConfig(output_dir=str(folder), **{**STAR, **options})
    trainer = UniSDTrainer(
        tiny.model(),
        args,
        train_dataset=tiny.rows(),
        processing_class=tiny.tokenizer(),
        grader=lambda row, text: len(text) > 3,
    )
    trainer.train()
    return trainer


def log_probs(prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    """Log-probabilities [T,V] of the initial model, one plain forward pass."""
    with torch.no_grad():
        logits = tiny.model()(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


@pytest.mark.long
def test_records_say_what_plain_passes_say(tmp_path: Path) -> None:
    # A learning rate of 0: every pass is one of the initial model.
    trainer = trained(tmp_path, learning_rate=0.0, record_samples=3)
    records = read_lines(tmp_path / "samples.jsonl")
    assert [record["step"] for record in records] == [1] * 3 + [2] * 3
    for record in records:
        row = next(r for r in trainer.rows if r["prompt"] == record["prompt"])
        student, teacher = trainer.prompts.student(row), trainer.prompts.teacher(row)
        ids = [tiny.tokenizer().convert_tokens_to_ids(t) for t in _tokens(trainer, record)]
        picked = torch.tensor(ids)[:, None]
        p, q = log_probs(student, ids, 0.8), log_probs(teacher, ids, 0.8)
        negative = log_probs(trainer.prompts.negative(row), ids, 0.8).gather(1, picked)[:, 0]
        l_student, l_teacher = p.gather(1, picked)[:, 0], q.gather(1, picked)[:, 0]
        expected = {
            "student_logp": l_student,
            "teacher_logp": l_teacher,
            "negative_logp": negative,
            "divergence": (q.exp() * (q - p)).sum(1),
            "entropy": -(p.exp() * p).sum(1),
            "contrast": torch.relu(0.5 + (l_student - l_teacher).abs() - (l_student - negative).abs()),
        }
        for name, values in expected.items():
            assert record[name][0] is None, "the skipped token carries no loss"
            assert record[name][1:] == pytest.approx(values[1:].tolist(), abs=2e-4), name
        for place, (text, logp) in enumerate(
            zip(record["teacher_top"], record["teacher_top_logp"], strict=True)
        ):
            top = int(q[place].argmax())
            if place == 0 or top == ids[place]:
                assert text is None and logp is None
            else:
                assert text == token_texts(tiny.tokenizer(), [ids[place - 1], top])[1]
                assert logp == pytest.approx(float(q[place, top]), abs=2e-4)
        for k, prompt in enumerate(trainer.prompts.auxiliary(row, 3)):
            auxiliary = log_probs(prompt, ids, 1.0).gather(1, picked)[1:, 0]
            assert record["auxiliary_logp"][k][1:] == pytest.approx(auxiliary.tolist(), abs=2e-4)
        assert record["clipped"][1:] == [d > 0.5 for d in expected["divergence"][1:].tolist()]
        assert all(0 < weight <= 1 for weight in record["weight"][1:])
        assert any(record["teacher_top"]), "an untrained teacher would say something else"
        assert record["correct"] == (len(tiny.tokenizer().decode(ids, skip_special_tokens=True)) > 3)


def _tokens(trainer: UniSDTrainer, record: dict[str, Any]) -> list[str]:
    """The record's tokens, sampled again: noise is keyed by step, row and generation."""
    number = next(i for i, row in enumerate(trainer.rows) if row["prompt"] == record["prompt"])
    completion = trainer.completions.complete([(number, 0)], record["step"] - 1)[0]
    assert len(record["tokens"]) == len(completion.ids)
    return tiny.tokenizer().convert_ids_to_tokens(completion.ids)


@pytest.mark.long
def test_recording_changes_no_bit(tmp_path: Path) -> None:
    states = [
        trained(tmp_path / str(n), record_samples=n, learning_rate=1e-2).model.state_dict() for n in (0, 2)
    ]
    assert not (tmp_path / "0" / "samples.jsonl").exists()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_a_long_run_records_few_steps(tmp_path: Path) -> None:
    recorder = SampleRecorder(tmp_path / "samples.jsonl", 2, tiny.tokenizer(), None)
    steps = [step for step in range(1, 10_001) if recorder.wants(step, 10_000, 1)]
    assert 2 * len(steps) <= MAX_RECORDS + 2 and steps[0] == 1 and steps[-1] == 10_000
    assert [step for step in range(1, 31) if recorder.wants(step, 30, 10)] == [1, 10, 20, 30]


def test_forget_after_drops_later_and_torn_records(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    SampleRecorder(path, 2, tiny.tokenizer(), None).forget_after(2)
    assert [record["step"] for record in read_lines(path)] == [1, 2]


def test_token_texts_join_to_the_text() -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer.encode("It is 4 and so on.", add_special_tokens=False)
    assert "".join(token_texts(tokenizer, ids)) == "It is 4 and so on."


@pytest.mark.long
def test_tokens_are_counted_by_use(tmp_path: Path) -> None:
    trainer = trained(tmp_path, token_clip=None, token_clip_quantile=0.9, record_samples=0)
    trained_on, scored = trainer.tokens, trainer.scorer.passes.tokens
    generated = trainer.completions.generated
    assert trained_on["completion"] == generated > 0
    assert trained_on["trained"] == scored["student"] == generated + trainer.completions.prefilled
    # Every row has three contexts and one wrong reference.
    assert scored["auxiliary"] > 3 * generated and scored["negative"] > generated
    assert trainer.metrics.phases["update"] > 0


@pytest.mark.parametrize(
    ("options", "views"),
    [
        ({}, {"teacher", "auxiliary", "negative"}),
        ({"agreement_uncertain_share": 0.25}, {"teacher", "auxiliary", "negative"}),
        (
            {"agreement": "none", "target": "geometric:source=teacher/plain"},
            {"teacher", "teacher/plain", "negative"},
        ),
        ({"num_generations": 4, "agreement": "none", "max_steps": 1}, {"teacher", "negative"}),
    ],
    ids=["star", "budget", "target", "prompts read once"],
)
@pytest.mark.long
def test_tokens_scored_are_those_of_the_passes(
    tmp_path: Path, options: dict[str, Any], views: set[str]
) -> None:
    args = UniSDConfig(output_dir=str(tmp_path), **{**STAR, "record_samples": 0, **options})
    long = [{**row, "privileged_context": row["privileged_context"] * 9} for row in tiny.rows()]
    trainer = UniSDTrainer(tiny.model(), args, train_dataset=long, processing_class=tiny.tokenizer())
    read, whole, shared = [], trainer.backbone.hidden_states, trainer.backbone.continuations

    def sequences(batch: Any, *rest: Any) -> Any:
        read.append(
            int(batch.attention_mask.sum()) if batch.attention_mask is not None else batch.input_ids.numel()
        )
        return whole(batch, *rest)

    def continuations(prompt: list[int], completions: list[list[int]], *rest: Any) -> Any:
        read.append(len(prompt) + sum(map(len, completions)))
        return shared(prompt, completions, *rest)

    trainer.backbone.hidden_states, trainer.backbone.continuations = sequences, continuations
    trainer.train()
    tokens = trainer.scorer.passes.tokens
    assert sum(tokens.values()) == sum(read) and set(tokens) == views
    cost = cost_of(trainer, args, trainer.metrics.phases, None, None)
    in_files = {"primary" if view == "teacher" else view: count for view, count in tokens.items()}
    assert cost["tokens"]["scored"] == sum(read) and cost["tokens"]["scored_by_view"] == in_files
    extra = {"auxiliary": "agreement", "negative": "contrast", "teacher/plain": "target"}
    assert set(cost["by_mechanism"]) == {extra[view] for view in views - {"teacher"}} | {"ema"}


def test_before_is_measured_once(tmp_path: Path) -> None:
    asked: list[int] = []

    def measure() -> dict[str, Any]:
        asked.append(1)
        return {"figures": {"task_accuracy": {"value": 0.1 + 0.2}}}

    results = [measured_once(str(tmp_path / "cache"), key, measure) for key in ("a", "a", "b")]
    assert len(asked) == 2 and results[0] == results[1] == measure()
    assert measured_once(None, "a", measure) == measure() and len(asked) == 5


def test_the_key_of_before_covers_what_it_depends_on() -> None:
    def key(*arguments: str, **changed: Any) -> str:
        options, config = parse([*arguments, "--use_cpu"])
        rows = {"evaluation": [{"prompt": "p", "answer": "a"}], "retention": []}
        return key_of(options, config, RunData(name="pocket", train=[], **{**rows, **changed}))

    base = key("--seed", "1")
    assert key("--seed", "2", "--learning_rate", "1e-3", "--agreement", "none") == base
    others = [
        key("--recipe", "sdft", "--max_completion_length", "9"),
        key(evaluation=[{"prompt": "p", "answer": "b"}]),
    ]
    others += [key("--model_name_or_path", "elsewhere"), key("--dtype", "bfloat16")]
    assert len({base, *others}) == 5


def test_the_peak_is_in_bytes_on_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        "unisd.monitoring.cost.resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=1 << 20)
    )
    found = []
    for system in ("linux", "darwin"):
        monkeypatch.setattr("unisd.monitoring.cost.sys.platform", system)
        found.append(peak_memory()[0])
    assert found == [1 << 30, 1 << 20]


def test_cost_is_arithmetic() -> None:
    size = ModelSize(1000, 100, 4.0, 4.0, hidden=5, layers=1, vocabulary=20)
    counts = {
        "generated": 10,
        "prefilled": 20,
        "trained": 30,
        "completion": 10,
        "scored_primary": 40,
        "scored_auxiliary": 60,
    }
    phases = {"rollout": 1.0, "score": 10.0, "student": 5.0, "update": 2.0, "eval": 99.0}
    cost = account(
        counts,
        size,
        phases,
        2,
        head_only_embedding=False,
        peak_bytes=7,
        peak_of="test",
        energy=energy_of(18.0, 2, 500.0),
    )
    forward = 2 * (1000 - 100)  # the untied input embedding is looked up, not multiplied
    assert (
        cost["flops_estimated"]["rollout"] == 30 * forward
        and cost["flops_estimated"]["score"] == 100 * forward
    )
    assert cost["flops_estimated"]["student"] == 30 * (2 * forward + 200)
    assert cost["train_s"] == 18.0 and cost["device_hours"] == pytest.approx(0.01)
    assert cost["million_tokens_per_device_hour"] == pytest.approx(30e-6 / 0.01)
    assert cost["energy"]["kwh"] == pytest.approx(0.01 * 0.5 * 0.7 * 1.2)
    assert cost["by_mechanism"]["agreement"]["seconds_estimated"] == pytest.approx(6.0)
    assert energy_of(18.0, 2, None)["kwh"] is None and "device_tdp" in energy_of(18.0, 2, None)["method"]
    assert energy_of(18.0, 2, 500.0, measured_kwh=1.5) == {"kwh": 1.5, "method": "codecarbon", "tdp_w": 500.0}
