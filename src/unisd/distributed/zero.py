"""DeepSpeed's ZeRO, where it is not like a model that every process holds whole.

Everything of DeepSpeed's is reached from here.

Stages 1 and 2 spread the optimizer's state (and gradients): every process still has all weights,
and only the engine, its checkpoints and its guard against bad steps differ. Stage 3 spreads the
weights too: to the rest of the library (:mod:`unisd.distributed.sharding`) that is as with FSDP2. A
parameter is then empty between passes, and its flat part lies in `ds_tensor`; hooks of each module
gather it for a pass.

The engine takes the optimizer's step inside of the last backward pass of a step. A gradient that is
not finite makes it drop the step itself and report an infinite norm, which is what
:class:`unisd.training.guards.FiniteGuard` looks at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from unisd.compat import set_argument
from unisd.config import load_whole_models
from unisd.errors import UserError
from unisd.models.adapters import without_adapter


class Part(NamedTuple):
    """This process's part of a tensor that is cut as a parameter of stage 3 is."""

    part: Tensor
    like: Tensor


def is_part(tensor: Any) -> bool:
    """Whether a tensor is a parameter that stage 3 has cut."""
    return hasattr(tensor, "ds_tensor")


def is_cut(model: Any) -> bool:
    """Whether stage 3 has spread this model's weights."""
    return hasattr(model, "zero_offload")


def full_tensor(part: Tensor, like: Tensor) -> Tensor:
    """What the parts of all ranks make up (a collective)."""
    cut: Any = like
    flat = part.new_empty(part.numel() * dist.get_world_size())
    dist.all_gather_into_tensor(flat, part.contiguous())
    return flat[: cut.ds_numel].view(cut.ds_shape)


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, the last one filled up with zeros."""
    cut: Any = like
    size, rank = cut.ds_tensor.numel(), dist.get_rank()
    part = value.new_zeros(size)
    mine = value.flatten()[rank * size : (rank + 1) * size]
    part[: mine.numel()] = mine
    return part.to(cut.ds_tensor.device)


def without_filling(part: Tensor, like: Tensor) -> Tensor:
    """Return what of a part is no filling.

    The parts of all ranks are of one size, and what fills the last is left as memory was.
    """
    cut: Any = like
    return part[: max(0, cut.ds_numel - dist.get_rank() * part.numel())]


def forget_passes(model: Any) -> None:
    """Make DeepSpeed forget the passes of a rollout.

    It learns the order of modules from a step, and would take them for a part of it.
    """
    coordinator = model.zero_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


def is_whole(weight: Any) -> bool:
    """Whether a parameter of stage 3 is gathered at the moment; the head always is."""
    return bool(weight.ds_status.name == "AVAILABLE")


def give_back(model: Any) -> None:
    """Cut what is gathered again; what stays whole (the head) is gathered anew from the parts.

    A collective.
    """
    model.zero_offload.partition_all_parameters()
    kept = model.zero_offload.persistent_parameters
    if kept:
        kept[0].all_gather(kept)


# ------------------------------------------------------------------------------------------- set-up


OTHER_PARTS = ("mics_shard_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights")


def check_deepspeed(trainer: Any) -> None:
    """Refuse, and set, what the engine is configured with.

    Raises:
        UserError: a way of using ZeRO that is not supported.
    """
    load_whole_models()  # the accelerator has asked for the contrary again
    args, plugin = trainer.args, trainer.accelerator.state.deepspeed_plugin
    config: dict[str, Any] = plugin.deepspeed_config
    settings = config["zero_optimization"]
    stage = settings.get("stage", 0)
    for is_set, what, remedy in (
        (stage == 0, "zero_stage 0", "use accelerate_config=ddp"),
        (_offloads(settings, "offload_param"), "offload_param", "set its device to none"),
        (_offloads(settings, "offload_optimizer"), "offload_optimizer", "set its device to none"),
        (
            "optimizer" in config or "scheduler" in config,
            "an optimizer or scheduler of its own",
            "set optim and lr_scheduler_type",
        ),
        (settings.get("zero_hpz_partition_size", 1) > 1, "zero_hpz_partition_size", "set it to 1"),
        (args.fp16, "fp16", "use bf16"),
        (args.use_vllm, "use_vllm", "use accelerate_config=ddp, or unset use_vllm"),
        *(
            (settings.get(name), name, "unset it: the teacher is put into the parts that it does not use")
            for name in OTHER_PARTS
        ),
    ):
        if is_set:
            raise UserError(f"DeepSpeed: {what} is not supported: {remedy}.")
    if stage == 3:
        # The other kind of gradient checkpointing compares shapes, and a weight that is given back
        # has none.
        reentrant = {**(args.gradient_checkpointing_kwargs or {}), "use_reentrant": True}
        set_argument(args, "gradient_checkpointing_kwargs", reentrant)


def _offloads(settings: dict[str, Any], what: str) -> bool:
    return (settings.get(what) or {}).get("device", "none") not in ("none", None)


def cut(trainer: Any) -> None:
    """Stage 3: build the engine now, so that the teacher takes its copy of parts only.

    `train` finds it built.

    Raises:
        UserError: the model is quantised.
    """
    from transformers.integrations.deepspeed import deepspeed_init

    model, accelerator = trainer.model, trainer.accelerator
    if any(getattr(module, "is_quantized", False) for module in model.modules()):
        raise UserError(
            "a quantised model is not supported with stage 3: use accelerate_config=ddp, or load it without"
            " load_in_4bit."
        )
    optimizer, _ = deepspeed_init(trainer, num_training_steps=max(trainer.args.max_steps, 1))
    engine, optimizer = accelerator.prepare(model, optimizer)
    keep_whole(model, engine)
    prepare, wrapped = accelerator.prepare, accelerator.deepspeed_engine_wrapped
    accelerator.deepspeed_engine_wrapped = None  # `free_memory` would destroy the engine when training begins

    def prepare_others(*objects: Any, **options: Any) -> Any:
        if objects[:1] != (model,):
            return prepare(*objects, **options)
        accelerator._models, accelerator._optimizers, accelerator.deepspeed_engine_wrapped = (
            [engine],
            [optimizer],
            wrapped,
        )
        return engine, optimizer

    accelerator.prepare = prepare_others


def keep_whole(model: Any, engine: Any) -> None:
    """Keep the head whole on every process; its gradient is still cut.

    The losses read it outside of a forward pass.
    """
    model.zero_offload = offload = engine.optimizer.parameter_offload
    for parameter in without_adapter(model).get_output_embeddings().parameters():
        # `ds_persist` alone does not hold before DeepSpeed has seen a whole pass
        parameter.is_external_param = True
        if not parameter.ds_persist:  # a small one is in the list already
            parameter.ds_persist = True
            offload.persistent_parameters.append(parameter)
    give_back(model)


# -------------------------------------------------------------------------------------- checkpoints


def require_resumable(checkpoint: str | Path, stage: int | None, ranks: int) -> None:
    """Raise `UserError` if a checkpoint's optimizer state is not for this run.

    stage: of this run; None: it is not one of DeepSpeed's.
    """
    files = [path.name for path in Path(checkpoint).glob("global_step*/*_states.pt")]
    saved = sum("zero_pp_rank_" in name and name.endswith("_optim_states.pt") for name in files)
    cut = any("zero_pp_rank_" in name and name.endswith("_model_states.pt") for name in files)
    was = ("zero3" if cut else "zero2") if saved else "no DeepSpeed"
    now = "no DeepSpeed" if stage is None else "zero3" if stage == 3 else "zero2"
    if was != now:
        raise UserError(
            f"{checkpoint} was written with {was} and this run has {now}: resume with the accelerate_config"
            " that it was written with, or start a new run from the model in it (model_name_or_path)."
        )
    if saved not in (0, ranks):
        raise UserError(
            f"{checkpoint} holds DeepSpeed's parts of {saved} processes and this run has {ranks}: resume with"
            " as many, or start a new run from the model in it (model_name_or_path). Checkpoints of ddp and"
            " fsdp2 are resumed by any number."
        )
