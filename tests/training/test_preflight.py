"""What would end a run late, or let it run for nothing, is told before its first step."""

from __future__ import annotations

import copy
import logging
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers import templates
from unisd import UserError
from unisd import testing as tiny
from unisd.models.generation import mend_generation_config
from unisd.testing import FixedEngine, trainer
from unisd.training import preflight

LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def with_generation(**fields: Any) -> Any:
    model = tiny.model()
    for name, value in fields.items():
        setattr(model.generation_config, name, value)
    return model


def no_trace(tmp_path: Path) -> tuple[Any, ...]:
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        numpy.random.get_state()[1].tolist(),
        sorted(path.name for path in tmp_path.iterdir()),
    )


@pytest.mark.parametrize("lora", [None, LORA])
def test_it_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Any) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    built = trainer(tmp_path / "out", peft_config=copy.deepcopy(lora), lr_scheduler_type="cosine")
    weights = {name: p.clone() for name, p in built.model.named_parameters()}
    config, before = str(vars(built.backbone.causal_lm.config)), no_trace(scratch)
    preflight.check_ready(built)
    assert no_trace(scratch) == before and before[-1] == []
    assert built.optimizer is None and built.lr_scheduler is None
    assert str(vars(built.backbone.causal_lm.config)) == config
    assert all(torch.equal(p, weights[name]) for name, p in built.model.named_parameters())
    assert not [*(tmp_path / "out").iterdir()]


# ------------------------------------------------------------------------------- the first save


@pytest.mark.parametrize(
    ("fields", "mended", "told"),
    [
        (
            {"temperature": 0.6, "top_p": 0.9},
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
            "do_sample=true is set, because of temperature=0.6 and top_p=0.9.",
        ),
        (
            {"temperature": 0.6, "do_sample": False},
            {"do_sample": False, "temperature": None},
            "temperature=0.6 left out, since do_sample=false.",
        ),
        (
            {"length_penalty": 0.8},
            {"length_penalty": None},
            "length_penalty=0.8 left out, since there are no beams",
        ),
        ({"pad_token_id": -1}, {"pad_token_id": None}, "pad_token_id=-1 left out"),
    ],
)
def test_a_generation_config_that_cannot_be_saved_is_mended(
    tmp_path: Path, caplog: Any, fields: dict[str, Any], mended: dict[str, Any], told: str
) -> None:
    with caplog.at_level(logging.WARNING):
        built = trainer(tmp_path, model=with_generation(**fields))
    assert f"The base's generation_config.json could not be saved as it is: {told}" in caplog.text
    config = built.model.generation_config
    assert {name: getattr(config, name) for name in mended} == mended
    built.save_model(str(tmp_path / "saved"))
    assert mend_generation_config(built.model) is None


def test_a_generation_config_that_nobody_can_mend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"could not be saved after training: .*num_return_sequences.*: fix"):
        trainer(tmp_path, model=with_generation(num_return_sequences=2))


def test_a_tokenizer_that_cannot_be_saved_is_told_first(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.init_kwargs["odd"] = object()  # what some tokenizers' own code keeps
    with pytest.raises(UserError, match=r"what is trained could not be saved: .*object.*before training"):
        trainer(tmp_path, processing_class=tokenizer)


# --------------------------------------------------------------------------- nothing to train on


def test_all_tokens_skipped(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"num_loss_tokens_to_skip=10 leaves no token with a loss.*lower it"):
        trainer(tmp_path, num_loss_tokens_to_skip=10)
    rows = [{"prompt": "a", "completion": "bc"}] * 8
    short: dict[str, Any] = {"completion_source": "reference", "max_completion_length": 30}
    with pytest.raises(UserError, match="num_loss_tokens_to_skip=9 leaves no token of any reference"):
        trainer(tmp_path, train_dataset=rows, num_loss_tokens_to_skip=9, **short)
    trainer(tmp_path, train_dataset=rows, num_loss_tokens_to_skip=2, **short)


@pytest.mark.parametrize(
    ("completions", "options", "told"),
    [
        (
            [[5] * 99],
            {"mask_truncated_completions": True},
            "8 of 8 answers ran into max_completion_length=10, and mask_truncated_completions leaves",
        ),
        ([[5, 2]], {"num_loss_tokens_to_skip": 4}, "no answer is longer than num_loss_tokens_to_skip=4"),
    ],
)
def test_a_first_step_without_loss_ends_the_run(
    tmp_path: Path, completions: list[list[int]], options: dict[str, Any], told: str
) -> None:
    built = trainer(tmp_path, engine=FixedEngine(completions), max_steps=2, **options)
    before = {name: p.clone() for name, p in built.model.named_parameters()}
    with pytest.raises(UserError, match=f"no token of the first step carries loss: {told}"):
        built.train()
    assert all(torch.equal(p, before[name]) for name, p in built.model.named_parameters())


def test_a_small_first_step_without_loss_is_only_told(tmp_path: Path, caplog: Any) -> None:
    few = {"per_device_train_batch_size": 1, "mask_truncated_completions": True, "max_steps": 1}
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, engine=FixedEngine([[5] * 99]), **few).train()
    assert "Step 1: no token carries loss: 4 of 4 answers ran into" in caplog.text


def test_nothing_is_trainable(tmp_path: Path) -> None:
    frozen = tiny.model().requires_grad_(False)
    with pytest.raises(UserError, match=r"nothing is trainable: all weights are frozen.*give peft_config"):
        trainer(tmp_path, model=frozen)
    trainer(tmp_path, model=frozen, train_dataset=None)  # to evaluate
    adapted = get_peft_model(tiny.model(), copy.deepcopy(LORA)).requires_grad_(False)
    with pytest.raises(UserError, match=r"the adapter is frozen: .*is_trainable=True"):
        trainer(tmp_path, model=adapted)


@pytest.mark.long
def test_an_adapters_folder_is_opened_for_training(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny.model().save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(LORA))
    adapted.save_pretrained(tmp_path / "adapter")
    built = trainer(tmp_path / "out", model=str(tmp_path / "adapter"), max_steps=1)
    trained = {name: p.clone() for name, p in built.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    built.train()
    moved = dict(built.model.named_parameters())
    assert any(not torch.equal(value, moved[name]) for name, value in trained.items())


def test_an_optimizer_of_other_weights(tmp_path: Path, caplog: Any) -> None:
    model, other = tiny.model(), tiny.model()
    with pytest.raises(UserError, match="the optimizer in optimizers holds none of the weights"):
        trainer(tmp_path, model=model, optimizers=(torch.optim.SGD(other.parameters(), lr=0.1), None))
    of_base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="with peft_config: wrap the model first"):
        trainer(tmp_path, model=model, optimizers=(of_base, None), peft_config=copy.deepcopy(LORA))
    model = tiny.model()
    head = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING):
        built = trainer(tmp_path, model=model, optimizers=(head, None), lr_scheduler_type="cosine")
    assert "leaves 20 of 21 trained tensors as they are" in caplog.text
    assert built.optimizer is head and "initial_lr" not in head.param_groups[0]  # the schedule's trace
    schedule = torch.optim.lr_scheduler.ConstantLR(of_base)
    with pytest.raises(UserError, match="the schedule in optimizers belongs to another optimizer"):
        trainer(tmp_path, model=model, optimizers=(head, schedule))


# ------------------------------------------------------------- optimizer, schedule, batches, metric


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type=cosine_with_min_lr .*min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps.*set lr_scheduler_kwargs"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"foo": 1}},
            "lr_scheduler_type=cosine .*foo",
        ),
        ({"optim": "galore_adamw"}, "optim=galore_adamw cannot be built: .*galore_torch"),
        ({"optim": "grokadamw"}, "optim=grokadamw cannot be built: .*grokadamw"),
        ({"optim_args": "foo"}, r"optim=\w+ cannot be built: .*see optim, optim_args"),
        ({"optim": "lomo"}, "optim=lomo changes weights within the backward pass"),
        ({"optim": "galore_adamw_layerwise"}, "optim=galore_adamw_layerwise changes weights within"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 20},
            "dataloader_drop_last leaves no batch: there are 8 rows, and a batch has 20",
        ),
        (
            {"num_iterations": 2, "per_device_train_batch_size": 4},
            "num_iterations=2 needs a full step of 16 rows, but there are 8",
        ),
        ({"eval_on_start": True}, "eval_on_start has no rows: give eval_dataset"),
        ({"fp16": True}, "fp16 has no effect on a CPU: unset it, or set bf16"),
    ],
)
def test_what_transformers_would_say_late(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        trainer(tmp_path, **options)


def right(row: Any, text: str) -> bool:
    return True


@pytest.mark.parametrize(
    ("metric", "more", "told"),
    [
        ("acuracy", {"grader": right}, r"\(loss, accuracy, runtime\): did you mean accuracy\?"),
        ("accuracy", {}, r"accuracy needs a grader"),
        ("f1", {}, "metric_for_best_model=f1 is not among .* choose one of these"),
        ("loss", {"eval_dataset": {"one": tiny.rows(2)}}, "did you mean one_loss"),
        ("loss", {"eval_strategy": "no"}, "metric_for_best_model=loss needs evaluations"),
        (
            "loss",
            {"eval_strategy": "no", "save_strategy": "best"},
            "save_strategy=best saves nothing without evaluations",
        ),
    ],
)
def test_a_metric_that_nobody_reports(tmp_path: Path, metric: str, more: dict[str, Any], told: str) -> None:
    settings = {"eval_strategy": "steps", "eval_dataset": tiny.rows(2), "metric_for_best_model": metric}
    with pytest.raises(UserError, match=told):
        trainer(tmp_path, **settings | more)


@pytest.mark.parametrize("metric", ["loss", "eval_loss", "accuracy"])
def test_a_metric_that_is_reported(tmp_path: Path, metric: str) -> None:
    settings = {"eval_strategy": "steps", "eval_dataset": tiny.rows(2), "metric_for_best_model": metric}
    trainer(tmp_path, grader=right, **settings)


# ------------------------------------------------------------------------------------- the hub


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", offline)
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", offline)
    told = "push_to_hub: the hub refuses or cannot be reached: offline mode is enabled: log in with `hf"
    with pytest.raises(UserError, match=told):
        trainer(tmp_path, push_to_hub=True)
    args = trainer(tmp_path).args
    preflight.check_hub(args)  # nothing is asked
    with pytest.raises(UserError, match=told):
        preflight.check_hub(args.changed("a test", push_to_hub=True))


# ------------------------------------------------------------------------------ rows to evaluate on


def reading(vocabulary: int, context: int) -> Any:
    sizes = tiny.SIZES | {"vocab_size": vocabulary, "max_position_embeddings": context}
    return LlamaForCausalLM(LlamaConfig(**sizes))


def asked(prompt: Any) -> list[dict[str, Any]]:
    return [{"prompt": "q", "privileged_context": "a"}, {"prompt": prompt, "privileged_context": "a"}]


SYSTEM_TURN = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
UNASKABLE = [
    (templates.NO_SYSTEM, SYSTEM_TURN, r"the chat template refuses the prompt .*: put the text of the"),
    (templates.DROPS_SYSTEM, SYSTEM_TURN, r"the chat template leaves a turn of the prompt out"),
    (
        templates.CHATML, "long " * 300,
        r"the prompt has \d+ tokens, its reference \d+ and an answer up to 20, over the model's context of"
        r" \d+: shorten or remove it, or lower eval_max_new_tokens",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("template", "prompt", "told"), UNASKABLE, ids=["refused", "dropped", "too long"])
@pytest.mark.parametrize("where", ["one", "parts", "probes"])
def test_rows_to_evaluate_on_are_asked_before_the_training(
    tmp_path: Path, template: str, prompt: Any, told: str, where: str
) -> None:
    tokenizer = templates.tokenizer(template)
    model = reading(len(tokenizer), 128)
    given: dict[str, tuple[dict[str, Any], str]] = {
        "one": ({"eval_dataset": asked(prompt)}, "row 1 of the evaluation data: "),
        "parts": ({"eval_dataset": {"hard": asked(prompt)}}, "row 1 of the evaluation data 'hard': "),
        "probes": ({"probe_dataset": asked(prompt)}, "row 1 of the probe set: "),
    }
    options, row = given[where]
    common = {"model": model, "processing_class": tokenizer, "train_dataset": asked("q"), "temperature": 1.0}
    fits = {
        name: asked("q") if isinstance(rows, list) else {"a": asked("q")} for name, rows in options.items()
    }
    trainer(tmp_path / "fits", **common, **fits, eval_max_new_tokens=20)
    with pytest.raises(UserError, match=f"^{row}{told}"):
        trainer(tmp_path, **common, **options, eval_max_new_tokens=20)


def test_a_reference_that_is_too_long_to_be_measured_is_told(tmp_path: Path) -> None:
    rows = asked("q")
    rows[1]["completion"] = "x" * 600
    told = (
        r"^row 1 of the evaluation data: the prompt has \d+ tokens, its reference 601 and an answer up to 10"
    )
    with pytest.raises(UserError, match=told):
        trainer(tmp_path, model=reading(262, 512), eval_dataset=rows)
