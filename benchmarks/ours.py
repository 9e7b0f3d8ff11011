"""Run this project in the harness: the trainer itself, fed with given completions.

It generates none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from benchmarks.settings import Star, scratch_folder
from benchmarks.shapes import AUXILIARY_TEMPLATE, TEACHER_TEMPLATE, Example, lora, tokenizer
from unisd import UniSDConfig, UniSDTrainer
from unisd.rollout.engine import Completion, NoiseKey, Sampling
from unisd.scoring.requests import ScoreRequest


class GivenCompletions:
    """An engine that has written everything before (with made-up log-probabilities)."""

    returns_logps = False

    def __init__(self, rows: Sequence[Example]) -> None:
        self.rows = rows

    def sync(self) -> None:
        pass

    def generate(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[NoiseKey] | None, sampling: Sampling
    ) -> list[Completion]:
        assert keys is not None
        written = [self.rows[row].completion for _, _, row, _ in keys]
        return [Completion(ids, truncated=False, logps=[-1.0] * len(ids)) for ids in written]

    def sleep(self) -> None:
        pass


def star_options(s: Star, contexts: int) -> dict[str, Any]:
    """The recipe's options; without contexts there is no agreement."""
    return {
        "distillation_alpha": s.alpha,
        "agreement": "token" if contexts > 1 else "none",
        "num_auxiliary_contexts": contexts,
        "agreement_gamma": s.gamma,
        "contrastive_weight": s.contrast,
        "contrastive_margin": s.margin,
        "feature_weight": s.feature,
        "token_clip": s.token_clip,
    }


def trainer(
    model: Any, rows: Sequence[Example], s: Star, options: dict[str, Any], batch: int, peft: bool = True
) -> UniSDTrainer:
    """A trainer whose one optimizer step holds all `rows`, in micro-batches of `batch`."""
    settings: dict[str, Any] = {
        "output_dir": scratch_folder(),
        "use_cpu": model.device.type == "cpu",
        "bf16": model.dtype == torch.bfloat16,
        "max_steps": 1,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": len(rows) // batch,
        "max_completion_length": max(len(row.completion) for row in rows),
        "temperature": s.temperature,
        "learning_rate": s.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "gradient_checkpointing": True,
        "teacher_model_kind": "ema",
        "teacher_update_rate": s.ema_rate,
        "teacher_prompt_template": TEACHER_TEMPLATE,
        "auxiliary_prompt_template": AUXILIARY_TEMPLATE,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    built = UniSDTrainer(
        model,
        UniSDConfig(**settings | options),
        train_dataset=[row.text_row for row in rows],
        processing_class=tokenizer(model.config.vocab_size),
        peft_config=lora() if peft else None,
    )
    # In the place of the trainer's own engine, not beside it: some weights look at the
    # log-probabilities that only its own one tells.
    built.engine = built.completions.engine = GivenCompletions(rows)
    built.remove_callback(PrinterCallback)
    return built


def scoring_rows(rows: Sequence[Example]) -> list[ScoreRequest]:
    """The rows as the scoring phase takes them."""
    return [
        ScoreRequest(
            row.completion,
            [True] * len(row.completion),
            row.student,
            row.teacher,
            row.negative,
            row.auxiliary,
        )
        for row in rows
    ]


def step(built: UniSDTrainer) -> float:
    """One optimizer step; its loss."""
    built.train()
    metrics = Path(built.args.output_dir) / "metrics.jsonl"
    line = metrics.read_text(encoding="utf-8").splitlines()[-1]
    metrics.unlink()  # the next step is a run of its own
    return float(json.loads(line)["loss"])
