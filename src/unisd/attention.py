"""transformers' SDPA attention without its waste on a CPU: shared heads are read in place, and packed rows attend to themselves alone.

transformers repeats the key/value heads of grouped-query attention where a mask is given, and it hands a packed row of N tokens to the
kernel whole, which multiplies N x N of them to throw most away. Both cost nothing in results. On an accelerator it computes as "sdpa" does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FRUGAL = "unisd_sdpa"


def frugal_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    row_starts: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward`, of `[B,heads,L,size]`, its masks included (windows, chunks).

    row_starts: where the rows of a packed batch (B = 1) begin, given to the model's forward; None: not packed.
    """
    apart = query.device.type == "cpu" and kwargs.get("position_bias") is None
    if apart and row_starts is not None and len(row_starts) > 1:
        rows = [slice(*ends) for ends in pairwise([*row_starts, query.shape[2]])]
        masks = [None if attention_mask is None else attention_mask[..., row, row] for row in rows]
        parts = [
            frugal_sdpa(module, query[:, :, row], key[:, :, row], value[:, :, row], mask, dropout, scaling, **kwargs)[0]
            for row, mask in zip(rows, masks, strict=True)
        ]
        return torch.cat(parts, dim=1), None
    if not apart or attention_mask is None or query.shape[1] == key.shape[1]:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(FRUGAL, frugal_sdpa)
AttentionMaskInterface.register(FRUGAL, sdpa_mask)
