"""Compute transformers' SDPA attention without its waste.

Shared heads are read in place, and packed rows attend to themselves alone.

transformers repeats the key/value heads of grouped-query attention where a mask is given, and it
hands a packed row of N tokens to the kernel whole, which multiplies N x N of them to throw most
away. Neither changes the result. A CPU takes the rows one by one (and lets rows that begin alike
share their beginning); CUDA all at once, by the flash attention for rows of varying length that
comes with torch, in half precision (in float32 as "sdpa" does). The mask of N x N bits that
transformers makes for a packed row remains, and is read by no kernel there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "unisd_sdpa"
PACKED_FROM = 50_000_000
"""Parameters from which a CPU should read rows packed: it attends to them one by one, and a small
model's padding costs less than that.
"""


def continues_rows(device: torch.device) -> bool:
    """Whether `packed_sdpa` takes `row_contexts` there."""
    return device.type == "cpu"


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    row_starts: Sequence[int] | None = None,
    row_bounds: Tensor | None = None,
    row_contexts: Sequence[Sequence[slice]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward`, of `[B,heads,L,size]`, its masks included (windows, chunks).

    row_starts: where the rows of a packed batch (B = 1) begin, given to the model's forward; None:
    not packed. row_bounds: the same and the end, int32 `[rows + 1]` on the device, which no layer
    must wait for. row_contexts: of each row the spans before it that it continues, in order; on a
    CPU, for layers that attend to all of the past.
    """
    starts = row_starts or ()
    if len(starts) > 1 and row_bounds is not None and _flash_fits(module, query, value, dropout, kwargs):
        return _flash(query, key, value, scaling, starts, row_bounds, kwargs.get("sliding_window")), None
    apart = query.device.type == "cpu" and kwargs.get("position_bias") is None
    plain = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1)
    if row_contexts is not None and len(starts) > 1 and not (apart and plain):
        raise ValueError(
            "rows that share their beginnings can be read on a CPU alone, by layers without a bias of"
            " their own"
        )
    if apart and len(starts) > 1:
        rows = [slice(*ends) for ends in pairwise([*starts, query.shape[2]])]
        if row_contexts is not None:
            spans = zip(rows, row_contexts, strict=True)
            parts = [
                _continued(query[:, :, row], key, value, [*before, row], dropout, scaling)
                for row, before in spans
            ]
            return torch.cat(parts, dim=1), None
        masks = [None if attention_mask is None else attention_mask[..., row, row] for row in rows]
        parts = [
            packed_sdpa(
                module, query[:, :, row], key[:, :, row], value[:, :, row], mask, dropout, scaling, **kwargs
            )[0]
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


def _continued(
    query: Tensor, key: Tensor, value: Tensor, seen: Sequence[slice], dropout: float, scaling: float | None
) -> Tensor:
    """Attention `[B,n,heads,size]` of the last of the spans `seen` to all of them."""
    key, value = (torch.cat([x[:, :, span] for span in seen], dim=2) for x in (key, value))
    new, total = query.shape[2], key.shape[2]
    mask_nm = torch.ones(new, total, dtype=torch.bool).tril(total - new) if total > new else None
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=mask_nm, dropout_p=dropout, is_causal=mask_nm is None, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2)


def _flash_dtype(query: Tensor) -> torch.dtype:
    """Return the precision that the kernel would compute in: autocast's.

    Custom operators are not cast to it by themselves.
    """
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def disable_cudnn_sdpa(device: torch.device) -> None:
    """Switch cuDNN's attention off for the whole process.

    torch prefers it on a Hopper, where it plans anew for every length of prompt and answer.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


@lru_cache
def _has_flash(device: torch.device) -> bool:
    """Whether torch's flash kernels run there: NVIDIA's Ampere or later."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def packs_well(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed rows are read at once without products between them."""
    return dtype in (torch.float16, torch.bfloat16) and _has_flash(device)


def takes_packed(device: torch.device) -> bool:
    """Whether a few thousand packed tokens cost less than padding, with products between rows."""
    return device.type != "cpu"


def packing_pays(device: torch.device, dtype: torch.dtype, tells_rows: bool, parameters: int) -> bool:
    """Whether packed rows are read faster than padded ones.

    tells_rows: attention is told where rows begin, so that a CPU takes them one by one.
    """
    one_by_one = device.type == "cpu" and tells_rows and parameters >= PACKED_FROM
    return one_by_one or packs_well(device, dtype)


def _flash_fits(
    module: nn.Module, query: Tensor, value: Tensor, dropout: float, options: dict[str, Any]
) -> bool:
    """Say whether this layer attends backwards, at most within a window.

    That is what the kernel can be told.
    """
    chunked = getattr(getattr(module, "config", None), "attention_chunk_size", None)
    size = query.shape[-1]
    return (
        packs_well(query.device, _flash_dtype(query))
        and size <= 256
        and size % 8 == 0
        and size == value.shape[-1]
        and not dropout
        and not chunked
        and options.get("position_bias") is None
        and getattr(module, "is_causal", True)
    )


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    starts: Sequence[int],
    bounds: Tensor,
    window: int | None,
) -> Tensor:
    """Attend `[1,N,heads,size]` of packed rows, each to its own past.

    `window` tokens of it (itself included).
    """
    longest = max(b - a for a, b in pairwise([*starts, query.shape[2]]))
    q_NhD, k_NgD, v_NgD = (x[0].transpose(0, 1).to(_flash_dtype(query)) for x in (query, key, value))
    left = -1 if window is None else window - 1
    out_NhD = varlen_attn(
        q_NhD, k_NgD, v_NgD, bounds, bounds, longest, longest,
        scale=scaling, window_size=(left, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(out_NhD, Tensor)
    return out_NhD[None]


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
