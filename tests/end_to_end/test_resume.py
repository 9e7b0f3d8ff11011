"""A run that is killed and resumed ends with the same bits as one that was left alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from safetensors.torch import load_file

from tests.helpers.steps import STAR
from unisd import UserError
from unisd import testing as tiny
from unisd.testing import trainer
from unisd.training.checkpoints import last_complete_checkpoint, problem_of

STEPS = 7


def build(folder: Path, lora: bool, **extra: Any) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1) if lora else None
    options = {
        **STAR,
        "max_steps": STEPS,
        "num_train_epochs": 99,
        "save_strategy": "steps",
        "save_steps": 2,
        "peft_config": config,
    }
    # 12 rows in steps of 8: the checkpoint falls into the middle of an epoch.
    return trainer(folder, train_dataset=tiny.rows(12), **{**options, **extra})


def kill_at_step_five(folder: str, lora: bool) -> None:
    import os

    from transformers import TrainerCallback

    class Killer(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    built = build(Path(folder), lora)
    built.add_callback(Killer())
    built.train()


@pytest.mark.long
@pytest.mark.parametrize("lora", [False, True])
def test_kill_and_resume_is_bit_identical(tmp_path: Path, lora: bool) -> None:
    whole = build(tmp_path / "whole", lora)
    whole.train()

    paths, folder = f"sys.path[:0] = {sys.path!r}", str(tmp_path / "killed")
    start = "from tests.end_to_end.test_resume import kill_at_step_five"
    code = f"import sys; {paths}; {start}; kill_at_step_five({folder!r}, {lora})"
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    # What a kill in the middle of saving leaves behind is passed over.
    (tmp_path / "killed" / "checkpoint-6").mkdir(exist_ok=True)
    assert str(last_complete_checkpoint(tmp_path / "killed")).endswith("checkpoint-4")

    resumed = build(tmp_path / "killed", lora)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS

    name = "adapter_model.safetensors" if lora else "model.safetensors"
    for built in (whole, resumed):
        built.save_model()
    a, b = (load_file(tmp_path / folder / name) for folder in ("whole", "killed"))
    assert a.keys() == b.keys()
    assert all(a[key].equal(b[key]) for key in a)
    assert all(whole.teacher.state[key].equal(resumed.teacher.state[key]) for key in whole.teacher.state)

    lines = [
        [json.loads(line) for line in (tmp_path / f / "metrics.jsonl").read_text().splitlines()]
        for f in ("whole", "killed")
    ]
    assert [line["step"] for line in lines[1]] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]


@pytest.mark.long
def test_resuming_from_an_earlier_step_leaves_its_old_branch_aside(tmp_path: Path) -> None:
    build(tmp_path, False, max_steps=3, save_steps=1).train()
    (tmp_path / "set-aside" / "checkpoint-3").mkdir(parents=True)  # of an earlier time
    going_on = build(tmp_path, False, max_steps=2, save_steps=1, save_total_limit=1)
    going_on.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert sorted(path.name for path in (tmp_path / "set-aside").iterdir()) == [
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-3.2",
    ]
    assert problem_of(tmp_path / "set-aside" / "checkpoint-3.2") is None
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.long
def test_resuming_with_another_teacher_is_refused(tmp_path: Path) -> None:
    build(tmp_path, False, max_steps=2, teacher_model_kind="base").train()
    with pytest.raises(UserError, match="teacher_model_kind"):
        build(tmp_path, False).train(resume_from_checkpoint=True)
    other = trainer(
        tmp_path, model=tiny.model(seed=5), teacher_model_kind="base", train_dataset=tiny.rows(12)
    )
    with pytest.raises(UserError, match=r"its initial model was .* with other weights"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="no complete checkpoint"):
        build(tmp_path / "nothing", False).train(resume_from_checkpoint=True)


@pytest.mark.long
def test_restarted_teacher_survives_resume(tmp_path: Path) -> None:
    options = {
        **dict.fromkeys(STAR, None),
        "teacher_model_kind": "restart",
        "teacher_restart_steps": 3,
        "agreement": "none",
    }
    options |= {
        "agreement_gamma": 0.01,
        "contrastive_weight": 0.0,
        "feature_weight": 0.0,
        "token_clip_quantile": None,
    }
    whole = build(tmp_path / "a", False, **options)
    whole.train()
    build(tmp_path / "b", False, **{**options, "max_steps": 4}).train()
    resumed = build(tmp_path / "b", False, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert all(whole.teacher.state[key].equal(resumed.teacher.state[key]) for key in whole.teacher.state)
