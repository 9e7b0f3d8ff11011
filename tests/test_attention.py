"""Attention by packed rows: as transformers' own, without the products between rows."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from unisd import attention
from unisd.attention import FRUGAL
from unisd.backbone import Backbone, lay_out

LENGTHS = (9, 5, 17, 1)


def final_and_gradients(backbone: Backbone) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 60, (length,), generator=generator).tolist() for length in LENGTHS]
    model = backbone.model.train()
    model.zero_grad()
    final = backbone.forward(model, lay_out(rows, True, 0, model.device)).final
    assert final is not None
    (final * torch.randn(final.shape, generator=generator).to(final.device)).sum().backward()
    return [final.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_equals_transformers_own(family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(tiny.model(family, dtype=torch.float64))
    assert backbone.causal_lm.config._attn_implementation == FRUGAL
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
    backbone._takes_row_starts = False
    theirs = final_and_gradients(backbone)
    assert len(ours) == len(theirs) > 3
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()
