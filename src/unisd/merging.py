"""Adapters without their cost where no gradient is asked for: one product with W + s B A instead of three products.

In float32 only. In 16 bits the sum would be rounded to the precision of W, which an adapter of the first steps lies below.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from unisd.products import linear
from unisd.sharding import is_sharded


@contextmanager
def merged_lora(model: nn.Module, *, keep: bool) -> Iterator[None]:
    """While active, plain LoRA layers of `model` compute with their merged weight; no parameter is touched.

    Args:
        model: in evaluation mode, without gradient; PEFT-wrapped or not.
        keep: merge each weight once, at one more copy of the adapted weights (for many passes over few tokens); False: anew in
            each pass, at the cost of about r tokens and one weight's memory.
    """
    layers = mergeable(model)
    for layer in layers:
        layer.forward = partial(_forward, layer, {} if keep else None)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def inference(*models: nn.Module, keep: bool = False) -> Iterator[None]:
    """Evaluation mode without gradient, adapters merged (`keep`: as in `merged_lora`); every module's own mode is put back."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        with torch.no_grad(), ExitStack() as merged:
            for model in models:
                merged.enter_context(merged_lora(model, keep=keep))
            yield
    finally:
        for module in training:
            module.training = True


def mergeable(model: nn.Module) -> list[Any]:
    """The layers that `merged_lora` merges: LoRA without bias or variant (DoRA, ...) on whole float32 linear maps."""
    return [] if is_sharded(model) else [module for module in model.modules() if _can_merge(module)]


def _can_merge(module: Any) -> bool:
    if type(module) is not lora.Linear or type(module.base_layer) is not nn.Linear or module.merged or module.lora_variant:
        return False
    if "forward" in vars(module):  # merged further out
        return False
    weights = [module.base_layer.weight, *(factor.weight for factor in module.lora_A.values())]
    biased = any(factor.bias is not None for factor in module.lora_B.values())
    return not biased and all(weight.dtype == torch.float32 for weight in weights)


def _forward(layer: Any, kept: dict[str, Tensor] | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or not adapters or args or kwargs or torch.is_autocast_enabled(x.device.type):
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    base = layer.base_layer
    if kept is not None and "weight" in kept:
        return linear(x, kept["weight"], base.bias)
    weight = base.weight
    for name in adapters:
        weight = torch.addmm(weight, layer.lora_B[name].weight, layer.lora_A[name].weight, alpha=layer.scaling[name])
    if kept is not None:
        kept["weight"] = weight
    return linear(x, weight, base.bias)
