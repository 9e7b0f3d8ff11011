"""The block-by-block product: torch's own results, and torch's own path where a gradient is asked for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from unisd import products
from unisd.products import linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (0, 8)])
@torch.no_grad()
def test_wide_maps_are_those_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    x, weight, b = torch.randn(shape), torch.randn(products.WIDE + 7, 8), torch.randn(products.WIDE + 7) if bias else None
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    torch.testing.assert_close(linear(x, weight, b), expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("outputs", "inputs"), [(300, 400), (products.WIDE + 7, 32)])
@pytest.mark.parametrize("rows", [1, 2, products.VERY_FEW, products.VERY_FEW + 1, products.FEW, products.FEW + 1])
@torch.no_grad()
def test_few_rows_of_large_maps(rows: int, outputs: int, inputs: int) -> None:
    x, weight, bias = torch.randn(rows, 1, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    assert weight.numel() >= products.LARGE
    expected = F.linear(x.double(), weight.double(), bias.double()).float()
    torch.testing.assert_close(linear(x, weight, bias), expected, atol=1e-4, rtol=1e-5)
    room = torch.empty(rows + 1, outputs)
    torch.testing.assert_close(linear(x, weight, bias, room=room), expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_room_takes_the_result() -> None:
    x, weight, room = torch.randn(3, 8), torch.randn(products.WIDE, 8), torch.full((5, products.WIDE), torch.nan)
    out = linear(x, weight, room=room)
    assert out.data_ptr() == room.data_ptr() and out.shape == (3, products.WIDE) and bool(room[3:].isnan().all())
    torch.testing.assert_close(out, F.linear(x, weight))


def test_gradients_other_precisions_and_autocast_take_torchs_path() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(products.WIDE, 8)
    linear(x, weight).sum().backward()
    [expected] = torch.autograd.grad(F.linear(x, weight).sum(), x)
    assert torch.equal(x.grad, expected)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(linear(x.detach().to(dtype), weight.to(dtype)), F.linear(x.detach().to(dtype), weight.to(dtype)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
