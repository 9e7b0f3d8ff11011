"""TRL's SDFT trainer in the harness: as installed, but its generation returns given completions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl.experimental.sdft.sdft_config import SDFTConfig
from trl.experimental.sdft.sdft_trainer import SDFTTrainer

from benchmarks.settings import Star, scratch_folder
from benchmarks.shapes import TEACHER_TEMPLATE, Example, lora, tokenizer


def trainer(
    model: Any, rows: Sequence[Example], s: Star, mode: str, batch: int, peft: bool = True
) -> SDFTTrainer:
    """A trainer whose one optimizer step holds all `rows`; `mode` is TRL's `distillation_mode`."""
    args = SDFTConfig(
        output_dir=scratch_folder(),
        use_cpu=model.device.type == "cpu",
        # TRL's default is autocast to bf16, which a CPU without bf16 emulates.
        bf16=model.dtype == torch.bfloat16,
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=len(rows) // batch,
        num_generations=1,
        max_prompt_length=None,
        max_completion_length=max(len(row.completion) for row in rows),
        temperature=s.temperature,
        learning_rate=s.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        gradient_checkpointing=True,
        distillation_mode=mode,
        distillation_alpha=s.alpha,
        teacher_model_kind="ema",
        teacher_update_rate=s.ema_rate,
        teacher_prompt_template=TEACHER_TEMPLATE,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    keep = ("prompt", "privileged_context")
    built = SDFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_list([{key: row.text_row[key] for key in keep} for row in rows]),
        processing_class=tokenizer(model.config.vocab_size),
        peft_config=lora() if peft else None,
    )
    built.remove_callback(PrinterCallback)
    written = {tuple(row.student): row.completion for row in rows}
    built._generate = lambda prompts: (prompts, [written[tuple(ids)] for ids in prompts])
    return built


def step(built: SDFTTrainer) -> float:
    """One optimizer step; its loss."""
    return float(built.train().training_loss)
