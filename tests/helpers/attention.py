"""A packed forward pass with its gradients."""

from __future__ import annotations

import torch

from unisd.backbone import Backbone
from unisd.batching import collate

LENGTHS = (9, 5, 17, 1)


def final_and_gradients(backbone: Backbone) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 60, (length,), generator=generator).tolist() for length in LENGTHS]
    model = backbone.model.train()
    model.zero_grad()
    final = backbone.forward(model, collate(rows, True, 0, model.device)).final
    assert final is not None
    (final * torch.randn(final.shape, generator=generator).to(final.device)).sum().backward()
    return [final.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
