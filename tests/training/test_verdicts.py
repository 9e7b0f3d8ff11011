"""Verdicts within a step: what the teacher is told, which answers carry loss, the invariants."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.helpers.engines import ByKey
from tests.helpers.steps import STAR
from unisd import UniSDConfig, UserError
from unisd import testing as tiny
from unisd.data.outcomes import Outcome
from unisd.files import METRICS
from unisd.tasks.base import Verdict
from unisd.testing import gradients, trainer

SDPO = {
    "num_generations": 4,
    "rollout_contexts": ["sibling+feedback", "sibling", "feedback", "none"],
    "max_completion_length": 16,
}
TOKENIZER = tiny.tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<|end|>")


def written(key: Any) -> list[int]:
    """Answers of which some pass: of rows 0, 4 all, of 1, 5 none, of the others two of four."""
    _, step, row, generation = key
    passes = {0: True, 1: False}.get(row % 4, generation in (1, 3))
    text = f"{generation}{step}{'x' * (generation + 1)} {'right' if passes else 'wrong'}"
    return [*TOKENIZER(text, add_special_tokens=False)["input_ids"], END]


def passed(row: dict[str, Any], text: str) -> bool:
    return text.endswith("right")


def grader(row: dict[str, Any], text: str) -> Verdict:
    right = passed(row, text)
    return Verdict(float(right), right, "" if right else f"said {text.split()[0]}, which is too short")


def judged(tmp_path: Path, grade: Any = grader, **options: Any) -> Any:
    return trainer(tmp_path, grader=grade, engine=ByKey(written), **{**SDPO, **options})


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def requests_of(built: Any, rows: list[int]) -> Any:
    numbers = [(row, g) for row in rows for g in range(4)]
    completions = built._rollout(numbers)
    return completions, built._requests(numbers, completions)


def test_the_teacher_is_told_of_the_group(tmp_path: Path) -> None:
    built = judged(tmp_path)
    completions, requests = requests_of(built, [0, 1, 2])
    text = [built.processing_class.decode(request.teacher) for request in requests]
    answers = [built.processing_class.decode(c.ids, skip_special_tokens=True) for c in completions]
    shown = [1, 0, 0, 0, None, None, None, None, 9, 11, 9, 9]  # never its own, else the first passed
    for i, sibling in enumerate(shown):
        problem = built.rows[i // 4]["prompt"]
        feedback = f"said {answers[i].split()[0]}, which is too short"
        places = [text[i].find(problem)]
        if sibling is not None:
            assert answers[sibling] in text[i] and (sibling == i or answers[i] not in text[i])
            places.append(text[i].find(answers[sibling]))
        if not completions[i].verdict.passed:
            assert feedback in text[i]
            places.append(text[i].find(feedback))
        assert places == sorted(places) and -1 not in places
        assert built.rows[i // 4]["privileged_context"] not in text[i]
        assert any(requests[i].loss_mask)  # of each group something is known


@pytest.mark.parametrize("contexts", [["sibling", "none"], ["sibling"]])
def test_what_no_context_serves_is_left_out_or_told_the_reference(
    tmp_path: Path, contexts: list[str]
) -> None:
    built = judged(tmp_path, rollout_contexts=contexts)
    _, requests = requests_of(built, [1])
    assert [any(request.loss_mask) for request in requests] == [contexts == ["sibling"]] * 4
    if contexts == ["sibling"]:
        assert [request.teacher for request in requests] == [built.prompts.teacher(built.rows[1])] * 4


def test_a_passed_answer_is_not_told_that_it_failed(tmp_path: Path) -> None:
    def praise(row: dict[str, Any], text: str) -> Verdict:
        return Verdict(1.0, True, "All tests passed.") if passed(row, text) else grader(row, text)

    built = judged(tmp_path, grade=praise, rollout_contexts=["feedback", "none"])
    completions, requests = requests_of(built, [0, 1, 2])
    carry = [any(request.loss_mask) for request in requests]
    assert carry == [not completion.verdict.passed for completion in completions]


def test_a_step_without_loss_has_measured_nothing(tmp_path: Path) -> None:
    built = judged(tmp_path, grade=lambda row, text: Verdict(0.0, False), max_steps=1)
    built.train()
    [line] = [json.loads(text) for text in (tmp_path / METRICS).read_text().splitlines()]
    assert line["loss"] == 0 == line["completions/loss_tokens"]
    assert not {"student/entropy", "teacher/divergence", "student/logp", "clip/share"} & line.keys()


def test_prompts_that_are_too_long_fall_back_and_are_counted(tmp_path: Path) -> None:
    built = judged(tmp_path, rollout_contexts=["sibling"])
    built.request_builder.teacher_room = len(built.prompts.teacher(built.rows[0]))
    long = Outcome("words " * 200)
    completion = built._rollout([(0, 0)])[0]
    request, overlong = built.request_builder.of(built.rows[0], 0, completion, True, 0, long)
    assert overlong == 1 and request.teacher == built.prompts.teacher(built.rows[0])


def test_verdicts_are_part_of_the_scores(tmp_path: Path) -> None:
    built = judged(tmp_path, grade=lambda row, text: math.nan if row is built.rows[1] else grader(row, text))
    numbers = [(row, g) for row in (0, 1, 2) for g in range(4)]
    completions = built._rollout(numbers)
    scores, _ = built._score(built._requests(numbers, completions), numbers, completions, torch.device("cpu"))
    assert scores.passed.tolist() == [True] * 4 + [False] * 4 + [False, True, False, True]
    assert scores.score.isnan().tolist() == [False] * 4 + [True] * 4 + [False] * 4
    assert scores.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_run_tells_its_outcomes(tmp_path: Path) -> None:
    judged(tmp_path, max_steps=2, logging_steps=1).train()
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    found = [line for line in lines if "outcome/passed" in line]
    assert len(found) == 2 and all("step_time/verdict" in line for line in found)
    for line in found:
        groups = [line[f"outcome/groups_{kind}"] for kind in ("all", "some", "none")]
        assert sum(groups) == pytest.approx(1) and line["outcome/no_verdict"] == 0
        assert line["outcome/passed"] == pytest.approx(groups[0] + 0.5 * groups[1])


@pytest.mark.parametrize("keep", ["passed", "failed", "shortest_passed", "mixed_groups"])
def test_answers_that_are_not_kept_are_as_if_they_were_not_there(tmp_path: Path, keep: str) -> None:
    built = judged(tmp_path, rollout_contexts=[], rollout_keep=keep, train_dataset=tiny.rows(4))
    _, requests = requests_of(built, [0, 1, 2, 3])
    carries = [any(request.loss_mask) for request in requests]
    two = [False, True, False, True]
    assert (
        carries
        == {
            "passed": [True] * 4 + [False] * 4 + two + two,
            "failed": [False] * 4 + [True] * 4 + [not x for x in two] * 2,
            "shortest_passed": [True, *[False] * 7, *[False, True, False, False] * 2],
            "mixed_groups": [False] * 8 + [True] * 8,
        }[keep]
    )


@pytest.mark.parametrize(
    "options",
    [pytest.param(o, marks=pytest.mark.long) for o in (STAR, {}, {"rollout_keep": "mixed_groups"})],
)
def test_the_invariants_hold_with_verdicts(tmp_path: Path, options: dict[str, Any]) -> None:
    four = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    whole = gradients(judged(tmp_path / "a", **options, **four))
    for name, other in {
        "split": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        "packed": {**four, "packing": "packed"},
        "padded": {**four, "packing": "padded"},
        "plain": {**four, "loss_implementation": "plain"},
    }.items():
        loss, found = gradients(judged(tmp_path / name, **options, **other))
        assert loss == pytest.approx(whole[0], rel=1e-4)
        for key, value in found.items():
            torch.testing.assert_close(value, whole[1][key], rtol=2e-3, atol=1e-6)


@pytest.mark.long
def test_a_stopped_run_goes_on_with_its_verdicts(tmp_path: Path) -> None:
    options = {
        "num_iterations": 2,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    asked: list[str] = []

    def counting(row: dict[str, Any], text: str) -> Verdict:
        asked.append(text)
        return grader(row, text)

    whole = judged(tmp_path / "whole", counting, max_steps=4, **options)
    whole.train()
    assert len(asked) == 2 * 8 * 4  # once a rollout, which serves two steps
    first = judged(tmp_path / "parts", max_steps=4, **options)
    first.add_callback(StopAt(3))
    first.train()
    resumed = judged(tmp_path / "parts", counting, max_steps=4, **options)
    before = len(asked)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert len(asked) == before  # the verdicts are those of the checkpoint
    for name, value in whole.model.state_dict().items():
        assert value.equal(resumed.model.state_dict()[name])


def test_without_a_grader_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing judges them: give grader\."):
        trainer(tmp_path, **SDPO)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rollout_contexts": ["siblings"]}, "rollout_contexts has 'siblings': use sibling"),
        ({"rollout_contexts": ["none", "feedback"]}, "entries after 'none' are never reached"),
        ({"rollout_contexts": ["feedback", "feedback"]}, "name each once"),
        ({"rollout_contexts": ["sibling"]}, "set num_generations of 2 or more"),
        ({"rollout_keep": "passed", "completion_source": "reference"}, "unset completion_source=reference"),
        ({"rollout_keep": "best"}, "rollout_keep"),
    ],
)
def test_options_that_cannot_be_meant(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        UniSDConfig(output_dir=str(tmp_path), **options)


def test_no_verdicts_where_nothing_asks_for_them(tmp_path: Path) -> None:
    def never(row: dict[str, Any], text: str) -> bool:
        raise AssertionError

    built = trainer(tmp_path, grader=never)
    assert not built.plan.judged and built._rollout([(0, 0)])[0].verdict is None
    assert copy.copy(built.completions).judge is None
