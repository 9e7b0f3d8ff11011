"""Spread weights over processes by FSDP2 (or ZeRO-3).

Here are the few places where a sharded model is not like a whole one.

accelerate shards the model (`fully_shard`: every block, the embeddings, final norm and head), and
every forward pass through it gathers one part after the other. What this library adds:

- *Sharded at construction*, before the teacher is built: student, teacher and optimizer only ever
  hold their own shards.
- *The teacher* is a second value of every local shard (:func:`values_in_place` copies it in and the
  student's back), its updates are local, and no rank ever holds a whole teacher. The price beside
  the teacher: while it scores, a copy of the student's trained shards.
- *The head* is the one weight that the losses read outside of a forward pass. The student's is
  gathered by its forward pass and left so until its backward pass, which also takes its gradient
  (as with any other weight, a mean over ranks); the teacher's is gathered once a step. That is one
  [V,H] tensor each.
- *In step*: every forward pass is a collective, but ranks hold other rows. Under :func:`in_step`
  each pass is announced by a sum over ranks, and a rank that is done keeps answering with dummy
  passes until all are.
- *Checkpoints* are the files of an unsharded run, which one process writes parameter by parameter;
  with `fsdp_state_dict_type: SHARDED_STATE_DICT` they are torch's distributed checkpoints instead,
  to which each rank writes its part. Any number of processes, sharded or not, resumes either.

What DeepSpeed does otherwise (ZeRO-3's shards are flat, and its engine writes its own checkpoints)
is in :mod:`unisd.distributed.zero`. Everything here does nothing, or is the identity, for a model
that is not sharded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from unisd.distributed import zero
from unisd.errors import UserError
from unisd.models.adapters import without_adapter

# ------------------------------------------------------------------------------------------ tensors


def is_sharded(model: Any) -> bool:
    """Whether this model's weights are spread over the processes."""
    return isinstance(model, FSDPModule) or zero.is_cut(model)


def all_ranks_must_join(model: Any) -> bool:
    """Whether a pass of one rank needs all others, which hold parts of the weights."""
    return is_sharded(model)


def number_of_shards(model: Any) -> int:
    """In how many parts the weights lie, each of them on a rank."""
    return dist.get_world_size() if is_sharded(model) else 1


def is_shard(tensor: Tensor) -> bool:
    """Whether a parameter is cut over the processes."""
    return zero.is_part(tensor) or isinstance(tensor, DTensor)


def local_shard(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor (sharing its storage), detached.

    A plain tensor is its own part.
    """
    if zero.is_part(tensor):
        return tensor.ds_tensor.detach()  # type: ignore[attr-defined, no-any-return]
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def owned(part: Tensor, like: Tensor) -> Tensor:
    """What a part holds of the tensor itself."""
    return zero.without_filling(part, like) if zero.is_part(like) else part


def full_tensor(tensor: Tensor | zero.Part) -> Tensor:
    """Return all of a sharded tensor, detached (a collective: all ranks must call).

    A plain tensor is whole.
    """
    if isinstance(tensor, zero.Part):
        return zero.full_tensor(*tensor)
    if zero.is_part(tensor):
        return zero.full_tensor(local_shard(tensor), tensor)
    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


def as_dtensor(part: Tensor, like: Tensor) -> Tensor | zero.Part:
    """Make the sharded tensor of which every rank holds a `part`, cut as `like` is.

    It shares the storage of `part`.
    """
    if zero.is_part(like):
        return zero.Part(part, like)
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def materialized(weight: Tensor) -> Tensor:
    """Return a weight that is read outside of a forward pass.

    As it is where one has gathered it, else whole and without gradient.

    Raises:
        RuntimeError: a gradient is wanted, but the forward pass before has not left the weight
            gathered.
    """
    if zero.is_whole(weight) if zero.is_part(weight) else not isinstance(weight, DTensor):
        return weight
    if torch.is_grad_enabled() and weight.requires_grad:
        raise RuntimeError(
            "the head was given back after the forward pass: its gradient would not reach all ranks"
        )
    return full_tensor(weight)


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a whole tensor that every rank has, cut as `like` is.

    Without communication.
    """
    if zero.is_part(like):
        return zero.part_of(value, like)
    if not isinstance(like, DTensor):
        return value
    spread = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return spread.to_local().clone()  # not a view that keeps the whole


def sum_over_ranks(value: Tensor, model: nn.Module) -> Tensor:
    """Sum a quantity that each rank has of its own shards.

    Of an unsharded model it is the value itself.
    """
    if is_sharded(model):
        dist.all_reduce(value)
    return value


def reshard(model: nn.Module) -> None:
    """Give back what forward passes have gathered.

    The next one must see what has been written into the shards.
    """
    if zero.is_cut(model):
        zero.give_back(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def values_in_place(
    model: nn.Module, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> Iterator[dict[int, Tensor]]:
    """While active, the model computes with other values of its parameters.

    Yields them by `id` of the parameter; of a sharded model, which has them in its shards alone,
    none. Shards are copied in and out: nothing is rounded.
    """
    if parameters and is_sharded(model):
        kept = {name: local_shard(p).clone() for name, p in parameters.items()}
        try:
            _write(model, parameters, values)
            yield {}
        finally:
            _write(model, parameters, kept)
        return
    kept = {name: p.data for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            p.data = values[name].to(p.dtype)
        yield {id(p): p.data for p in parameters.values()}
    finally:
        for name, p in parameters.items():
            p.data = kept[name]


def _write(model: nn.Module, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    if not zero.is_cut(model):
        reshard(model)
    for name, p in parameters.items():
        local_shard(p).copy_(values[name])
    if zero.is_cut(model):
        reshard(model)  # what stays whole must follow


# ------------------------------------------------------------------------------------------------
# forward passes


def _anyone_works(mine: bool, device: torch.device) -> bool:
    """Say whether any rank is about to make a forward pass.

    Each of them, and each rank that waits, takes part once.
    """
    working = torch.tensor([int(mine)], device=device)
    dist.all_reduce(working)
    return mine or bool(working.item())


def entry(model: Any) -> Any:
    """Return what every forward pass without gradient goes through.

    So it is the same passage on all ranks.

    With FSDP2 that is the model itself. ZeRO-3 talks to the other ranks where a pass enters the
    outermost module, which generating with an adapter does not: so none does.
    """
    return without_adapter(model) if zero.is_cut(model) else model


def passage_to(part: Any, model: Any) -> Any:
    """What a forward pass without gradient goes through to reach a `part` of the model.

    That is the part itself, but of a sharded model all of it: called in part, it would be left half
    gathered.
    """
    return entry(model) if is_sharded(model) else part


def _dummy_pass(model: Any) -> None:
    with torch.no_grad():
        entry(model)(
            input_ids=torch.zeros(1, 1, dtype=torch.long, device=without_adapter(model).device),
            use_cache=False,
        )


@contextmanager
def in_step(model: Any) -> Iterator[None]:
    """Make all ranks take the same number of forward passes inside.

    However many each of them needs (also none).

    All ranks must enter and leave; no other collective may happen inside. A rank that raises ends
    the run: the others wait for it until they are stopped.
    """
    if not is_sharded(model):
        yield
        return
    device = without_adapter(model).device
    passage = without_adapter(model)
    if zero.is_cut(model):
        zero.forget_passes(model)
    else:
        model.unshard()  # the root's own weights: generating with an adapter does not pass through the root
        passage = passage.get_decoder()
    announced = passage.register_forward_pre_hook(lambda *_: _announce(device), prepend=True)
    try:
        yield
    finally:
        announced.remove()
    while _anyone_works(False, device):
        _dummy_pass(model)


def _announce(device: torch.device) -> None:
    _anyone_works(True, device)


# ------------------------------------------------------------------------------------------- set-up


def set_up(trainer: Any) -> None:
    """Switch FSDP on also on a CPU, when the accelerator exists.

    accelerate knows it on accelerators only, torch's runs on gloo too.

    Raises:
        UserError: a way of spreading weights that is not supported.
    """
    if trainer.is_deepspeed_enabled:
        zero.check_deepspeed(trainer)
        return
    _enable_on_cpu(trainer)
    _check(trainer)
    # else every rank would add up whole gradients until the last micro-batch of a step
    if trainer.is_fsdp_enabled:
        trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True


def _enable_on_cpu(trainer: Any) -> None:
    state, asked = trainer.accelerator.state, trainer.args.fsdp_plugin_args
    if state.distributed_type != DistributedType.MULTI_CPU:
        return
    if asked is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**(asked or {}))
    state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def _check(trainer: Any) -> None:
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UserError(
            "FSDP1 is not supported: set fsdp_version: 2 in the accelerate configuration, or use"
            " accelerate_config=fsdp2."
        )
    for option, is_set, remedy in (
        (
            "fsdp_cpu_ram_efficient_loading",
            plugin.cpu_ram_efficient_loading,
            "set it to false, each rank checks what it loads",
        ),
        (
            "fsdp_activation_checkpointing",
            plugin.activation_checkpointing,
            "set gradient_checkpointing instead",
        ),
        ("fsdp_offload_params", isinstance(plugin.cpu_offload, CPUOffloadPolicy), "set it to false"),
    ):
        if is_set:
            raise UserError(f"{option} is not supported: {remedy}.")
    if trainer.args.use_vllm:
        raise UserError(
            "use_vllm does not work with FSDP yet, it reads whole weights: use accelerate_config=ddp, or"
            " unset use_vllm."
        )
    if trainer.args.fp16:
        raise UserError("fp16 is not supported with FSDP: use bf16.")


def _wrap_blocks(trainer: Any) -> None:
    """Let every block be a unit of its own, unless the user names other classes.

    transformers' own names are also those of models that this one may hold, or not.
    """
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        blocks = trainer.backbone.blocks(
            "name their class in fsdp_transformer_layer_cls_to_wrap, or use ddp."
        )
        held = {type(module).__name__ for module in trainer.model.modules()}
        named = held & set(getattr(without_adapter(trainer.model), "_no_split_modules", None) or ())
        plugin.transformer_cls_names_to_wrap = sorted(named | {type(block).__name__ for block in blocks})
    model = without_adapter(trainer.model)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if (
        all(hasattr(end, "modules_to_save") for end in ends)
        and model.config.get_text_config().tie_word_embeddings
    ):
        raise UserError(
            "modules_to_save names both of the tied embeddings, which FSDP cannot keep separate: name"
            " only lm_head, or use accelerate_config=ddp."
        )


def shard(trainer: Any) -> None:
    """Spread the trainer's model over the ranks, and build its optimizer on the shards.

    Once: a second preparation (in `train`) would look the optimizer's parameters up by address,
    which empty shards share.

    Raises:
        UserError: the model is quantised.
    """
    if trainer.is_deepspeed_enabled:
        zero.cut(trainer)
        return
    if getattr(without_adapter(trainer.model), "is_quantized", False):
        raise UserError(
            "a quantised model is not supported with FSDP: use accelerate_config=ddp, or load it without"
            " load_in_4bit."
        )
    _wrap_blocks(trainer)
    accelerator, was_training = trainer.accelerator, trainer.model.training
    trainer.create_optimizer()
    model, optimizer = accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model = trainer.model_wrapped = model
    trainer.optimizer = optimizer
    prepare = accelerator.prepare

    def prepare_others(*objects: Any, **options: Any) -> Any:
        if objects[:1] != (model,):
            return prepare(*objects, **options)
        # `free_memory` has forgotten them.
        accelerator._models, accelerator._optimizers = [model], [optimizer]
        return model, optimizer

    accelerator.prepare = prepare_others
    model.eval()
    _dummy_pass(model)  # tells FSDP which module is the root: later passes may begin further inside
    model.train(was_training)
    reshard(model)
