"""Write and read checkpoints of a sharded model: by one process, or a shard by each.

See :mod:`unisd.distributed.sharding`. Any number of processes resumes either.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from unisd.distributed import zero
from unisd.distributed.sharding import as_dtensor, full_tensor, local_shard, part_like, reshard
from unisd.errors import UserError
from unisd.models.weights import adapter_weights_for, weights_for


def whole_on_writer(tensors: Mapping[str, Tensor | zero.Part], is_writer: bool) -> dict[str, Tensor]:
    """Gather whole tensors one by one into the writer's main memory (a collective).

    Empty on other ranks.

    What is one tensor under two names (tied weights) stays one.
    """
    found: dict[str, Tensor] = {}
    gathered: dict[int, Tensor] = {}
    for name, value in tensors.items():
        if id(value) not in gathered:
            one = full_tensor(value)
            gathered[id(value)] = one.contiguous().cpu() if is_writer else one.new_empty(0)
        if is_writer:
            found[name] = gathered[id(value)]
    return found


def weights(model: Any) -> dict[str, Tensor]:
    """Return what a checkpoint keeps of the model, sharing storage with it.

    The adapter, or all weights.
    """
    reshard(model)
    if not hasattr(model, "peft_config"):
        found: dict[str, Tensor] = model.state_dict()
        return found
    embeddings = getattr(model, "saves_embeddings", "auto")
    found = get_peft_model_state_dict(model, save_embedding_layers=embeddings)
    return found


def optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The optimizer's state by names of parameters, made where there is none yet."""
    # without accelerate's wrapper
    return get_optimizer_state_dict(model, getattr(optimizer, "optimizer", optimizer))


def save_shards(state: Mapping[str, Any], folder: Path) -> None:
    """Write each rank's own parts of a dictionary into a distributed checkpoint of torch.

    The dictionary holds tensors and may be nested.
    """
    save(dict(state), checkpoint_id=folder)


def load_shards(state: dict[str, Any], folder: Path) -> None:
    """Fill tensors, however they are cut now, from what `save_shards` wrote.

    Raises:
        UserError: the checkpoint lacks one.
    """
    try:
        load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise UserError(
            f"{folder} belongs to other trained parameters: resume with the same model and LoRA options."
        ) from error


def require_adapter(model: Any, folder: Path) -> None:
    """Raise `UserError` if a folder does not hold just the weights of the model's adapter."""
    adapter_weights_for(weights(model), folder)


@torch.no_grad()
def load_model(model: Any, folder: Path) -> None:
    """Take over each rank's own parts of the weights, or of the adapter.

    An unsharded run or :func:`whole_on_writer` has left them; an unsharded model takes all.

    Raises:
        UserError: there are none, or those of another model.
    """
    own = weights(model)
    is_adapter = hasattr(model, "peft_config")
    found = adapter_weights_for(own, folder) if is_adapter else weights_for(model, own, folder)
    for name, value in own.items():
        local_shard(value).copy_(part_like(found[name], value))


def whole_optimizer_state(optimizer: Any, is_writer: bool) -> dict[str, Any]:
    """`optimizer.state_dict()` as without sharding, on the writer (a collective)."""
    content: dict[str, Any] = optimizer.state_dict()
    state = {}
    for number, values in content["state"].items():
        tensors = whole_on_writer({name: v for name, v in values.items() if isinstance(v, Tensor)}, is_writer)
        state[number] = {**values, **tensors} if is_writer else {}
    return {**content, "state": state}


def load_optimizer_shards(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Take over the `optimizer` that `save_shards` wrote."""
    state = {"optimizer": optimizer_state(model, optimizer)}
    load_shards(state, folder)
    set_optimizer_state_dict(
        model, getattr(optimizer, "optimizer", optimizer), optim_state_dict=state["optimizer"]
    )


def load_optimizer_state(optimizer: Any, content: Mapping[str, Any]) -> None:
    """Take over what an optimizer without sharding has saved.

    Its parameters have the same order.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for number, values in content["state"].items():
        p = parameters[number]
        state[number] = {
            name: as_dtensor(part_like(v, p), p) if isinstance(v, Tensor) and v.shape == p.shape else v
            for name, v in values.items()
        }
    optimizer.load_state_dict({**content, "state": state})
