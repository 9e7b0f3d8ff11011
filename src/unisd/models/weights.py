"""Read a model's weights as `save_pretrained` has left them, whole or not at all.

The names in a checkpoint need not be those of the modules (experts lie one by one, a text model in
one with vision bears another prefix): only the model's own class knows how one becomes the other.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from unisd.errors import UserError, first_line

logger = logging.getLogger(__name__)

FEW = 4  # names that a message holds
REMEDY = "resume with the model and the options of that run."
NOTHING = torch.empty(0)
INFORMED = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # who calls looks at both


def named(names: Iterable[str]) -> str:
    """The first of some names, and how many there are beside."""
    found = sorted(names)
    rest = f" and {len(found) - FEW} more" if len(found) > FEW else ""
    return ", ".join(found[:FEW]) + rest


def open_model(kind: Any, name: str, path: str, **options: Any) -> Any:
    """The model of a folder or hub id by a class of transformers, all of it from there.

    What the files hold beside it is named in a note.

    Raises:
        UserError: they lack a weight, which would be random.
    """
    model, info = kind.from_pretrained(path, **options, **INFORMED)
    what = f"a {type(model).__name__} as its config.json says"
    if missing := set(info["missing_keys"]):
        raise UserError(
            f"{name} lacks {len(missing)} weights of {what}, which would be random: {named(missing)}; give a"
            " checkpoint of the whole model, with its head."
        )
    if mismatched := {str(found[0]) for found in info["mismatched_keys"]}:
        raise UserError(
            f"{name} holds {len(mismatched)} weights of other shapes than {what}: {named(mismatched)}; give"
            " the config.json that belongs to the weights."
        )
    if unexpected := info["unexpected_keys"]:
        logger.warning(
            "%s holds %d weights that a %s does not have; they are left out: %s.",
            *(name, len(unexpected), type(model).__name__, named(unexpected)),
        )
    return model


def weights_for(model: Any, own: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """All weights of a model, by its `own` names, from what `save_pretrained` wrote of one like it.

    Exact: in the widest of the model's own precisions.

    Raises:
        UserError: the folder holds no weights, or not just those of the model.
    """
    # FSDP2 makes a class of its own of the model's
    kind: Any = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))
    dtypes = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    widest = functools.reduce(torch.promote_types, dtypes, torch.bfloat16)
    try:
        saved, info = kind.from_pretrained(str(folder), dtype=widest, **INFORMED)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"the weights in {folder} cannot be read, {first_line(error)}: {REMEDY}") from error
    found: dict[str, Tensor] = saved.state_dict()
    for name in info["missing_keys"]:
        found.pop(name, None)
    others = {*info["unexpected_keys"], *(name for name, *_ in info["mismatched_keys"])}
    _require_same(folder, own, found | dict.fromkeys(others, NOTHING))
    return found


def adapter_weights_for(own: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """All weights of an adapter, of which `own` are those in use, as peft wrote them.

    Raises:
        UserError: the folder holds no adapter, or not just those weights.
    """
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise UserError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}: {REMEDY}")
    found: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
    _require_same(folder, own, found)
    return found


def _require_same(folder: Path, own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    missing, others = own.keys() - found.keys(), found.keys() - own.keys()
    others |= {name for name in own.keys() & found.keys() if own[name].shape != found[name].shape}
    if missing or others:
        parts = [f"it lacks {named(missing)}"] if missing else []
        parts += [f"it has another {named(others)}"] if others else []
        raise UserError(f"{folder} holds the weights of another model, {' and '.join(parts)}: {REMEDY}")
