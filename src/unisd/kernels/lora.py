"""Compute LoRA layers without their cost, in float32 and on whole weights.

Linear maps are those of :mod:`unisd.kernels.cpu_linear`; torch and peft compute all others.

Where no gradient is asked for, one product with W + s B A takes the place of three (`merged_lora`).
In 16 bits the sum would be rounded to the precision of W, which an adapter of the first steps lies
below. With gradient, the small product is added into the large one (`fused_lora`): peft makes it,
scales it and adds it, three tensors of the size of the output, and the same again backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from unisd.distributed.sharding import is_shard
from unisd.kernels.cpu_linear import Computed, linear, matmul_nt, matmul_tn, placed_for
from unisd.kernels.cpu_memory import give_back_unchanged


@contextmanager
def merged_lora(model: nn.Module, *, keep: bool) -> Iterator[None]:
    """Compute plain LoRA layers of `model` with their merged weight, while active.

    No parameter is touched.

    Args:
        model: in evaluation mode, without gradient; PEFT-wrapped or not.
        keep: merge each weight once, at one more copy of the adapted weights (for many passes over
            few tokens); False: anew in each pass, at the cost of about r tokens and one weight's
            memory.
    """
    with _computing(mergeable(model), lambda layer: partial(_merged, layer, {} if keep else None)):
        yield


@contextmanager
def fused_lora(model: nn.Module) -> Iterator[None]:
    """Make no tensor but the result in passes of plain LoRA layers on frozen weights, while active.

    Forward and backward passes alike.
    """
    with _computing(mergeable(model), lambda layer: partial(_fused, layer)):
        yield


@contextmanager
def fast_maps(model: nn.Module) -> Iterator[None]:
    """Use :mod:`unisd.kernels.cpu_linear` for whole float32 linear maps on a CPU, while active."""
    maps = [
        module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)
    ]
    with _computing(
        [module for module in maps if _is_whole(module.weight)], lambda layer: partial(_mapped, layer)
    ):
        yield


def _is_whole(weight: Tensor) -> bool:
    own = type(weight) in (Tensor, nn.Parameter)  # not a quantised one that calls itself float32
    return own and weight.device.type == "cpu" and weight.dtype == torch.float32 and not is_shard(weight)


def _mapped(layer: nn.Linear, input: Tensor) -> Tensor:
    return linear(input, layer.weight, layer.bias)


@contextmanager
def _computing(layers: Sequence[Any], forward: Callable[[Any], Callable[..., Tensor]]) -> Iterator[None]:
    for layer in layers:
        layer.forward = forward(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def inference(*models: nn.Module, keep: bool = False) -> Iterator[None]:
    """Set evaluation mode without gradient, fast linear maps, adapters merged; all is put back.

    `keep`: as in `merged_lora`.
    """
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        with torch.no_grad(), ExitStack() as merged:
            for model in models:
                merged.enter_context(fast_maps(model))
                merged.enter_context(merged_lora(model, keep=keep))
            yield
    finally:
        for module in training:
            module.training = True


def mergeable(model: nn.Module) -> list[Any]:
    """List the layers that `merged_lora` merges.

    They are LoRA without bias or variant (DoRA, ...) on whole float32 linear maps.
    """
    return [module for module in model.modules() if _can_merge(module)]


def _can_merge(module: Any) -> bool:
    if (
        type(module) is not lora.Linear
        or type(module.base_layer) is not nn.Linear
        or module.merged
        or module.lora_variant
    ):
        return False
    if "forward" in vars(module):  # computed in another way further out
        return False
    weights = [module.base_layer.weight, *(factor.weight for factor in module.lora_A.values())]
    biased = any(factor.bias is not None for factor in module.lora_B.values())
    return not biased and all(weight.dtype == torch.float32 and not is_shard(weight) for weight in weights)


def _active(layer: Any, x: Tensor, *others: Any) -> list[str]:
    """The adapters that count; none where peft has to compute."""
    if layer.disable_adapters or any(others) or torch.is_autocast_enabled(x.device.type):
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _merged(layer: Any, kept: dict[str, Tensor] | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapters = _active(layer, x, args, kwargs)
    if not adapters:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    base = layer.base_layer
    if kept:
        return linear(x, kept["weight"], base.bias)
    weight = base.weight
    for name in adapters:
        if not layer.lora_B[name].weight.any():  # a new adapter adds nothing, and needs no copy
            continue
        weight = torch.addmm(
            weight, layer.lora_B[name].weight, layer.lora_A[name].weight, alpha=layer.scaling[name]
        )
    if kept is not None:
        kept["weight"] = weight
        if weight is not base.weight:
            give_back_unchanged(base.weight)
    return linear(x, weight, base.bias)


def _fused(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapters = _active(layer, x, args, kwargs)
    base = layer.base_layer
    frozen = not any(p.requires_grad for p in base.parameters())
    if len(adapters) != 1 or not frozen:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    [name] = adapters
    factors, scaling = (layer.lora_A[name].weight, layer.lora_B[name].weight), layer.scaling[name]
    dropout = layer.lora_dropout[name]
    kept = None
    if dropout.training and getattr(dropout, "p", 0.0) > 0:
        kept, scaling = _kept(x, dropout.p), scaling / (1 - dropout.p) if dropout.p < 1 else 0.0
    return _product(x, base.weight, base.bias, *factors, scaling, kept)


def _kept(x: Tensor, p: float) -> Tensor:
    """Which values dropout leaves, bool of the shape of `x`.

    On a CPU four of them from one random number of 64 bits, which takes less than half of the time
    of a Bernoulli draw: their share is then a multiple of 2^-16.
    """
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    least = min(round(p * 2**16), 2**16 - 1) - 2**15
    return (drawn.view(torch.int16)[: x.numel()] >= least).view(x.shape)


def _product(
    x: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    A_rI: Tensor,
    B_Or: Tensor,
    scaling: float,
    kept: Tensor | None = None,
) -> Tensor:
    """Compute x W^T + b + s (m x) A^T B^T.

    x `[...,I]`, frozen W `[O,I]`, A `[r,I]`, B `[O,r]`, dropout's mask m `[...,I]` or none.
    """
    inner_Nr, placed = _SavedLoRA.apply(x, weight_OI, A_rI, B_Or, scaling, kept)  # type: ignore[no-untyped-call]

    def compute() -> Tensor:
        out_NO = linear(x.flatten(0, -2), weight_OI, bias_O).addmm_(inner_Nr, B_Or.T, alpha=scaling)
        return out_NO.view(*x.shape[:-1], len(weight_OI))

    return Computed.apply(placed, compute)  # type: ignore[no-any-return, no-untyped-call]


class _SavedLoRA(torch.autograd.Function):
    """Keeps what the backward pass needs.

    Returns (m x) A^T `[N,r]`, and what stands for the result.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        A_rI: Tensor,
        B_Or: Tensor,
        scaling: float,
        kept: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x_NI = x.flatten(0, -2)
        inner_Nr = matmul_nt(x_NI if kept is None else x_NI * kept.flatten(0, -2), A_rI)
        ctx.save_for_backward(x, inner_Nr, weight_OI, A_rI, B_Or, kept)
        ctx.scaling = scaling
        ctx.mark_non_differentiable(inner_Nr)
        return inner_Nr, placed_for(x, weight_OI)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner_Nr, weight_OI, A_rI, B_Or, kept = ctx.saved_tensors
        grad_NO, wanted = grad.flatten(0, -2), ctx.needs_input_grad
        grad_inner_Nr = matmul_nt(grad_NO, B_Or.T).mul_(ctx.scaling)
        grad_x = None
        if wanted[0]:
            grad_x = matmul_nt(grad_NO, weight_OI.T)
            if kept is None:
                grad_x.addmm_(grad_inner_Nr, A_rI)
            else:
                grad_x.add_((grad_inner_Nr @ A_rI).mul_(kept.flatten(0, -2)))
            grad_x = grad_x.view_as(x)
        dropped = x if kept is None else x * kept
        grad_A = matmul_tn(grad_inner_Nr, dropped.flatten(0, -2)) if wanted[2] else None
        grad_B = matmul_tn(inner_Nr, grad_NO).mul_(ctx.scaling).T if wanted[3] else None
        return grad_x, None, grad_A, grad_B, None, None
