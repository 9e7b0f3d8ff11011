"""Attention by packed rows: as transformers' own, without the products between rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.attention import LENGTHS, final_and_gradients
from unisd import testing as tiny
from unisd.backbone import Backbone
from unisd.kernels import attention
from unisd.kernels.attention import PACKED_SDPA


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_equals_transformers_own(family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(tiny.model(family, dtype=torch.float64))
    assert backbone.causal_lm.config._attn_implementation == PACKED_SDPA
    if checkpointing:
        backbone.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    seen: list[int] = []
    kernel = attention.sdpa_attention_forward

    def watched(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(query.shape[2])
        return kernel(module, query, *args, **kwargs)

    grouped = attention.scaled_dot_product_attention

    def watched_too(query: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(query.shape[2])
        return grouped(query, *args, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", watched)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched_too)
    ours = final_and_gradients(backbone)
    assert set(seen) == set(LENGTHS)
    backbone.causal_lm.set_attn_implementation("sdpa")
    backbone.tells_rows = False
    theirs = final_and_gradients(backbone)
    assert len(ours) == len(theirs) > 3
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


def rows_one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    _bounds: torch.Tensor,
    longest: int,
    _longest: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What torch documents of `varlen_attn`, written out: `[N,heads,size]`, each row to its own
    past and at most so far back.
    """
    assert enable_gqa == (query.shape[1] != key.shape[1]) and bounds.dtype == torch.int32
    shared = query.shape[1] // key.shape[1]
    found = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        assert end - start <= longest
        q, k, v = (
            x[start:end].transpose(0, 1)
            for x in (query, key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1))
        )
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        scores = (q @ k.transpose(1, 2) * (scale or q.shape[-1] ** -0.5)).masked_fill(~seen, float("-inf"))
        found.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_what_the_flash_kernel_is_told(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself runs on CUDA only (`test_gpu.py`); its arguments mean the same rows,
    windows and shared heads.
    """
    exact = final_and_gradients(Backbone(tiny.model(family, dtype=torch.float64)))
    asked: list[int] = []

    def kernel(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(kwargs["window_size"][0])
        return rows_one_by_one(*args, **kwargs)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "packs_well", lambda device, dtype: True)
    found = final_and_gradients(Backbone(tiny.model(family, dtype=torch.float64)))
    assert asked == [7 if family == "gemma3" else -1] * 2
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


def test_what_the_flash_kernel_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, layer, query = torch.device("cpu"), torch.nn.Identity(), torch.zeros(1, 2, 3, 8)
    assert not attention.packs_well(cpu, torch.bfloat16)
    monkeypatch.setattr(attention, "_has_flash", lambda device: True)
    assert attention.packs_well(cpu, torch.bfloat16) and not attention.packs_well(cpu, torch.float32)
    half = query.bfloat16()
    assert attention._flash_fits(layer, half, half, 0.0, {})
    assert not attention._flash_fits(layer, query, query, 0.0, {})
    assert not attention._flash_fits(layer, half[..., :7], half[..., :7], 0.0, {})
    assert not attention._flash_fits(layer, half, half[..., :4], 0.0, {})
    assert not attention._flash_fits(layer, half, half, 0.1, {})
    assert not attention._flash_fits(layer, half, half, 0.0, {"position_bias": half})
    layer.is_causal = False  # type: ignore[assignment]
    assert not attention._flash_fits(layer, half, half, 0.0, {})
    chunked = torch.nn.Identity()
    chunked.config = SimpleNamespace(attention_chunk_size=4)  # type: ignore[assignment]
    assert not attention._flash_fits(chunked, half, half, 0.0, {})
