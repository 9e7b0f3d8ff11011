"""Linear maps without gradient, on a CPU in the order in which they are fast there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, WIDE = 1024, 4096
"""Outputs that are computed at a time, where there are `WIDE` or more. MKL on AVX2 (two cores) made 105 GFLOP/s of the product of 164 rows
with a head of 151,936 x 896 in blocks and 57 in one piece, 35 and 21 of 16 rows."""


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, room: Tensor | None = None) -> Tensor:
    """`x [...,I] @ weight.T + bias`, as `torch.nn.functional.linear`; wide float32 maps on a CPU block by block, without gradient.

    room: as many rows of O values or more, which may be overwritten by the result; None: fresh memory, which costs a CPU a few percent.
    """
    tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight_OI, bias_O))
    plain = x.device.type == "cpu" and x.dtype == weight_OI.dtype == torch.float32
    if tracked or not plain or len(weight_OI) < WIDE or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight_OI, bias_O)
    rows_NI = x.flatten(0, -2)
    out_NO = x.new_empty(len(rows_NI), len(weight_OI)) if room is None else room[: len(rows_NI)]
    for start in range(0, len(weight_OI), BLOCK):
        chosen = slice(start, start + BLOCK)
        torch.mm(rows_NI, weight_OI[chosen].T, out=out_NO[:, chosen])
    if bias_O is not None:
        out_NO += bias_O
    return out_NO.view(*x.shape[:-1], len(weight_OI))
