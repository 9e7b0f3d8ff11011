"""Linear maps in float32 on a CPU, by the fastest of torch's libraries for them.

torch multiplies in MKL, which keeps to AVX2 on processors that are not Intel's. oneDNN, which torch
brings along, knows their AVX512: of 384 rows and the layers of a 0.5B model it made 460 to 510
GFLOP/s on two cores of an AMD EPYC where MKL made 220, and 240 to 250 with AVX2 alone. On a Xeon
with AVX512 MKL is as fast, and faster for the layers of a 135M model. So it is measured
(:mod:`unisd.kernels.cpu_library`). Both compute in float32 throughout.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unisd.kernels.cpu_library import faster_than_mkl

ROW_MULTIPLE, SMALL_ROW_MULTIPLE = 64, 8
"""oneDNN compiles a kernel for each shape, in 1.6 ms, and keeps it (`KERNELS_KEPT`).

It is given multiples of `ROW_MULTIPLE` rows (and of tokens to sum over), or of
`SMALL_ROW_MULTIPLE` up to `ROW_MULTIPLE`, or fewer than that.
"""
KERNELS_KEPT, KERNEL_BYTES = 128, 600_000
"""Most kernels that oneDNN and torch keep, of their own accord 1,024, and what one takes in both.

A pass needs some 20, each for all layers; answers of all lengths together need hundreds.
"""
MIN_PRODUCT_ENTRIES = 2**21
"""Multiplications from which oneDNN may be the faster one; below, its overhead of some microseconds
counts.
"""
BLOCK = 1024
"""Outputs at a time that are copied to where they belong while they lie in the cache."""


@lru_cache
def _has_onednn() -> bool:
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's, torch's above it
        os.environ.setdefault(cache, str(KERNELS_KEPT))  # read at the first product
    # The operator of compiled graphs: torch reaches oneDNN in float32 by no other that takes
    # tensors as they are.
    x86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return x86 and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def kernel_bytes(device: torch.device) -> int:
    """Most memory that compiled kernels take on a device."""
    return KERNELS_KEPT * KERNEL_BYTES if device.type == "cpu" and _has_onednn() else 0


def _suits(x: Tensor, weight_OI: Tensor) -> bool:
    """Whether oneDNN computes a product."""
    plain = x.device.type == "cpu" and x.dtype == weight_OI.dtype == torch.float32 and x.dim() > 1
    return (
        plain
        and x.numel() * len(weight_OI) >= MIN_PRODUCT_ENTRIES
        and _has_onednn()
        and bool(torch.backends.mkldnn.enabled)
        and (_is_decoding(x, weight_OI) or faster_than_mkl(_onednn, x.numel() // x.shape[-1], weight_OI))
    )


def _is_decoding(x: Tensor, weight_OI: Tensor) -> bool:
    """Few rows and a weight as it lies: oneDNN was the faster one on all processors tried."""
    few = x.numel() <= ROW_MULTIPLE * x.shape[-1]
    return few and x.is_contiguous() and weight_OI.is_contiguous()


def _onednn(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, None, "none", [], "")  # type: ignore[no-any-return]


def _ragged(rows: int) -> tuple[int, int]:
    """What a kernel's number of rows is a multiple of, and how many are too many for that."""
    step = 1 if rows <= SMALL_ROW_MULTIPLE else SMALL_ROW_MULTIPLE if rows <= ROW_MULTIPLE else ROW_MULTIPLE
    return step, rows % step


def _padded(x_NI: Tensor) -> Tensor:
    step, ragged = _ragged(len(x_NI))
    return F.pad(x_NI, (0, 0, 0, step - ragged)) if ragged else x_NI


def matmul_nt(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """`x @ weight.T`, without gradient. Either may be a transposed view."""
    return _product(x_NI, weight_OI) if _suits(x_NI, weight_OI) else x_NI @ weight_OI.T


def _product(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """The same by oneDNN, of numbers of rows that it has a kernel for."""
    (rows, inputs), outputs = x_NI.shape, len(weight_OI)
    if rows < ROW_MULTIPLE or outputs >= inputs:  # what goes in, and is copied, is less than what comes out
        return _onednn(_padded(x_NI), weight_OI)[:rows]
    whole = rows - _ragged(rows)[1]
    found = _onednn(x_NI[:whole], weight_OI)
    return found if whole == rows else torch.cat([found, x_NI[whole:] @ weight_OI.T])


def matmul_tn(y_NO: Tensor, x_NI: Tensor) -> Tensor:
    """`y.T @ x`: a weight's gradient."""
    whole = len(x_NI) - len(x_NI) % ROW_MULTIPLE
    if not whole or not _suits(y_NO.T, x_NI.T):
        return y_NO.T @ x_NI
    found = _product(y_NO[:whole].T, x_NI[:whole].T)
    return found if whole == len(x_NI) else found.addmm_(y_NO[whole:].T, x_NI[whole:])


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, room: Tensor | None = None) -> Tensor:
    """`x [...,I] @ weight.T + bias`, as `torch.nn.functional.linear`, with its gradients.

    room: without gradient, as many rows of O values or more, which may be overwritten by the
    result; None: fresh memory, which costs a CPU a few percent.
    """
    given = (x, weight_OI, bias_O)
    tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if tracked or (room is not None and room.dtype != x.dtype):
        room = None
    if torch.is_autocast_enabled(x.device.type) or (room is None and not _suits(x, weight_OI)):
        return F.linear(*given)
    if tracked:
        placed = _Saved.apply(*given)  # type: ignore[no-untyped-call]
        return Computed.apply(placed, lambda: linear(*given))  # type: ignore[no-any-return, no-untyped-call]
    rows_NI = x.flatten(0, -2)
    if room is None:
        out_NO = matmul_nt(rows_NI, weight_OI)
    elif not _suits(rows_NI, weight_OI):
        out_NO = torch.mm(rows_NI, weight_OI.T, out=room[: len(rows_NI)])
    else:
        out_NO, padded_NI = room[: len(rows_NI)], _padded(rows_NI)
        for start in range(0, len(weight_OI), BLOCK):
            found = _product(padded_NI, weight_OI[start : start + BLOCK])
            out_NO[:, start : start + BLOCK] = found[: len(rows_NI)]
    if bias_O is not None:
        out_NO += bias_O
    return out_NO.view(*x.shape[:-1], len(weight_OI))


def placed_for(x: Tensor, weight_OI: Tensor) -> Tensor:
    """A tensor of the result's shape without memory of its own."""
    return x.new_empty(1).expand(*x.shape[:-1], len(weight_OI))


class Computed(torch.autograd.Function):
    """What a function computes, as the value of a tensor that was placed in the graph before.

    Keeps nothing.

    What a backward pass needs is thus kept before the product: a checkpointed block is computed
    anew only up to the last value that was kept, and so its last product, the third of an MLP, is
    not.
    """

    @staticmethod
    def forward(ctx: Any, _: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        out = compute()
        return torch.ops.aten._unsafe_view(out, out.shape)  # type: ignore[no-any-return]  # a view could not be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


class _Saved(torch.autograd.Function):
    """Keeps what the backward pass of a linear map needs. Returns what stands for its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight_OI)
        ctx.shape = x.shape
        return placed_for(x, weight_OI)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        grad_NO, wanted = grad.flatten(0, -2), ctx.needs_input_grad
        grad_x = matmul_nt(grad_NO, weight_OI.T).view(ctx.shape) if wanted[0] else None
        grad_weight = matmul_tn(grad_NO, x.flatten(0, -2)) if wanted[1] else None
        return grad_x, grad_weight, grad_NO.sum(0) if wanted[2] else None


def add_matmul_tn(total_OI: Tensor, y_NO: Tensor, x_NI: Tensor) -> None:
    """Add the product: `total += y.T @ x`; on a CPU block by block.

    A product of few rows with a large total is only as fast as memory.
    """
    if total_OI.device.type != "cpu":
        total_OI.addmm_(y_NO.T, x_NI)
        return
    for start in range(0, len(total_OI), BLOCK):
        total_OI[start : start + BLOCK] += matmul_tn(y_NO[:, start : start + BLOCK], x_NI)
