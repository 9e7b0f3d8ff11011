"""A resumed run says what is otherwise than in its checkpoint: it takes effect, or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from unisd import UserError
from unisd import testing as tiny
from unisd.testing import trainer
from unisd.training import record

pytestmark = pytest.mark.long  # many short trainings, which together take long

SAVING = {
    "save_strategy": "steps",
    "save_steps": 1,
    "num_train_epochs": 99,
    "teacher_model_kind": "ema",
    "max_completion_length": 4,
    "gradient_accumulation_steps": 2,
}


def build(folder: Path, **options: Any) -> Any:
    return trainer(folder, **{**SAVING, "train_dataset": tiny.rows(8, 0), "max_steps": 2, **options})


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full run of two steps, of which tests take copies."""
    folder = tmp_path_factory.mktemp("full") / "run"
    build(folder, learning_rate=1e-3).train()
    return folder


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "run"
    build(folder, peft_config=lora()).train()
    return folder


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "run"))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("resuming ")]


def rates(folder: Path) -> list[float]:
    return [json.loads(line)["learning_rate"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as refused:
        build(folder, max_steps=3, **options).train(resume_from_checkpoint=True)
    return str(refused.value)


# -- what takes effect -----------------------------------------------------------------------------


def test_learning_rate_decay_and_schedule_take_effect(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy(trained, tmp_path)
    options = {"learning_rate": 3e-3, "weight_decay": 0.25, "adam_beta2": 0.9}
    resumed = build(folder, max_steps=4, lr_scheduler_type="linear", **options)
    resumed.train(resume_from_checkpoint=True)
    assert said(caplog) == [
        "resuming checkpoint-2: adam_beta2: 0.999 -> 0.9, takes effect",
        "resuming checkpoint-2: learning_rate: 0.001 -> 0.003, takes effect",
        "resuming checkpoint-2: lr_scheduler_type: constant -> linear, takes effect",
        "resuming checkpoint-2: max_steps: 2 -> 4, takes effect",
        "resuming checkpoint-2: weight_decay: 0.0 -> 0.25, takes effect",
    ]
    assert rates(folder) == pytest.approx([1e-3, 1e-3, 1.5e-3, 0.75e-3])
    group, other = resumed.optimizer.param_groups
    assert (group["weight_decay"], other["weight_decay"]) == (0.25, 0.0)
    assert group["betas"] == (0.9, 0.9) and group["initial_lr"] == 3e-3


def test_nothing_is_said_of_what_changes_nothing(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harmless = {
        "logging_steps": 5,
        "save_steps": 2,
        "save_total_limit": 1,
        "alarms": "off",
        "packing": "padded",
    }
    resumed = build(copy(trained, tmp_path), rollout_batch_size=2, **harmless)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert said(caplog) == []
    assert (resumed.state.logging_steps, resumed.state.save_steps) == (5, 2)


def test_how_often_to_save_is_as_the_resumed_run_says(trained: Path, tmp_path: Path) -> None:
    folder = copy(trained, tmp_path)
    build(folder, max_steps=6, save_steps=3).train(resume_from_checkpoint=True)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in (1, 2, 3, 6)
    ]


def test_other_rows_and_rows_of_a_step_are_said(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resumed = build(
        copy(trained, tmp_path), max_steps=3, train_dataset=tiny.rows(9, 0), gradient_accumulation_steps=1
    )
    resumed.train(resume_from_checkpoint=True)
    text = "\n".join(said(caplog))
    assert "gradient_accumulation_steps: 2 -> 1, takes effect" in text
    assert "training rows: 8 (" in text and "-> 9 (" in text
    assert (
        "rows of a step: 4 -> 2, takes effect: in the epoch that was begun some rows may come twice" in text
    )


def test_a_resumed_run_counts_from_what_was_best_only_by_the_same_measure(tmp_path: Path) -> None:
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": tiny.rows(2, 0)}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    build(tmp_path, **evaluated, **best).train()
    other = build(tmp_path, **{**evaluated, **best, "eval_dataset": tiny.rows(3, 0)}, max_steps=3)
    other.train(resume_from_checkpoint=True)
    assert other.state.best_global_step == 3


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lora_alpha": 16}, "lora_alpha is 8 in it and 16 in this run"),
        ({"r": 2}, "lora_r is 4 in it and 2 in this run"),
        ({"use_rslora": True}, "use_rslora is False in it and True in this run"),
        (
            {"target_modules": ["q_proj"]},
            "lora_target_modules is q_proj, v_proj in it and q_proj in this run",
        ),
    ],
)
def test_another_adapter_is_refused(
    adapted: Path, tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    text = refusal(copy(adapted, tmp_path), peft_config=lora(**options))
    assert told in text and "resume with the checkpoint's, or start a new run in another output_dir" in text


def test_another_initial_model_is_refused_also_under_an_adapter(
    trained: Path, adapted: Path, tmp_path: Path
) -> None:
    for folder, options in ((trained, {}), (adapted, {"peft_config": lora()})):
        text = refusal(copy(folder, tmp_path / folder.parent.name), model=tiny.model(seed=5), **options)
        assert "its initial model was" in text and "with other weights" in text


def test_an_adapter_and_all_weights_do_not_go_on_from_each_other(
    trained: Path, adapted: Path, tmp_path: Path
) -> None:
    assert "use_peft is True in it and False in this run" in refusal(copy(adapted, tmp_path / "a"))
    text = refusal(copy(trained, tmp_path / "b"), peft_config=lora())
    assert "use_peft is False in it and True in this run" in text


def test_another_optimizer_and_a_schedule_without_formula_are_refused(trained: Path, tmp_path: Path) -> None:
    folder = copy(trained, tmp_path)
    text = refusal(folder, optim="sgd")
    assert "optim is adamw_torch" in text and "resume with optim=adamw_torch" in text
    plateau = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "eval_strategy": "steps",
        "eval_dataset": tiny.rows(2, 0),
    }
    assert "resume with lr_scheduler_type=constant, or start a new run" in refusal(folder, **plateau)


def test_a_checkpoint_of_weights_alone_is_refused(tmp_path: Path) -> None:
    build(tmp_path, save_only_model=True).train()
    for asked in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(UserError, match=r"checkpoint-2 holds no optimizer \(save_only_model\)"):
            build(tmp_path, max_steps=3).train(resume_from_checkpoint=asked)


def test_a_checkpoint_without_a_record_is_refused(trained: Path, tmp_path: Path) -> None:
    checkpoint = copy(trained, tmp_path) / "checkpoint-2"
    (checkpoint / record.FILE).unlink()
    with pytest.raises(UserError, match=f"checkpoint-2 is broken: {record.FILE} is missing"):
        build(tmp_path / "run", max_steps=3).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(UserError, match=f"checkpoint-2/{record.FILE} is missing"):
        record.read(checkpoint)


# -- the fingerprint of a model --------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_weights_without_an_adapter() -> None:
    one = record.fingerprint(tiny.model())
    assert one == record.fingerprint(tiny.model()) == record.fingerprint(tiny.model().to(torch.bfloat16))
    assert one == record.fingerprint(get_peft_model(tiny.model(), lora()))
    assert one == record.fingerprint(get_peft_model(tiny.model(), lora(modules_to_save=["lm_head"])))
    assert one != record.fingerprint(tiny.model(seed=1))
    other = tiny.model()
    with torch.no_grad():  # as of an adapter that was merged into it
        other.model.layers[1].self_attn.v_proj.weight.mul_(1.1)
    assert one != record.fingerprint(other)


def test_rows_of_added_tokens_are_no_part_of_the_fingerprint() -> None:
    found = set()
    for seed in (1, 2):
        model = tiny.model()
        torch.manual_seed(seed)  # transformers draws the new rows
        model.resize_token_embeddings(model.config.vocab_size + 3)
        found.add(record.fingerprint(model))
    assert len(found) == 1


def test_a_trainer_may_train_twice(tmp_path: Path) -> None:
    built = build(tmp_path, max_steps=1, save_strategy="no")
    built.train()
    assert built.train().global_step == 1


# -- remedies that our own errors give -------------------------------------------------------------


def test_less_memory_for_the_same_steps(tmp_path: Path) -> None:
    """The remedy of a rank that runs out of memory, which promises that the steps stay the same."""
    whole = build(tmp_path / "whole", max_steps=3)
    whole.train()
    build(tmp_path / "broken", max_steps=1).train()
    halved = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    resumed = build(tmp_path / "broken", max_steps=3, **halved)
    resumed.train(resume_from_checkpoint=True)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "broken")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    "remedy",
    [
        {"max_completion_length": 2},
        {"gradient_checkpointing": True},
        {"token_budget": 64},
        {"learning_rate": 1e-4},
        {"bf16": True},
    ],
)
def test_remedies_of_errors_are_taken_at_a_resume(
    trained: Path, tmp_path: Path, remedy: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy(trained, tmp_path)
    resumed = build(folder, max_steps=3, **remedy)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    name = next(iter(remedy))
    assert any(f"{name}: " in line for line in said(caplog)) or name in (
        "gradient_checkpointing",
        "token_budget",
    )
    if name == "learning_rate":
        assert rates(folder)[-1] == 1e-4


def test_a_run_that_goes_on_without_fp16_leaves_its_loss_scale_behind(trained: Path, tmp_path: Path) -> None:
    folder = copy(trained, tmp_path)
    torch.save({"scale": 1.0}, folder / "checkpoint-2" / "scaler.pt")
    built = build(folder, max_steps=3)
    built._load_scaler(str(folder / "checkpoint-2"))
    assert built.accelerator.scaler is None


# -- folders ---------------------------------------------------------------------------------------


def test_a_second_run_in_the_folder_of_another_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = copy(trained, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError) as refused:
        build(folder, save_total_limit=1).train()
    assert "holds another run (checkpoint-2, metrics.jsonl): continue it with" in str(refused.value)
    assert "resume_from_checkpoint=True, choose another output_dir" in str(refused.value)
    with pytest.raises(UserError, match="holds another run"):  # from a checkpoint elsewhere
        build(folder).train(resume_from_checkpoint=str(trained / "checkpoint-1"))
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("rows", [8, 10])
def test_a_run_that_had_taken_all_its_steps_takes_no_more(tmp_path: Path, rows: int) -> None:
    build(tmp_path, max_steps=3, train_dataset=tiny.rows(rows, 0)).train()
    again = build(tmp_path, max_steps=3, train_dataset=tiny.rows(rows, 0))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    with pytest.raises(UserError, match="checkpoint-3 is of step 3, and this run ends at step 2"):
        build(tmp_path, max_steps=2, train_dataset=tiny.rows(rows, 0)).train(resume_from_checkpoint=True)
