"""How much memory a run will need, before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unisd.config import UniSDConfig
from unisd.targets import parse_target

MIB = 1 << 20
LOGITS_CHUNK = 64 * MIB
"""The chunked loss keeps a few buffers of this size: student and teacher log-probabilities, mixture, gradient."""
CHUNK_BUFFERS = 4
LAYER_FACTOR = 34
"""Values of size `hidden` that one layer keeps per token for backward (Korthikanti et al. 2022, without attention maps)."""


@dataclass(frozen=True)
class ModelSize:
    """What the estimate needs to know of a model."""

    parameters: int
    trained: int
    bytes_per_weight: float
    bytes_per_trained: float
    hidden: int
    layers: int
    vocabulary: int

    @classmethod
    def of(cls, model: Any) -> ModelSize:
        """Read off a loaded model (PEFT-wrapped or not; 4-bit weights count by their storage)."""
        parameters = list(model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        stored = sum(p.numel() * p.element_size() for p in parameters)
        config = model.config.get_text_config()
        count = sum(p.numel() for p in parameters)
        trained_count = sum(p.numel() for p in trained)
        return cls(
            parameters=count,
            trained=trained_count,
            bytes_per_weight=stored / max(count, 1),
            bytes_per_trained=sum(p.numel() * p.element_size() for p in trained) / max(trained_count, 1),
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            vocabulary=config.vocab_size,
        )


def estimate(size: ModelSize, config: UniSDConfig, prompt_tokens: int = 256) -> dict[str, int]:
    """Bytes on one device, by part, and their `total`. An estimate: allocator, attention and libraries come on top.

    With P weights, A trained ones, H hidden size, L layers, V vocabulary, R rows per micro-batch, S rows per optimizer step (on
    this device), T = `max_completion_length`, Q = `prompt_tokens`, w bytes per weight, c bytes of the compute precision:

    - weights = P w
    - gradients = A w ; optimizer = 8 A (two AdamW states in float32)
    - teacher = A w (base; in the weights' precision), 4 A (ema, float32) or 0 (live); under LoRA A is the adapter alone
    - teacher_states = S T H c (hidden states of the whole step, kept until its last micro-batch), times 1 + listed layers + the target's
      sources
    - logits = 4 x min(64 MiB, 4 R T V): chunk buffers of the loss; with `loss_implementation=plain` 4 x 4 R T V
    - activations = R (Q + T) H L c x 34 ; with gradient checkpointing R (Q + T) H c x (L + 34)
    - rollout_cache = 2 B (Q + T) H L c, an upper bound (no grouped heads), for B = `rollout_batch_size` rows at once, at most S
    """
    compute = 2 if config.bf16 or config.fp16 or size.bytes_per_weight <= 2 else 4
    rows = config.per_device_train_batch_size * config.num_generations
    step_rows = rows * config.gradient_accumulation_steps
    completion = config.max_completion_length
    length = prompt_tokens + completion
    logits = 4 * rows * completion * size.vocabulary
    per_token = size.hidden * compute
    target = None if config.target is None else parse_target(config.target)
    sources = 0 if target is None or (target.realised and config.distillation_mode == "sampled") else len(target.sources)
    teacher = {"ema": 4.0, "live": 0.0}.get(config.teacher_model_kind, size.bytes_per_trained)
    checkpointed = size.layers + LAYER_FACTOR if config.gradient_checkpointing else size.layers * LAYER_FACTOR
    parts = {
        "weights": size.parameters * size.bytes_per_weight,
        "gradients": size.trained * size.bytes_per_trained,
        "optimizer": size.trained * 8,
        "teacher": size.trained * teacher,
        "teacher_states": step_rows * completion * per_token * (1 + len(config.feature_layers or []) + sources),
        "logits": CHUNK_BUFFERS * (logits if config.loss_implementation == "plain" else min(LOGITS_CHUNK, logits)),
        "activations": rows * length * per_token * checkpointed,
        "rollout_cache": 2 * min(config.rollout_batch_size, step_rows) * length * per_token * size.layers,
    }
    sizes = {name: round(value) for name, value in parts.items()}
    return {**sizes, "total": sum(sizes.values())}


def readable(count: int) -> str:
    """`1.5 GiB`, `12.0 MiB`."""
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / MIB:.1f} MiB"
