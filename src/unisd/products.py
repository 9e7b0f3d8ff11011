"""Linear maps without gradient, on a CPU in the order in which they are fast there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, WIDE = 1024, 4096
"""Outputs that are computed at a time, where there are `WIDE` or more. MKL on AVX2 (two cores) made 105 GFLOP/s of the product of 164 rows
with a head of 151,936 x 896 in blocks and 57 in one piece, 35 and 21 of 16 rows."""
FEW, LARGE = 64, 100_000
"""Up to so many rows meet a weight of so many entries or more as `weight @ x.T`: in decoding. Of weights of 576 x 1536 that lie in no cache
MKL made 28 GFLOP/s with 4 rows, against 13 the other way round, and 41 with 16 rows against 34."""
VERY_FEW = 8  # rows of which a wide map is faster in one piece


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, room: Tensor | None = None) -> Tensor:
    """`x [...,I] @ weight.T + bias`, as `torch.nn.functional.linear`; in float32 on a CPU in blocks where it is wide, and the other way
    round for few rows, without gradient.

    room: as many rows of O values or more, which may be overwritten by the result; None: fresh memory, which costs a CPU a few percent.
    """
    tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight_OI, bias_O))
    plain = x.device.type == "cpu" and x.dtype == weight_OI.dtype == torch.float32
    outputs, rows = len(weight_OI), x.numel() // max(x.shape[-1], 1)
    few = 1 < rows <= FEW and weight_OI.numel() >= LARGE
    if tracked or not plain or not (few or outputs >= WIDE) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight_OI, bias_O)
    rows_NI = x.flatten(0, -2)
    out_NO = x.new_empty(rows, outputs) if room is None else room[:rows]
    step = outputs if outputs < WIDE or rows <= VERY_FEW else BLOCK
    for start in range(0, outputs, step):
        chosen = slice(start, start + step)
        if few:
            out_NO[:, chosen] = torch.mm(weight_OI[chosen], rows_NI.T).T
        else:
            torch.mm(rows_NI, weight_OI[chosen].T, out=out_NO[:, chosen])
    if bias_O is not None:
        out_NO += bias_O
    return out_NO.view(*x.shape[:-1], outputs)
