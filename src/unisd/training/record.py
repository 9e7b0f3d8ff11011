"""Tell what a checkpoint was trained with, and what is otherwise in the run that resumes it.

Each checkpoint holds `trained_with.json`: the options that change what is learned, the adapter's
shape, a fingerprint of the initial model and one of the rows. At a resume

- another adapter shape, another initial model or another optimizer is refused: the checkpoint's
  numbers would mean something else
- every other difference takes effect and is said, one line each
- what changes time, memory or what is written only (`HARMLESS`) passes without a word
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from unisd.config import UniSDConfig
from unisd.data.formats import COLUMNS
from unisd.data.rows import Row
from unisd.errors import UserError

FILE = "trained_with.json"
Values = dict[str, Any]

SAMPLED = 256
"""Values of each weight that the fingerprint of a model looks at."""

OF_THE_OPTIMIZER = {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}
OF_THE_SCHEDULE = {"lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"}
OF_THE_LENGTH = {"max_steps", "num_train_epochs"}
WITHOUT_FORMULA = {"reduce_lr_on_plateau", "greedy"}
"""Schedules that follow what has been measured: their rate cannot be told for another base rate."""
REFUSED = {"optim", "optim_args", "optim_target_modules", "teacher_model_kind"}

# Time, memory, and what is written or told: nothing that is learned.
HARMLESS_KINDS = (
    *("logging_", "log_", "hub_", "push_to_hub", "save_", "eval_", "ddp_", "fsdp", "deepspeed"),
    *(
        "torch_compile",
        "gradient_checkpointing",
        "activation_checkpointing",
        "vllm_",
        "diagnostics",
        "alarm",
        "trackio",
        "include_",
    ),
    *("do_", "report_", "per_device_eval", "dataloader_num", "dataloader_pin", "dataloader_prefetch"),
    "dataloader_persistent",
)
HARMLESS = {
    *("output_dir", "resume_from_checkpoint", "run_name", "project", "disable_tqdm", "use_cpu"),
    *("local_rank", "accelerator_config", "parallelism_config", "skip_memory_metrics", "label_names"),
    *("remove_unused_columns", "prediction_loss_only", "torch_empty_cache_steps", "debug", "tf32"),
    *("auto_find_batch_size", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint"),
    *("record_samples", "max_skipped_steps", "rollout_batch_size", "token_budget", "loss_chunk_tokens"),
    *("packing", "loss_implementation", "max_prompt_length"),
    *("load_best_model_at_end", "length_column_name", "use_liger_kernel", "ddp_timeout"),
}
# Of an adapter's configuration: what does not change what its numbers mean.
NOT_OF_THE_SHAPE = {
    *("base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping"),
    *("runtime_config", "peft_version", "init_lora_weights", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "lora_dropout", "exclude_modules"),
}
OPTION_OF = {"r": "lora_r", "target_modules": "lora_target_modules"}


def fingerprint(model: nn.Module) -> str:
    """Hash names, shapes and some values of the weights without an adapter.

    The same for every precision that the same weights were loaded in: values are compared in
    bfloat16. Of 4-bit weights the scales of their blocks are looked at, so these match only their
    like. To be taken while every process holds the whole model.
    """
    prefix = getattr(getattr(model, "base_model", None), "prefix", None) if _adapted(model) else None
    digest = hashlib.sha256()
    for name, weight in sorted(_base_weights(model, prefix).items()):
        scales = getattr(getattr(weight, "quant_state", None), "absmax", None)
        values: Tensor = (weight if scales is None else scales).detach().flatten()
        # Not of the end, where an embedding has the rows of tokens that were added, drawn anew.
        values = values[: -(-values.numel() // 2)]
        sample = values[:: max(1, values.numel() // SAMPLED)]
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16).float()
        shape = getattr(getattr(weight, "quant_state", None), "shape", weight.shape)
        digest.update(f"{name} {tuple(shape)} {scales is None}".encode())
        digest.update(b"" if sample.is_meta else sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _base_weights(model: nn.Module, prefix: str | None) -> dict[str, Any]:
    """Weights by the names that they have without an adapter, whose own start with `prefix`."""
    found = {}
    for name, weight in model.named_parameters():
        if prefix is not None:
            if prefix in name or ".modules_to_save." in name:
                continue
            name = name.removeprefix("base_model.model.")
            name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        found[name] = weight
    return found


def _adapted(model: Any) -> bool:
    return hasattr(model, "peft_config")


def adapter_of(model: Any) -> Values | None:
    """The configuration of the adapter that is trained, as JSON holds it; None without one."""
    if not _adapted(model):
        return None
    active = model.active_adapter
    return _plain(model.peft_config[active if isinstance(active, str) else active[0]].to_dict())


def rows_of(rows: Sequence[Row] | None) -> Values | None:
    """How many rows, and a hash of what of them is read by the training."""
    if rows is None:
        return None
    digest = hashlib.sha256()
    for row in rows:
        known = {name: row[name] for name in COLUMNS if name in row}
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    return {"count": len(rows), "sha256": digest.hexdigest()[:16]}


def options_of(args: UniSDConfig) -> Values:
    """The options that change what is learned."""
    every: Values = args.to_dict()
    return _plain({name: value for name, value in every.items() if not _harmless(name)})


def _harmless(name: str) -> bool:
    return name in HARMLESS or name.startswith(HARMLESS_KINDS) or name.endswith("_token")


def _plain(values: Mapping[str, Any]) -> Values:
    """As a JSON file gives them back; sets in an order of their own."""

    def simple(value: Any) -> Any:
        return sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, "value", str(value))

    plain: Values = json.loads(json.dumps(dict(values), default=simple))
    return plain


def write(folder: str | Path, record: Values) -> None:
    """Write the record into a checkpoint that is being built."""
    text = json.dumps({"version": 1, **record}, indent=1) + "\n"
    (Path(folder) / FILE).write_text(text, encoding="utf-8")


def read(folder: str | Path) -> Values:
    """The record of a checkpoint.

    Raises:
        UserError: it has none.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise UserError(f"{path} is missing, which says what the checkpoint was trained with: start again.")
    found: Values = json.loads(path.read_text(encoding="utf-8"))
    return found


def differences(checkpoint: str | Path, now: Values, engine: bool = False) -> tuple[list[str], set[str]]:
    """What a run has otherwise than the checkpoint: lines to say, and the options among them.

    Args:
        now: the run's own record.
        engine: the optimizer is DeepSpeed's, which takes its settings from the checkpoint.

    Raises:
        UserError: another adapter shape, initial model or optimizer, or no record.
    """
    was = read(checkpoint)
    if wrong := _other_model(was, now):
        raise UserError(
            f"{checkpoint} belongs to another model: {'; '.join(wrong)}: resume with the checkpoint's, or"
            " start a new run in another output_dir."
        )
    old, new = was["options"], now["options"]
    changed = {name for name in new if name in old and old[name] != new[name]}
    _refuse_options(checkpoint, old, new, changed, engine)
    lines = [_line(name, old[name], new[name]) for name in sorted(changed)]
    if was["adapter"] and now["adapter"]:
        dropout = [side["adapter"].get("lora_dropout") for side in (was, now)]
        lines += [_line("lora_dropout", *dropout)] if dropout[0] != dropout[1] else []
    for name, what in (("rows", "training rows"), ("evaluation", "evaluation rows")):
        if was[name] != now[name]:
            lines.append(f"{what}: {_told(was[name])} -> {_told(now[name])}, take effect")
            changed.add(name)
    if was["rows_per_step"] != now["rows_per_step"]:
        lines.append(
            f"rows of a step: {was['rows_per_step']} -> {now['rows_per_step']}, takes effect: in the epoch"
            " that was begun some rows may come twice, or not at all"
        )
    return lines, changed


def _other_model(was: Values, now: Values) -> list[str]:
    """What of the adapter and of the initial model does not fit."""
    old, new = was["adapter"], now["adapter"]
    if (old is None) != (new is None):
        return [f"use_peft is {old is not None} in it and {new is not None} in this run"]
    shape = {name for name in old or {} if name in (new or {}) and name not in NOT_OF_THE_SHAPE}
    wrong = [
        f"{OPTION_OF.get(name, name)} is {_shown(_sorted(old[name]))} in it and"
        f" {_shown(_sorted(new[name]))} in this run"
        for name in sorted(shape)
        if _sorted(old[name]) != _sorted(new[name])
    ]
    if was["base"] != now["base"]:
        names = [f"{side['base_name']} ({side['base']})" for side in (was, now)]
        wrong.append(f"its initial model was {names[0]} and this run's is {names[1]}, with other weights")
    return wrong


def _refuse_options(
    checkpoint: str | Path, old: Values, new: Values, changed: set[str], engine: bool
) -> None:
    """Raise `UserError` for changed options that cannot take effect."""
    kept = REFUSED | (OF_THE_OPTIMIZER | OF_THE_SCHEDULE if engine else set())
    if {old.get("lr_scheduler_type"), new["lr_scheduler_type"]} & WITHOUT_FORMULA:
        kept |= {"learning_rate"} | OF_THE_SCHEDULE
    for name in sorted(changed & kept):
        raise UserError(
            f"{name} is {_shown(old[name])} in {checkpoint} and {_shown(new[name])} in this run, which"
            f" cannot continue from that: resume with {name}={_shown(old[name])}, or start a new run in"
            " another output_dir."
        )


def _line(name: str, old: Any, new: Any) -> str:
    return f"{name}: {_shown(old)} -> {_shown(new)}, takes effect"


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _sorted(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value


def _told(rows: Values | None) -> str:
    return "none" if rows is None else f"{rows['count']} ({rows['sha256'][:8]})"


# ------------------------------------------------------------------------------------- take effect


def settings_of(optimizer: Any) -> list[Values]:
    """What an optimizer was built with, by group, before a checkpoint's state is loaded over it."""
    return [{name: value for name, value in group.items() if name != "params"} for group in groups(optimizer)]


def groups(optimizer: Any) -> list[Values]:
    """The groups of the optimizer itself, also inside of accelerate's wrapper."""
    found: list[Values] = optimizer.param_groups
    return found


def take_effect(optimizer: Any, scheduler: Any, built: Sequence[Values], rates: Sequence[float]) -> None:
    """Put this run's settings over those that came with a checkpoint's state.

    Args:
        built: `settings_of` the optimizer as it was built.
        rates: the scheduler's `base_lrs` as it was built.
    """
    settings = ("weight_decay", "betas", "eps", "initial_lr")
    for group, own in zip(groups(optimizer), built, strict=True):
        group |= {name: own[name] for name in settings if name in own}
    if not isinstance(scheduler, LambdaLR):
        return
    scheduler.base_lrs = list(rates)
    now: list[float | Tensor] = [
        rate * share(scheduler.last_epoch) for rate, share in zip(rates, scheduler.lr_lambdas, strict=True)
    ]
    scheduler._last_lr = now
    for group, rate in zip(groups(optimizer), now, strict=True):
        group["lr"] = rate
