"""What a trainer makes of its model, its rows and its machine before the first step."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig
from test_invariants import trainer
from transformers import TrainingArguments

import unisd.trainer
from unisd import UniSDConfig, UniSDTrainer, UserError, recipes


def test_a_model_by_name_is_trained_in_float32(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    asked = []

    def load(name: str, dtype: str = "auto") -> Any:
        asked.append(dtype)
        return tiny.model(dtype=torch.bfloat16), tiny.tokenizer(), None

    monkeypatch.setattr(unisd.trainer, "load_model_and_tokenizer", load)
    args = UniSDConfig(output_dir=str(tmp_path), use_cpu=True)
    with caplog.at_level(logging.WARNING):
        UniSDTrainer("some/model", args, tiny.rows(2))
        assert asked == ["float32"] and caplog.text.count("Trained weights of 16 bits") == 1
        UniSDTrainer("some/model", args, tiny.rows(2), peft_config=LoraConfig(r=2, target_modules="all-linear"))
    assert asked == ["float32", "auto"] and caplog.text.count("Trained weights of 16 bits") == 1


def test_several_devices_without_a_launcher(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    setup = TrainingArguments.__post_init__

    def on_four(self: Any) -> None:
        setup(self)
        self._n_gpu = 4

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_four)
    with caplog.at_level(logging.WARNING):
        args = UniSDConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2)
    assert args.n_gpu == 1 and args.train_batch_size == 2 and "--accelerate_config ddp" in caplog.text


def test_the_answer_is_the_reference_by_default(tmp_path: Any) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["privileged_context"]} for row in tiny.rows(8)]
    built = trainer(tmp_path, rows=rows)
    assert [row["privileged_context"] for row in built.rows] == [row["completion"] for row in rows]
    with pytest.raises(UserError, match="no column 'privileged_context'"):
        trainer(tmp_path, rows=[{"prompt": row["prompt"]} for row in rows])


def test_prompts_alone_do_for_the_models_own_answers(tmp_path: Any) -> None:
    rows = [{"prompt": row["prompt"]} for row in tiny.rows(8)]
    trainer(tmp_path, rows=rows, **recipes.load("ssd").options | {"max_completion_length": 8, "max_steps": 1}).train()
