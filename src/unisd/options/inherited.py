"""What becomes of every option that transformers' `TrainingArguments` has and we do not declare.

Each works, or is refused with what to do instead: none is accepted and does nothing. The names are
those of all supported versions. Two depend on where a run is: `fp16` needs an accelerator, `fsdp`
several processes (`config.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

from unisd.errors import UserError

_WORKS = """
    optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    lr_scheduler_kwargs
    fp16 tf32 torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
    gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs use_cache
    logging_strategy logging_first_step log_on_each_node log_level log_level_replica disable_tqdm
    include_num_input_tokens_seen skip_memory_metrics
    run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_delay eval_on_start load_best_model_at_end metric_for_best_model greater_is_better
    save_only_model save_on_each_node ignore_data_skip restore_callback_states_from_checkpoint
    hub_token hub_private_repo hub_strategy hub_always_push hub_revision
    full_determinism data_seed train_sampling_strategy use_cpu accelerator_config
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    fsdp fsdp_config deepspeed
"""
WORKS = frozenset(_WORKS.split())

HARMLESS = {
    "local_rank": "set by launchers",
    "do_train": "what a run does",
    "do_eval": "follows from eval_strategy",
}
"""Accepted without an effect of their own, since they say what is so."""

_ONE_LOSS = "the loss is that of the whole step, over all devices"
_OWN_EVALUATION = "evaluate measures the reference's likelihood and the grader's accuracy only"
REFUSED = {
    "average_tokens_across_devices": f"{_ONE_LOSS}: unset it.",
    "label_smoothing_factor": "the target is the teacher's distribution, not a label: unset it (target mixes"
    " teachers).",
    "bf16_full_eval": "an evaluation computes as training does: unset it, and set bf16.",
    "fp16_full_eval": "an evaluation computes as training does: unset it, and set fp16.",
    "neftune_noise_alpha": "its noise is scaled by the length of a padded or packed row, so that the loss"
    " would depend on how a step is cut: unset it.",
    "use_liger_kernel": "it replaces the forward pass that was checked at the start: unset it (the loss is"
    " computed in chunks anyway).",
    "liger_kernel_config": "use_liger_kernel cannot be used: unset both.",
    "auto_find_batch_size": "micro-batches that do not fit are halved automatically: unset it.",
    "per_device_eval_batch_size": "rollout_batch_size sets how many rows are answered at once: set that"
    " instead.",
    "prediction_loss_only": f"{_OWN_EVALUATION}: unset it.",
    "eval_do_concat_batches": f"{_OWN_EVALUATION}: unset it.",
    "eval_use_gather_object": f"{_OWN_EVALUATION}: unset it.",
    "eval_accumulation_steps": f"{_OWN_EVALUATION}: unset it.",
    "include_for_metrics": f"{_OWN_EVALUATION}: unset it.",
    "batch_eval_metrics": f"{_OWN_EVALUATION}: unset it.",
    "label_names": "rows have no labels: unset it.",
    "length_column_name": "rows of a step are grouped by length automatically: unset it.",
    "enable_jit_checkpoint": "`unisd train` saves a checkpoint on SIGTERM automatically: unset it.",
    "debug": "it cannot read the student's pass, which computes no logits: unset it; a loss or gradient"
    " that is not finite is reported with its rows.",
    "parallelism_config": "accelerate_config spreads a run (ddp, fsdp2, zero2, zero3): unset it.",
    "do_predict": "nothing is predicted after training: unset it, and use `unisd eval`.",
}
SAMPLING = ("random", "sequential")
"""What `train_sampling_strategy` may be."""


def check_inherited(options: Any) -> None:
    """Raise `UserError` for the first option of transformers that would have no effect."""
    for item in fields(options):
        if item.name not in REFUSED:
            continue
        default = item.default if item.default is not MISSING else _made(item.default_factory)
        if not _same(getattr(options, item.name), default):
            raise UserError(f"{item.name} has no effect here: {REFUSED[item.name]}")
    if options.max_grad_norm is None:
        raise UserError("max_grad_norm=None is no number: give 0 to leave gradients as they are.")
    strategy = str(getattr(options.train_sampling_strategy, "value", options.train_sampling_strategy))
    if strategy not in SAMPLING:
        raise UserError(
            f"train_sampling_strategy={strategy} is not one of: {', '.join(SAMPLING)} (rows of a step"
            " are grouped by length automatically)."
        )


def unknown(names: Iterable[str]) -> list[str]:
    """Those of transformers' options that nobody has looked at yet."""
    return sorted({*names} - WORKS - {*HARMLESS} - {*REFUSED})


def _made(factory: Any) -> Any:
    return None if factory is MISSING else factory()


def _same(value: Any, default: Any) -> bool:
    """Whether a value is the default, in any form that means none."""
    return value == default or (not value and not default)
