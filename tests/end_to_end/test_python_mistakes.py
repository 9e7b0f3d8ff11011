"""What a user of Python gets wrong is told, where it is done, and costs no work."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments

from tests.helpers.engines import ByKey
from unisd import (
    Completion,
    Interruption,
    UniSDConfig,
    UserError,
    generate,
    register_target,
    register_term,
    register_weight,
)
from unisd import testing as tiny
from unisd.methods import registry, targets
from unisd.testing import trainer

ROWS = tiny.rows(8)


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> str:
    """A name for plug-ins, which is free again after the test."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(registry, "_TERMS", dict(registry._TERMS))
    monkeypatch.setattr(targets, "_REGISTRY", dict(targets._REGISTRY))
    return "mine"


# -- graders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["True", 85.0, None, (True, ""), float("nan")])
def test_a_grader_that_gives_no_verdict_is_told_in_an_evaluation(tmp_path: Path, given: Any) -> None:
    with pytest.raises(UserError, match=r"row 0: the grader gave .*: a bool, a score from 0 to 1"):
        trainer(tmp_path, grader=lambda row, text: given).evaluate(ROWS[:2])


def test_a_share_is_kept(tmp_path: Path) -> None:
    [grade] = trainer(tmp_path, grader=lambda row, text: 0.5).predict(ROWS[:1]).grades
    assert (grade.share, grade.correct) == (0.5, False)


def test_a_grader_that_raises_ends_no_training(tmp_path: Path) -> None:
    """Where it only says what the recorded answers are worth; an evaluation keeps what was done."""
    calls = itertools.count()

    def broken(row: dict[str, Any], text: str) -> bool:
        if next(calls) >= 4:
            raise ValueError("no such city")
        return True

    trainer(tmp_path / "a", grader=broken, max_steps=4, logging_steps=1).train()
    lines = (tmp_path / "a" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["correct"] for line in lines] == [True] * 4 + [None] * 4
    evaluated = trainer(
        tmp_path / "b", grader=broken, max_steps=4, eval_strategy="steps", eval_steps=2, eval_dataset=ROWS[:2]
    )
    with pytest.raises(UserError, match=r"the grader raised ValueError: no such city.*checkpoint-2"):
        evaluated.train()
    assert (tmp_path / "b" / "checkpoint-2").is_dir()


# -- engines ---------------------------------------------------------------------------------------


class Given(ByKey):
    """Returns what a function makes of the right completions."""

    def __init__(self, change: Callable[[list[Completion]], Any]) -> None:
        super().__init__(lambda key: [5, 6, 7])
        self.change = change

    def generate(self, *given: Any) -> Any:
        return self.change(super().generate(*given))


def gone(found: list[Completion]) -> Any:
    raise ConnectionError("nobody is there")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found[1:], "returned 7 completions for 8 prompts"),
        (lambda found: None, "returned NoneType for 8 prompts"),
        (lambda found: [c.ids for c in found], r"returned \[5, 6, 7\]: give unisd.Completion"),
        (lambda found: [Completion(["a"], False) for _ in found], "not a list of token numbers"),
        (lambda found: [Completion([5] * 50, False) for _ in found], "50 tokens, over the limit of 10"),
        (lambda found: [Completion([5, 6], False, logps=[0.0]) for _ in found], "1 entries of `logps`"),
        (gone, "the engine raised ConnectionError: nobody is there"),
    ],
)
def test_what_an_engine_must_not_return(tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        trainer(tmp_path, engine=Given(change), max_steps=1).train()


# -- plug-ins --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function", [lambda i: i.teacher_logp.exp(), lambda i: 5 * i.teacher_logp, lambda i: i.teacher_logp + 3]
)
def test_a_target_that_is_no_distribution_is_refused(tmp_path: Path, named: str, function: Any) -> None:
    register_target(named, sources=())(function)
    with pytest.raises(UserError, match=r"must return log-probabilities, whose shares add up to 1"):
        trainer(tmp_path, target=named, max_steps=1).train()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_target_may_rule_tokens_out(tmp_path: Path, named: str, alpha: float) -> None:
    def top(inputs: Any) -> torch.Tensor:
        kth = inputs.teacher_logp.topk(5).values[:, -1:]
        return inputs.teacher_logp.masked_fill(inputs.teacher_logp < kth, -torch.inf).log_softmax(-1)

    register_target(named, sources=())(top)
    assert (
        0 < trainer(tmp_path, target=named, distillation_alpha=alpha, max_steps=1).train().training_loss < 1e5
    )


def test_a_plug_in_that_forgot_what_it_needs_is_told(tmp_path: Path, named: str) -> None:
    register_weight(named)(lambda scores: scores.teacher_entropy.exp())
    with pytest.raises(
        UserError, match=r"without being named in its needs these are None: .*teacher_entropy"
    ):
        trainer(tmp_path, token_weights=[named], max_steps=1).train()
    register_term("far")(lambda inputs: inputs.negative_logp * 0)
    with pytest.raises(UserError, match=r"these are None: .*negative_logp"):
        trainer(tmp_path / "b", terms=["far"], max_steps=1).train()


def test_a_weight_that_is_no_number_is_not_blamed_on_rows(
    tmp_path: Path, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    register_weight(named)(lambda scores: torch.full(scores.mask.shape, torch.nan))
    trainer(tmp_path, token_weights=[named], max_steps=1).train()
    assert "though each token's divergence is: look at its weights and terms" in caplog.text


def test_a_derivative_of_another_shape_is_refused(tmp_path: Path, named: str) -> None:
    derivative = lambda inputs: inputs.student_logp.sum()  # noqa: E731
    register_term(named, derivative=derivative)(lambda inputs: inputs.student_logp**2)
    with pytest.raises(UserError, match=r"the derivative of loss term 'mine' must return shape"):
        trainer(tmp_path, terms=[named], max_steps=1).train()


def test_a_plug_in_needs_a_name_that_options_can_say() -> None:
    for register in (register_weight, register_term):
        with pytest.raises(UserError, match="is registered by a name"):
            register(lambda inputs: inputs)  # type: ignore[call-overload,arg-type]
    with pytest.raises(UserError, match="no colon"):
        register_target("a:b", sources=())


def test_one_name_may_be_given_as_a_text(named: str) -> None:
    register_weight(named, needs="entropy")(lambda scores: scores.teacher_entropy)
    register_target(named, sources="teacher/plain")(lambda inputs: inputs.teacher_logp)
    assert registry.get_weight(named).needs == {"entropy"}
    assert [str(source) for source in targets.parse_target(named).sources] == ["teacher/plain"]


# -- options and arguments -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"token_weights": "entropy_trust"}, r"a single text: give a list, as in \['entropy_trust'\]"),
        ({"num_generations": 2.0}, "num_generations=2.0 is no number of its kind: give a whole number"),
        ({"temperature": "0.7"}, "temperature='0.7' is no number of its kind"),
        ({"temperature": True}, "temperature=True is no number of its kind"),
        ({"learning_rate": "1e-4"}, "learning_rate='1e-4' is no number of its kind"),
    ],
)
def test_options_of_another_type_are_told(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        UniSDConfig(**options)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (LoraConfig(task_type="SEQ_CLS"), "set task_type='CAUSAL_LM'"),
        ({"r": 8}, "peft_config is a dict: give peft's LoraConfig"),
    ],
)
def test_adapters_that_could_not_be_opened_again(tmp_path: Path, given: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        trainer(tmp_path, peft_config=given)


def test_options_of_transformers_alone_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="args is TrainingArguments: give a UniSDConfig"):
        trainer(tmp_path, args=TrainingArguments(str(tmp_path)))


def test_rows_are_looked_at_before_the_model_is_changed(tmp_path: Path) -> None:
    model, lora = tiny.model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="has no column 'privileged_context'"):
        trainer(tmp_path, model=model, peft_config=lora, train_dataset=[{"prompt": "x"}])
    trainer(tmp_path, model=model, peft_config=lora)
    with pytest.raises(UserError, match="of an earlier trainer: load the model again"):
        trainer(tmp_path, model=model, peft_config=lora)


def test_a_file_and_an_endless_generator_are_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert len(trainer(tmp_path / "a", train_dataset=file).rows) == 8
    endless = ({**ROWS[0], "prompt": f"{i}?"} for i in itertools.count())
    assert len(trainer(tmp_path / "b", train_dataset=endless, max_steps=2).rows) == 16


def test_an_interruption_can_be_used_again(tmp_path: Path) -> None:
    class Press(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                os.kill(os.getpid(), signal.SIGINT)

    stop = Interruption()
    built = trainer(tmp_path, callbacks=[stop, Press()], max_steps=3)
    with stop.listening():
        built.train()
    assert built.state.global_step == 1
    with stop.listening():
        built.train(resume_from_checkpoint=True)
    assert built.state.global_step == 3


# -- answers ---------------------------------------------------------------------------------------


def test_prompts_may_come_from_a_generator(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    prompts = [row["prompt"] for row in ROWS[:2]]
    found = generate(model, iter(prompts), tokenizer, max_new_tokens=2)
    assert found == generate(model, prompts, tokenizer, max_new_tokens=2) and len(found) == 2
    with pytest.raises(UserError, match="prompts holds rows: give their prompts"):
        generate(model, ROWS[:2], tokenizer)
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            generate(model, prompts, tokenizer, **wrong)


def test_answers_end_with_the_context(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny.tokenizer()
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).eval()
    asked = "x" * 30
    assert len(generate(model, [asked], tokenizer, max_new_tokens=256)) == 1
    assert "in place of 256: the longest prompt leaves no more of the model's context of 64" in caplog.text
