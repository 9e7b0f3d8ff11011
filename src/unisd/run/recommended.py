"""What to set: the options of a first run, from what `unisd probe` has measured.

Every value has its reason, in the table that the command prints and as a comment in the file that
`unisd train --config` takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.pytorch_utils import Conv1D

from unisd import memory
from unisd.config import UniSDConfig
from unisd.data.prompts import encode_completion
from unisd.data.rows import Row
from unisd.evaluation.teacher_probe import teaches
from unisd.files import write_text
from unisd.models.tokens import eos_ids
from unisd.monitoring.cost import driver_tdp, energy_of
from unisd.options.parser import UNSET
from unisd.run.options import RunOptions
from unisd.run.outputs import without_password
from unisd.run.resolve import resolve, train_parser
from unisd.training.plan import planned_steps

Figures = dict[str, Any]

STEP_ROWS = 16
"""Rows of an optimizer step, as published for UniSD (4 x 4)."""
FULL_UP_TO = 50_000_000
"""Parameters up to which all weights are trained; UniSD and OPSD train LoRA from 0.5B on."""
RATES = (
    # Parameters up to, the rate of all weights, the rate of LoRA, and where they come from.
    # All of them are places to begin at; examples/rate-sweep.yaml looks for better ones.
    (20e6, 6e-4, 1e-3, "our pilots on the pocket (docs/results/pocket.md); LoRA was not measured"),
    (300e6, 5e-5, 5e-4, "our LoRA pilots on SmolLM2-135M (docs/results/smollm2.md): 1e-3 forgot more"),
    # OPSD's script for Qwen3-1.7B has 2e-4, UniSD (arXiv 2605.06597) has 2e-5 at 0.5B and 1.5B.
    (2e9, 2e-5, 5e-5, "between UniSD's 2e-5 and OPSD's 2e-4, both LoRA; for all weights UniSD's"),
    # LoRA: UniSD at 3B to 8B, OPSD's script for Qwen3-4B. All weights: SDFT's code has 5e-5 at
    # 7B, SDPO (arXiv 2601.20802) 1e-5, its runs with feedback at 8B 1e-6.
    (math.inf, 1e-5, 2e-5, "LoRA as UniSD and OPSD; for all weights SDPO's, SDFT's code has 5e-5"),
)
MICRO_BATCHES = (8, 4, 2, 1)
ROUNDED_TO = 32
"""Tokens that a length is rounded up to a multiple of."""
BACKWARD = 3
"""A student's pass with gradient, in passes without."""


@dataclass(frozen=True)
class Recommendation:
    """Options with a reason each; `predicted` is time, memory and energy of their run."""

    values: Figures
    reasons: dict[str, str]
    predicted: Figures

    @property
    def lines(self) -> list[list[str]]:
        """Option, value and reason, of what was not given."""
        return [[name, _shown(self.values[name]), why] for name, why in self.reasons.items()]

    def write(self, path: Path, advice: str) -> None:
        """Write the file that `unisd train --config` takes.

        Raises:
            UserError: it cannot be written.
        """
        parts = [
            "# What `unisd probe` recommends for a first run; start it with: unisd train --config"
            f" {path} --output_dir FOLDER",
            f"# {advice}",
            f"# {predicted_line(self.predicted)}",
        ]
        for name, value in self.values.items():
            parts += [f"# {self.reasons[name]}"] if name in self.reasons else []
            parts.append(yaml.safe_dump({name: value}, allow_unicode=True).rstrip())
        write_text(path, "\n".join(parts) + "\n")


def recommend(
    options: RunOptions,
    report: Figures,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    prompts: Sequence[int],
) -> Recommendation:
    """The options of a first run on these rows.

    Args:
        options: what the probe was told; it stays as it is.
        report: what it has measured.
        rows: all training rows.
        prompts: lengths of the teacher's prompts.
    """
    values = _given(options)
    reasons: dict[str, str] = {}

    def add(name: str, value: Any, why: str) -> None:
        values[name], reasons[name] = value, why

    parameters = model.num_parameters()
    add("recipe", *_recipe(report))
    if values["recipe"] != "sft":
        add("teacher_prompt_layout", report["layout"], "the layout in which the teacher does better")
    adapter = options.trains_adapter or parameters > FULL_UP_TO
    if adapter and not options.trains_adapter:
        add("use_peft", True, "a LoRA adapter, as UniSD and OPSD train models of this size")
    ends = eos_ids(model, tokenizer)
    references = sorted(len(encode_completion(tokenizer, *_answered(row, ends))) for row in rows)
    add("max_completion_length", *_length(report, references, values["recipe"] == "sft"))
    rate, source = _rate(parameters, adapter)
    add("learning_rate", rate, f"a place to begin at: {source}")
    add("per_device_train_batch_size", 1, "")
    add("gradient_accumulation_steps", STEP_ROWS, f"steps of {STEP_ROWS} rows, as published for UniSD")
    resolved, config = resolve(train_parser("unisd probe"), _as_given(values))
    size = _size(model, resolved.lora_r) if adapter else _whole(model)
    config, why = _fitting(size, config, max(prompts), _free(model, config))
    if config.gradient_checkpointing:
        add("gradient_checkpointing", True, "the step would not fit without it")
    add("per_device_train_batch_size", config.per_device_train_batch_size, why)
    values["gradient_accumulation_steps"] = config.gradient_accumulation_steps
    sizes = memory.estimate(size, config, max(prompts))
    mean = sum(prompts) / len(prompts)
    predicted = _predicted(report, config, len(rows), mean, options.device_tdp)
    return Recommendation(values, reasons, {**predicted, "memory_bytes": sizes["total"]})


def predicted_line(predicted: Figures) -> str:
    """Say what the run would take."""
    energy = "" if predicted["kwh"] is None else f", {predicted['kwh']:.2g} kWh"
    return (
        f"Training would take about {predicted['steps']} steps of {predicted['s_per_step']:.3g} s here"
        f" ({predicted['seconds'] / 60:.3g} minutes), {memory.readable(predicted['memory_bytes'])}{energy}."
    )


def _given(options: RunOptions) -> Figures:
    """What the probe was told that `unisd train` is to be told too, as a file holds it."""
    names = [name for name in options.values if name in options.explicit or name == "task"]
    found = {name: None if options.values[name] is UNSET else options.values[name] for name in names}
    return {name: without_password(value) for name, value in found.items()}


def _as_given(values: Figures) -> Figures:
    return {name: UNSET if value is None else value for name, value in values.items()}


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _recipe(report: Figures) -> tuple[str, str]:
    """Distil where there is something to learn from the teacher, else train on the references."""
    graded = "accuracy" in report["student"]
    if not teaches(report):
        return "sft", (
            "the teacher is not shown to have anything to teach (see the verdict), so that only the"
            " references are left"
        )
    if not graded:
        return (
            "sdft",
            "the reference moves the teacher; without a grader it is unknown whether for the better",
        )
    teacher = report["teacher"][report["layout"]]["accuracy"]["value"]
    return "sdft", (
        f"the teacher is right in {teacher:.0%}, the student in"
        f" {report['student']['accuracy']['value']:.0%}; docs/results: no mechanism gains clearly more"
    )


def _answered(row: Row, ends: Sequence[int]) -> tuple[str, Sequence[int], Any]:
    """The reference as an answer to the row's prompt, as `encode_completion` takes it."""
    return str(row.get("completion") or row.get("privileged_context") or ""), ends, row["prompt"]


def _length(report: Figures, references: Sequence[int], of_all: bool) -> tuple[int, str]:
    """Room for 95 % of the references and of the probe's answers; never less than what was cut.

    Args:
        references: their sorted lengths.
        of_all: they are trained on, so that none may be cut.
    """
    reference = references[-1] if of_all else percentile(references)
    told = [f"{'all' if of_all else '95 %'} of the references have up to {reference} tokens"]
    asked = [report["student"], *(part for part in report["teacher"].values() if "lengths" in part)]
    answers = percentile(sorted(length for part in asked for length in part["lengths"]))
    told.append(f"95 % of the probe's answers up to {answers}")
    cut, cap = sum(part.get("truncated", 0) for part in asked), report["max_new_tokens"]
    if cut:
        told.append(f"{cut} of them were cut at {cap}: --eval_max_new_tokens probes longer ones")
    longest = max(reference, answers, cap if cut else 0)
    return -(-longest // ROUNDED_TO) * ROUNDED_TO, ", ".join(told)


def percentile(lengths: Sequence[int], share: float = 0.95) -> int:
    """The least of the sorted `lengths` that this share of them does not exceed."""
    return lengths[max(0, math.ceil(share * len(lengths)) - 1)]


def _rate(parameters: int, adapter: bool) -> tuple[float, str]:
    of_all, of_adapter, source = next(line[1:] for line in RATES if parameters <= line[0])
    return (of_adapter if adapter else of_all), source


# ------------------------------------------------------------------------------- memory and time


def _whole(model: Any) -> memory.ModelSize:
    """Of a run that trains all weights, which are held in float32."""
    size = memory.ModelSize.of(model)
    return replace(size, trained=size.parameters, bytes_per_weight=4.0, bytes_per_trained=4.0)


def _size(model: Any, rank: int) -> memory.ModelSize:
    """Of a run that trains a LoRA adapter of all linear layers but the head."""
    size, head = memory.ModelSize.of(model), model.get_output_embeddings()
    weights = [
        module.weight
        for module in model.modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    ]
    trained = sum(rank * sum(weight.shape) for weight in weights)
    merged = sum(weight.nbytes for weight in weights)
    total = size.parameters + trained
    return replace(size, parameters=total, trained=trained, bytes_per_trained=4.0, merged=merged)


def _free(model: Any, config: UniSDConfig) -> float | None:
    """Bytes that a run has when the probe has ended."""
    free = memory.available(config.device)
    held = sum(weight.nbytes for weight in model.parameters())
    return None if free is None else memory.SHARE_OF_FREE * (free + held)


def _fitting(
    size: memory.ModelSize, config: UniSDConfig, prompt_tokens: int, free: float | None
) -> tuple[UniSDConfig, str]:
    """The config with the largest micro-batches that fit, and why; checkpointing comes last."""
    room = "a device that does not say what is free" if free is None else memory.readable(round(free))
    for checkpointing in (False, True):
        for rows in MICRO_BATCHES:
            candidate = config.changed(
                "what the probe recommends",
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=STEP_ROWS // rows,
                gradient_checkpointing=checkpointing,
            )
            if free is None or memory.estimate(size, candidate, prompt_tokens)["total"] <= free:
                return candidate, f"the largest of {MICRO_BATCHES} that fits into {room}"
    return candidate, f"not even one row is estimated to fit into {room}: look for a smaller model or QLoRA"


def _predicted(
    report: Figures, config: UniSDConfig, rows: int, prompt_tokens: float, tdp_w: float | None
) -> Figures:
    """Time and energy of the training on this machine, from the measured speeds.

    Evaluations before and after come on top.
    """
    answer = report["student"]["mean_length"]
    writes, scores = config.completion_source == "student", config.distillation_mode != "nll"
    passes = BACKWARD + scores * (1 + (config.agreement != "none") * config.num_auxiliary_contexts)
    writing = answer / report["student"]["tokens_per_s"] if writes else 0.0
    seconds = STEP_ROWS * (writing + passes * (prompt_tokens + answer) / report["score_tokens_per_s"])
    steps = planned_steps(config, rows)
    watts = tdp_w if tdp_w is not None else driver_tdp()
    return {
        "rows_per_step": STEP_ROWS,
        "steps": steps,
        "s_per_step": seconds,
        "seconds": steps * seconds,
        "kwh": energy_of(steps * seconds, 1, watts)["kwh"],
    }
