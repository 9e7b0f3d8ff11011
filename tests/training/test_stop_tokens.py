"""Several tokens that mean stop are one outcome of every distribution that a step looks at."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.engines import ByKey
from tests.helpers.steps import STAR, assert_same
from tests.invariants import test_reference as page
from tests.invariants.test_reference import written as beginning
from unisd import reference
from unisd import testing as tiny
from unisd.backbone import Backbone
from unisd.evaluation.likelihood import sequence_logprobs
from unisd.models.tokens import mark_ends
from unisd.rollout.engine import Completion
from unisd.testing import gradients, trainer

STOPS = [2, 40, 41]


def model(stops: Any = STOPS) -> Any:
    made = tiny.model()
    made.generation_config.eos_token_id = stops
    return made


def written(step: int, row: int) -> list[int]:
    """An answer that ends now by this token, now by that."""
    return [*beginning(step, row)[:7], STOPS[(step + row) % 3]]


def answering(tmp_path: Path, **options: Any) -> Any:
    engine = ByKey(lambda key: written(*key[1:3]))
    return trainer(tmp_path, **{"model": model(), "engine": engine, **STAR, **options})


def test_it_is_said_once_and_can_be_switched_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "unisd"):
        built = answering(tmp_path)
    told = [line for line in caplog.messages if "mean stop" in line]
    assert told == ["3 tokens mean stop (<|end|> C D): they count as one."]
    assert built.backbone.head().ends == (2, 40, 41)
    caplog.clear()
    for options in ({"merge_stop_tokens": False}, {"model": model(2)}, {"model": model([2, 9999])}):
        assert answering(tmp_path, **options).backbone.head().ends == ()
    sft = {"completion_source": "reference", "distillation_mode": "nll"}  # no teacher: the text tells
    rows = [{"prompt": "a", "completion": "b"}] * 8
    alone = trainer(tmp_path, model=model(), train_dataset=rows, **sft)
    assert alone.backbone.head().ends == ()
    assert not [line for line in caplog.messages if "mean stop" in line]


@pytest.mark.parametrize(
    "options",
    [pytest.param({"temperature": 0.7, "distillation_alpha": 0.5}, marks=pytest.mark.long), {}],
    ids=str,
)
def test_the_trainer_does_what_the_reference_says(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "written", written)
    found = []
    for loss in ("chunked", "plain"):
        given = {**STAR, **page.EMA, **options, "model": model(), "loss_implementation": loss}
        built = page.with_sgd(tmp_path / loss, 2, **given)
        start, student = reference.initial_teacher(built.model), copy.deepcopy(built.model)
        found.append(page.by_trainer(built))
    theirs = page.by_reference(built, student, 2)
    for ours in found:
        page.assert_equal(ours, theirs, start)
    apart = page.with_sgd(tmp_path / "apart", 2, **given | {"model": model(), "merge_stop_tokens": False})
    assert max(page.apart(page.by_trainer(apart), theirs, start).values()) > 5e-3


def test_layouts_give_the_same_gradients(tmp_path: Path) -> None:
    packed = gradients(answering(tmp_path, packing="packed"))
    for options in (
        {"packing": "padded"},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"loss_chunk_tokens": 7},
    ):
        assert_same(gradients(answering(tmp_path, **options)), packed)


def test_a_single_stop_token_changes_no_bit(tmp_path: Path) -> None:
    one, off = (gradients(answering(tmp_path, model=model(2), merge_stop_tokens=on)) for on in (True, False))
    assert one[0] == off[0] and all(value.equal(off[1][name]) for name, value in one[1].items())


def test_what_the_rollout_tells_is_what_is_scored(tmp_path: Path) -> None:
    """Log-probabilities of drawn tokens: of all ends, where one was drawn."""
    student = model()
    with torch.no_grad():
        student.lm_head.weight[STOPS] *= 3
    built = trainer(
        tmp_path, model=student, max_completion_length=6, token_weights=["confidence_gate"],
        loss_aggregation="token", max_steps=1,
    )  # fmt: skip
    assert built.engine.tells_logps
    numbers = [(row, g) for row in range(8) for g in range(6)]
    completions = built.completions.complete(numbers, 0)
    ended = [c for c in completions if c.ids[-1] in STOPS]
    assert len({c.ids[-1] for c in ended}) > 1
    requests = built._requests(numbers, completions)
    head = built.backbone.head()
    for request, completion in zip(requests, completions, strict=True):
        assert completion.logps is not None
        logits = built.model(torch.tensor([request.student + completion.ids])).logits[0, :-1]
        logp_TV = head.with_one_end(logits[len(request.student) - 1 :].log_softmax(-1))
        expected = logp_TV.gather(-1, head.outcomes(torch.tensor(completion.ids))[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logps), expected, rtol=1e-4, atol=1e-4)


class Telling(ByKey):
    """An engine of its own, which tells how likely each token was by itself."""

    returns_logps = True

    def generate(self, *args: Any) -> list[Completion]:
        return [Completion(c.ids, False, logps=[-1.0] * len(c.ids)) for c in super().generate(*args)]


def test_no_importance_ratio_is_made_of_one_of_several_ends(tmp_path: Path) -> None:
    engine = Telling(lambda key: written(*key[1:3]))
    for stops, ratio_of_end in ((STOPS, False), (2, True)):
        built = answering(tmp_path, model=model(stops), engine=engine)
        (completion,) = built.completions.complete([(1, 0)], 1)
        assert completion.ids[-1] == STOPS[2] and completion.logps[:-1] == [-1.0] * (len(completion.ids) - 1)
        assert math.isnan(completion.logps[-1]) is not ratio_of_end


def test_likelihoods_of_an_evaluation_stay_those_of_tokens() -> None:
    """A perplexity is that of the text, whatever losses take together."""
    student, prompts = model(), [[7, 8, 9]]
    before, _ = sequence_logprobs(student, prompts, [[30, 40]])
    assert mark_ends(student, tiny.tokenizer()) == STOPS and Backbone(student).head().ends == (2, 40, 41)
    after, _ = sequence_logprobs(student, prompts, [[30, 40]])
    assert torch.equal(before, after)
