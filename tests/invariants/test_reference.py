"""The trainer against the page that states the method (:mod:`unisd.reference`).

Some optimizer steps on the same answers must give the same losses, weights and teacher: for each
mechanism and for all together, with all weights trained and with LoRA.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.helpers.engines import ByKey
from tests.helpers.steps import STAR
from unisd import UniSDConfig, reference
from unisd import testing as tiny
from unisd.testing import trainer

RATE = 0.05  # of plain SGD: a step is the gradient
EPS = torch.finfo(torch.float32).eps
EMA = {"teacher_model_kind": "ema", "teacher_update_rate": 0.2}  # far beyond rounding


def written(step: int, row: int) -> list[int]:
    """The answer to a row in a step: any tokens, of any length."""
    generator = torch.Generator().manual_seed(1000 * step + row)
    length = int(torch.randint(1, 10, (), generator=generator))
    return torch.randint(6, tiny.SIZES["vocab_size"], (length,), generator=generator).tolist()


def rows() -> list[dict[str, Any]]:
    """One without a wrong reference, one with a single context, one with two of three."""
    made = tiny.rows(8)
    del made[1]["negative_context"]
    made[2]["auxiliary_contexts"] = made[2]["auxiliary_contexts"][:1]
    made[3]["auxiliary_contexts"] = made[3]["auxiliary_contexts"][:2]
    return made


Found = tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]  # losses, student, teacher


def with_sgd(tmp_path: Path, steps: int, **options: Any) -> Any:
    plain = {"optim": "sgd", "learning_rate": RATE, "max_grad_norm": 0.0, "max_steps": steps}
    return trainer(
        tmp_path, train_dataset=rows(), engine=ByKey(lambda key: written(*key[1:3])), **{**plain, **options}
    )


def by_trainer(built: Any) -> Found:
    built.train()
    losses = [line["loss"] for line in built.state.log_history if "loss" in line]
    return losses, reference.initial_teacher(built.model), dict(built.teacher.state)


def by_reference(built: Any, model: Any, steps: int, **changed: Any) -> Found:
    """The same on a copy of the student; `changed` options must tell."""
    options = SimpleNamespace(**{**vars(built.args), **changed})
    prompts, K = built.prompts, built.args.num_auxiliary_contexts
    teacher = reference.initial_teacher(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for number in range(steps):
        batch = [
            reference.Row(
                prompts.student(row),
                prompts.teacher(row),
                written(number, i),
                prompts.auxiliary(row, K) if options.agreement != "none" else [],
                prompts.negative(row) if row.get("negative_context") else None,
            )
            for i, row in enumerate(built.rows)
        ]
        losses.append(float(reference.step(model, teacher, optimizer, batch, options)))
    return losses, reference.initial_teacher(model), teacher


def apart(a: Found, b: Found, start: dict[str, torch.Tensor]) -> dict[str, float]:
    """Distance of two runs: of the losses, and of weights and teacher relative to their way."""
    found = {"loss": max(abs(x - y) / abs(y) for x, y in zip(a[0], b[0], strict=True))}
    for name, mine, theirs in (("weights", a[1], b[1]), ("teacher", a[2], b[2])):
        assert mine.keys() == theirs.keys() == start.keys()
        went = max(float((theirs[key] - start[key]).abs().max()) for key in start)
        # less what rounding of the weights themselves may be
        spread = {key: (mine[key] - theirs[key]).abs() - 2 * EPS * theirs[key].abs() for key in start}
        off = max(0.0, *(float(value.max()) for value in spread.values()))
        found[name] = off / went if went else off
    return found


def assert_equal(ours: Found, theirs: Found, start: dict[str, torch.Tensor]) -> None:
    found = apart(ours, theirs, start)
    assert max(found.values()) < 2e-5, found
    assert any((ours[1][key] != start[key]).any() for key in start)


# Options, and an option that is changed in the reference alone: the comparison must notice.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "off": ({"temperature": 0.7}, {"temperature": 0.8}),
    "reverse_by_tokens": (
        {"distillation_alpha": 1.0, "loss_aggregation": "token"},
        {"loss_aggregation": "sequence"},
    ),
    "mixture_entry_clip": ({"distillation_alpha": 0.3, "entry_clip": 1e-3}, {"entry_clip": None}),
    "agreement_token": ({"agreement": "token", "agreement_gamma": 1.0}, {"agreement": "none"}),
    "agreement_sequence": (
        {"agreement": "sequence", "agreement_gamma": 30.0, "loss_aggregation": "token"},
        {"agreement": "none"},
    ),
    "ema": (EMA, {"teacher_update_rate": 0.25}),
    "contrast": ({"contrastive_weight": 0.5}, {"contrastive_margin": 0.1}),
    "features": ({"feature_weight": 0.5}, {"feature_weight": 0.4}),
    "features_only": ({"feature_weight": 1.0, "distillation_weight": 0.0}, {"distillation_weight": 1.0}),
    "token_clip": ({"token_clip": 0.1}, {"token_clip": None}),
    "token_clip_quantile": ({"token_clip_quantile": 0.813}, {"token_clip_quantile": 0.85}),
    "star": ({**STAR, **EMA}, {"agreement": "none"}),
}


# Each mechanism alone, and all together; under LoRA, too.
# the others are parts of `star`
FAST = ("mixture_entry_clip", "star")
RUNS = [
    pytest.param(case, False, id=f"{case}-full", marks=[] if case in FAST else pytest.mark.long)
    for case in CASES
] + [
    pytest.param(case, True, id=f"{case}-lora", marks=[] if case == "star" else pytest.mark.long)
    for case in CASES
]


@pytest.mark.parametrize(("case", "lora"), RUNS)
def test_the_trainer_does_what_the_reference_says(tmp_path: Path, case: str, lora: bool) -> None:
    options, changed = CASES[case]
    steps = 3 if "teacher_model_kind" in options else 2
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    built = with_sgd(tmp_path, steps, peft_config=adapter if lora else None, **options)
    start, model, other = reference.initial_teacher(built.model), *(copy.deepcopy(built.model) for _ in "ab")
    ours = by_trainer(built)
    assert_equal(ours, by_reference(built, model, steps), start)
    if not lora:
        mutant = by_reference(built, other, steps, **changed)
        assert max(apart(ours, mutant, start).values()) > 5e-3


# a tied head; soft-capped logits; logits that are divided, multiplied
@pytest.mark.parametrize(
    "family",
    ["gemma3", *(pytest.param(name, marks=pytest.mark.long) for name in ("qwen3", "granite", "cohere"))],
)
def test_the_reference_reads_the_logits_of_every_family(tmp_path: Path, family: str) -> None:
    built = with_sgd(tmp_path, 1, family=family, **{**STAR, **EMA})
    start, model = reference.initial_teacher(built.model), copy.deepcopy(built.model)
    assert_equal(by_trainer(built), by_reference(built, model, 1), start)


def test_the_student_of_the_reference_answers_by_itself(tmp_path: Path) -> None:
    built = trainer(tmp_path, temperature=1e-4)  # the most likely token, then
    row = built.rows[0]
    prompt, optimizer = built.prompts.student(row), torch.optim.SGD(built.model.parameters(), lr=RATE)
    answer = reference.sample(built.model, prompt, built.args)
    assert answer == built.engine.generate([prompt], None, built.sampling)[0].ids and len(answer) > 1
    ends = [*answer[:2], answer[-1]][1]  # it writes this one second
    built.model.generation_config.eos_token_id = [2, ends]
    assert reference.sample(built.model, prompt, built.args) == answer[: answer.index(ends) + 1]
    built.args.temperature = 1.0
    batch = [reference.Row(prompt, built.prompts.teacher(row))]
    loss = reference.step(built.model, reference.initial_teacher(built.model), optimizer, batch, built.args)
    assert loss > 0 and loss.shape == ()


def test_rows_without_contexts_or_wrong_reference_have_no_such_terms() -> None:
    """A step in which no row has two contexts, and none a wrong reference, is the step without
    agreement and contrast.
    """
    model = tiny.model()
    batch = [reference.Row([7, 8, 9], [9, 9, 8], [30 + i, 40, 2], contexts=[[8, 8]]) for i in range(2)]
    off = UniSDConfig(output_dir="unused", use_cpu=True)
    found = []
    for changed in ({}, {"agreement": "token", "contrastive_weight": 0.1}, {"agreement": "sequence"}):
        options = SimpleNamespace(**{**vars(off), **changed})
        student = copy.deepcopy(model)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
        teacher = reference.initial_teacher(model)
        found.append(reference.step(student, teacher, optimizer, batch, options))
    assert found[0] == found[1] == found[2] > 0
