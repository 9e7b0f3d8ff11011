"""Estimates how much memory a run needs before it starts, and halves work that does not fit.

Of the estimate, on one device, with P weights, A trained ones, H hidden size, I the MLP's inner
size, G keys of a token and layer, L layers, V vocabulary, R rows per micro-batch, S rows per
optimizer step (on this device), B rows generated at once (`rollout_batch_size`, at most S), T =
`max_completion_length`, Q = `prompt_tokens` (of the longest prompt), w bytes per weight, c of the
compute precision:

always held:
- weights = P w; optimizer = 8 A (two AdamW states in float32)
- teacher = A w (base; in the weights' precision), 4 A (ema, float32) or 0 (live); under LoRA A is
  the adapter alone

one after another, the largest counts:
- rollout = 2 B (Q + T) G L c (cache) + 24 B V (logits, probabilities and their sums in double
  precision) + the weights that a float32 adapter is merged into; 0 if `rollout` is false
- scoring = teacher_states + the larger of W (4 H + 3 I) c and the chunk's logits, on a CPU both; W
  = `token_budget`; without gradient checkpointing also a copy of the weights that an adapter is
  merged into
- student = gradients (A w) + teacher_states + activations + the larger of one chunk's logits and
  one layer's values

where
- teacher_states = S T H c (hidden states of the whole step), times 1 + listed layers + the target's
  sources
- logits = 2 tensors of a chunk (on CUDA in c; without Triton, with a target or entry clip, or in
  another mode than `full` 5); with `loss_implementation=plain` 8 x 4 R T V
- activations = R (Q + T) L c (13 H + 5 I), the input of each layer alone, R (Q + T) L c H, with
  gradient checkpointing

with the weights spread over n = `shards` devices
- weights, optimizer, teacher and gradients are divided by n
- gathered = w (3 V H + 2 P/L): the heads of student and teacher, the gradient of one, and two
  layers
- scoring holds the student's trained weights beside the teacher's, A w / n more
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from unisd.config import UniSDConfig
from unisd.errors import OutOfMemory
from unisd.kernels.cpu_linear import kernel_bytes
from unisd.kernels.lora import mergeable
from unisd.losses import triton_kernels as fused
from unisd.losses.chunked import chunk_bytes
from unisd.methods.targets import parse_target
from unisd.models.adapters import without_adapter

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


# ------------------------------------------------------------------------------------ out of memory


ROW_TOO_LARGE = (
    "a single row does not fit into memory: lower max_completion_length, or set gradient_checkpointing."
)


def is_out_of_memory(error: BaseException) -> bool:
    """Of any device, as torch and Python say it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in str(error) or "can't allocate memory" in str(error))
    )


def release_memory() -> None:
    """After the exception is gone, whose frames held the tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def smaller_until_it_fits(
    work: Callable[[int], Result],
    size: int,
    least: int = 1,
    *,
    what: str | None = None,
    remedy: str = ROW_TOO_LARGE,
    together: str | None = None,
) -> tuple[Result, int]:
    """Do `work(size)`, and where memory runs out `work` of half the size, and so on.

    Also returns the size that fitted.

    what: what has that size, for a warning that it is smaller now; None: the caller warns.
    remedy: what to say where the least size does not fit.
    together: the option that sets the size, where all ranks compute as one and none can go back
    alone.

    Raises:
        OutOfMemory: the least size does not fit either, or all ranks compute together.
    """
    asked = size
    while True:
        try:
            result = work(size)
            if size < asked and what is not None:
                told = "Memory ran out: %s hold %d from now on; results are the same."
                logger.warning(told, what, size)
            return result, size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size <= least:
                raise OutOfMemory(remedy) from error
            if together is not None:
                raise OutOfMemory(
                    f"memory ran out: set {together} below {size}, and resume from the last checkpoint."
                ) from error
        size = max(least, size // 2)
        release_memory()


MIB = 1 << 20
CHUNK_BUFFERS = 2
"""[C,V] tensors of a chunk: the student's and the teacher's logits; on an accelerator without
Triton also three for the arithmetic.
"""
SAVED_HIDDEN, SAVED_INTERMEDIATE = 13, 5
"""Values that one layer keeps per token for backward, in units of the hidden and of the MLP's inner
size: two norms (input, and the normalised in float32), query, key, value before and after rotation,
attention's output, two residual sums; gate, up, the activation, its product, and one more while
backward is at that layer.
"""
CGROUP = Path("/sys/fs/cgroup")
SHARE_OF_FREE = 0.9
"""Share of the free memory that a run may plan to fill."""


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
    intermediate: int = 0  # of the MLP; 0: four times hidden
    key_value: int = 0  # keys of one token and layer, over all heads; 0: hidden
    merged: int = 0  # bytes of the weights that an adapter is merged into while decoding

    @classmethod
    def of(cls, model: Any) -> ModelSize:
        """Read off a loaded model (PEFT-wrapped or not; 4-bit weights count by their storage).

        What its config does not tell as a number is estimated from others, and said.
        """
        parameters = list(model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        stored = sum(p.numel() * p.element_size() for p in parameters)
        config = model.config.get_text_config()
        count = sum(p.numel() for p in parameters)
        trained_count = sum(p.numel() for p in trained)
        embedding = without_adapter(model).get_input_embeddings().weight
        vocabulary = _told(config, "vocab_size", 0) or embedding.shape[0]
        hidden = _told(config, "hidden_size", 0) or embedding.numel() // max(vocabulary, 1)
        heads = _told(config, "num_attention_heads", 1)
        head_size = _told(config, "head_dim", 0) or hidden // heads
        return cls(
            parameters=count,
            trained=trained_count,
            bytes_per_weight=stored / max(count, 1),
            bytes_per_trained=sum(p.numel() * p.element_size() for p in trained) / max(trained_count, 1),
            hidden=hidden,
            layers=_told(config, "num_hidden_layers", 0) or _longest_list(model),
            vocabulary=vocabulary,
            intermediate=_told(config, "intermediate_size", 0),
            key_value=_told(config, "num_key_value_heads", heads) * head_size,
            merged=sum(layer.base_layer.weight.nbytes for layer in mergeable(model)),
        )


def _told(config: Any, name: str, otherwise: int) -> int:
    """A size in a config; of one for each layer the largest. Where it is of another kind,
    `otherwise`, and that is said.
    """
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # how transformers refuses one value for what layers have of their own
        value = [getattr(of_layer, name, None) for of_layer in config.per_layer_config]
    if isinstance(value, (list, tuple)) and value and all(isinstance(of_layer, int) for of_layer in value):
        value = max(value)
    if value is None or (isinstance(value, int) and value > 0):
        return value or otherwise
    logger.warning("The memory estimate does not know %s=%r of this model: it is a rough one.", name, value)
    return otherwise


def _longest_list(model: Any) -> int:
    return max(
        (len(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)), default=1
    )


@dataclass(frozen=True)
class _StepShape:
    """Sizes of a step, by their letters in the module's docstring."""

    rows: int  # R
    step_rows: int  # S
    completion: int  # T
    length: int  # Q + T
    compute: int  # c
    inner: int  # I
    keys: int  # G

    @classmethod
    def of(cls, size: ModelSize, config: UniSDConfig, prompt_tokens: int) -> _StepShape:
        rows = config.per_device_train_batch_size * config.num_generations
        return cls(
            rows=rows,
            step_rows=rows * config.gradient_accumulation_steps,
            completion=config.max_completion_length,
            length=prompt_tokens + config.max_completion_length,
            compute=2 if config.bf16 or config.fp16 or size.bytes_per_weight <= 2 else 4,
            inner=size.intermediate or 4 * size.hidden,
            keys=size.key_value or size.hidden,
        )


def estimate(
    size: ModelSize, config: UniSDConfig, prompt_tokens: int = 256, *, rollout: bool = True, shards: int = 1
) -> dict[str, int]:
    """Bytes on one device, by part, and their peak as `total` (see the module's docstring).

    What Python and the libraries hold comes on top.
    """
    step = _StepShape.of(size, config, prompt_tokens)
    held = _held(size, config, shards)
    logits = _logits(size, config, step)
    layer = step.rows * step.length * step.compute
    layer *= SAVED_HIDDEN * size.hidden + SAVED_INTERMEDIATE * step.inner
    per_token = size.hidden * step.compute
    states = 1 + len(config.feature_layers or []) + _target_sources(config)
    parts = {
        "gradients": size.trained * size.bytes_per_trained / shards,
        "teacher_states": step.step_rows * step.completion * per_token * states,
        "activations": (
            step.rows * step.length * per_token * size.layers
            if config.gradient_checkpointing
            else layer * size.layers
        ),
        "logits": logits,
    }
    phases = {
        "rollout": _rollout(size, config, step, shards) if rollout else 0,
        "scoring": parts["teacher_states"] + _scoring(size, config, step, shards, logits),
        "student": sum(parts.values()) - logits + max(logits, layer if config.gradient_checkpointing else 0),
    }
    sizes = {name: round(value) for name, value in {**held, **parts, **phases}.items()}
    return {**sizes, "total": sum(sizes[name] for name in held) + max(sizes[name] for name in phases)}


def _held(size: ModelSize, config: UniSDConfig, shards: int) -> dict[str, float]:
    """What is there all the time."""
    teacher = {"ema": 4.0, "live": 0.0}.get(config.teacher_model_kind, size.bytes_per_trained)
    others = (config.refresh_rollouts_every, config.target_reference_steps)  # each a copy of the student
    teacher += size.bytes_per_trained * sum(steps is not None for steps in others)
    held = {
        "weights": size.parameters * size.bytes_per_weight / shards,
        "optimizer": size.trained * 8 / shards,
        "teacher": size.trained * teacher / shards,
        "kernels": kernel_bytes(config.device),
    }
    if shards > 1:
        layer_weights = size.parameters / size.layers
        held["gathered"] = size.bytes_per_weight * (3 * size.vocabulary * size.hidden + 2 * layer_weights)
    return held


def _rollout(size: ModelSize, config: UniSDConfig, step: _StepShape, shards: int) -> float:
    """Keys, values and logits of the rows that are written at once, and merged weights."""
    generated = min(config.rollout_batch_size, step.step_rows)
    cache = 2 * step.length * step.keys * size.layers * step.compute
    return generated * (cache + 24 * size.vocabulary) + _merged(size, shards)


def _scoring(size: ModelSize, config: UniSDConfig, step: _StepShape, shards: int, logits: float) -> float:
    """What a pass over the views takes beside the states that it leaves."""
    aside = size.trained * size.bytes_per_trained / shards if shards > 1 else 0
    merged = 0 if config.gradient_checkpointing else _merged(size, shards)
    budget = max(config.token_budget or default_token_budget(config.device), step.length)
    tokens = min(budget, step.step_rows * step.length * (2 + config.num_auxiliary_contexts))
    layer = tokens * step.compute * (4 * size.hidden + 3 * step.inner)
    # what a layer frees stays in the heap of a CPU (`keep_freed_memory`) beside the chunk
    return aside + merged + (layer + logits if config.device.type == "cpu" else max(layer, logits))


def _merged(size: ModelSize, shards: int) -> int:
    return size.merged if shards == 1 else 0


def _logits(size: ModelSize, config: UniSDConfig, step: _StepShape) -> float:
    """What the loss holds of [C,V] tensors."""
    full = 4 * step.rows * step.completion * size.vocabulary
    if config.loss_implementation == "plain":
        return 8 * full
    per_chunk = (
        4 * config.loss_chunk_tokens * size.vocabulary
        if config.loss_chunk_tokens
        else chunk_bytes(config.device)
    )
    whole = config.distillation_mode == "full" and config.target is None and config.entry_clip is None
    if config.device.type == "cpu":
        buffers: float = CHUNK_BUFFERS
    elif config.device.type == "cuda" and fused.AVAILABLE and whole:
        buffers = CHUNK_BUFFERS * step.compute / 4
    else:
        buffers = CHUNK_BUFFERS + 3
    return buffers * min(per_chunk, full)


def _target_sources(config: UniSDConfig) -> int:
    """Teachers beside the run's own whose states are kept for the target."""
    target = None if config.target is None else parse_target(config.target)
    if target is None or (target.realised and config.distillation_mode == "sampled"):
        return 0
    return len(target.sources)


def default_token_budget(device: torch.device) -> int:
    """Tokens of a forward pass without gradient, where `token_budget` is unset."""
    return 2048 if device.type == "cpu" else 8192


def available(device: torch.device) -> int | None:
    """Free bytes of a device (on a CPU, each process's share of them); None: it does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu":
        found = [free for free in (_of_machine(), _of_container(CGROUP)) if free is not None]
        return min(found) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if found else None
    return None


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _of_container(folder: Path) -> int | None:
    """What a container's own limit leaves (cgroup v2); None where there is no limit.

    Files in the page cache can be given back.
    """
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such file, or `max`
        return None
    return max(0, limit - used + int(fields.get("inactive_file", 0)))


def wants_checkpointing(
    size: ModelSize, config: UniSDConfig, prompt_tokens: int, free: int, shards: int = 1
) -> bool:
    """Whether a run fits into `free` bytes only with gradient checkpointing.

    Its weights are there already. Checkpointing costs one more forward pass of the student; it is
    not chosen where listed layers are matched.
    """
    if config.gradient_checkpointing or config.feature_layers:
        return False
    sizes = estimate(size, config, prompt_tokens, shards=shards)
    return sizes["total"] - sizes["weights"] > SHARE_OF_FREE * free


def readable(count: int) -> str:
    """`1.5 GiB`, `12.0 MiB`."""
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / MIB:.1f} MiB"
