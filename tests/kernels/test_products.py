"""Products by oneDNN: torch's own results in float64, and torch's own gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from unisd.kernels import cpu_linear as products
from unisd.kernels.cpu_linear import (
    ROW_MULTIPLE,
    SMALL_ROW_MULTIPLE,
    add_matmul_tn,
    linear,
    matmul_nt,
    matmul_tn,
)
from unisd.kernels.lora import fast_maps

with_onednn = pytest.mark.skipif(not products._has_onednn(), reason="this processor's torch has no oneDNN")
# outputs, inputs: of one row already worth oneDNN's overhead
SHAPES = [(4096, 512), (512, 4096), (2048, 1024)]


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize(
    "rows",
    [
        1,
        2,
        SMALL_ROW_MULTIPLE,
        SMALL_ROW_MULTIPLE + 1,
        ROW_MULTIPLE - 1,
        ROW_MULTIPLE,
        ROW_MULTIPLE + 1,
        3 * ROW_MULTIPLE,
        3 * ROW_MULTIPLE + 5,
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("library", ["mkl", "onednn"])
def test_products_are_those_of_float64(
    outputs: int, inputs: int, rows: int, transposed: bool, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNISD_CPU_LIBRARY", library)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    if transposed:
        x, weight = x.T.contiguous().T, weight.T.contiguous().T
    torch.testing.assert_close(
        matmul_nt(x, weight), (x.double() @ weight.double().T).float(), atol=1.2e-5 * inputs**0.5, rtol=1e-5
    )


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@with_onednn
@pytest.mark.long
def test_few_shapes_reach_onednn(outputs: int, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = set(), products._onednn

    def record(x: torch.Tensor, weight: torch.Tensor) -> Any:
        seen.add(len(x))
        return real(x, weight)

    monkeypatch.setattr(products, "_onednn", record)
    weight = torch.ones(outputs, inputs)
    for rows in range(1, 4 * ROW_MULTIPLE):
        assert matmul_nt(torch.ones(rows, inputs), weight).shape == (rows, outputs)
    assert seen <= {
        *range(1, SMALL_ROW_MULTIPLE),
        *range(SMALL_ROW_MULTIPLE, ROW_MULTIPLE, SMALL_ROW_MULTIPLE),
        *range(ROW_MULTIPLE, 5 * ROW_MULTIPLE, ROW_MULTIPLE),
    }
    assert len(seen) > SMALL_ROW_MULTIPLE


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 512), (2, 70, 512), (0, 512), (3, 8)])
@torch.no_grad()
def test_linear_maps(shape: tuple[int, ...], bias: bool) -> None:
    outputs, atol = 4096 + 7, 1e-5 if shape[-1] == 8 else 3e-4
    x, weight, b = torch.randn(shape), torch.randn(outputs, shape[-1]), torch.randn(outputs) if bias else None
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double()).float()
    torch.testing.assert_close(linear(x, weight, b), expected, atol=atol, rtol=1e-5)
    room = torch.full((x.flatten(0, -2).shape[0] + 1, outputs), torch.nan)
    out = linear(x, weight, b, room)
    torch.testing.assert_close(out, expected, atol=atol, rtol=1e-5)
    assert out.data_ptr() == room.data_ptr() or not x.numel()
    assert bool(room[-1].isnan().all())


@pytest.mark.parametrize("tokens", [0, 1, ROW_MULTIPLE - 1, ROW_MULTIPLE, 100])
def test_outer_products_are_added(tokens: int) -> None:
    y, x, total = torch.randn(tokens, 3000), torch.randn(tokens, 512), torch.randn(3000, 512)
    expected = (total.double() + y.double().T @ x.double()).float()
    torch.testing.assert_close(matmul_tn(y, x), expected - total, atol=1e-3, rtol=1e-4)
    add_matmul_tn(total, y, x)
    torch.testing.assert_close(total, expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [(2, 32), (3, 23)])
def test_gradients_of_linear_maps(rows: tuple[int, int], frozen: bool, checkpointing: bool) -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(512, 1024), torch.nn.SiLU(), torch.nn.Linear(1024, 256)
    ).requires_grad_(not frozen)
    x = torch.randn(*rows, 512, requires_grad=True)
    wanted = [x] if frozen else [x, *model.parameters()]

    def gradients() -> tuple[torch.Tensor, ...]:
        out = checkpoint(model, x, use_reentrant=False) if checkpointing else model(x)
        return torch.autograd.grad(out.square().sum(), wanted)

    torchs = gradients()
    with fast_maps(model):
        assert all("forward" in vars(model[i]) for i in (0, 2))
        ours = gradients()
    assert not any("forward" in vars(model[i]) for i in (0, 2))
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


@with_onednn
def test_a_checkpointed_map_at_the_end_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = (
        torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.Linear(1024, 256)),
        torch.randn(64, 512),
    )
    computed: list[tuple[int, ...]] = []

    def watched(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        computed.append(tuple(weight.shape))
        return x @ weight.T

    monkeypatch.setattr(products, "matmul_nt", watched)
    with fast_maps(model):
        out = checkpoint(model, x, use_reentrant=False)
        assert computed == [(1024, 512), (256, 1024)]
        out.sum().backward()
    assert computed[2:].count((1024, 512)) == 1 and (256, 1024) not in computed[2:]


@torch.no_grad()
def test_other_precisions_autocast_and_torchs_switch_take_torchs_path() -> None:
    x, weight = torch.randn(8, 512), torch.randn(4096, 512)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(linear(x.to(dtype), weight.to(dtype)), F.linear(x.to(dtype), weight.to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_results_may_be_changed_in_place_as_torchs_may() -> None:
    layer, x = torch.nn.Linear(512, 1024), torch.randn(2, 32, 512)
    expected = torch.autograd.grad(layer(x).clamp_(-1, 1).sum(), layer.weight)[0]
    with fast_maps(layer):
        torch.testing.assert_close(
            torch.autograd.grad(layer(x).clamp_(-1, 1).sum(), layer.weight)[0], expected
        )


def test_a_vector_and_a_bias_alone() -> None:
    layer, x = torch.nn.Linear(2048, 2048), torch.randn(2048)
    layer.weight.requires_grad_(False)
    with fast_maps(layer):
        torch.testing.assert_close(layer(input=x), layer(x[None])[0], atol=1e-4, rtol=1e-4)
        layer(x[None].expand(3, -1)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((2048,), 3.0)) and layer.weight.grad is None


def test_maps_of_other_precisions_are_left_alone() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4).bfloat16(), torch.nn.Linear(4, 4).double(), torch.nn.Linear(4, 4)
    )
    with fast_maps(model), fast_maps(model):
        assert ["forward" in vars(layer) for layer in model] == [False, False, True]
    assert not any("forward" in vars(layer) for layer in model)


@torch.no_grad()
def test_room_of_another_precision_is_not_used() -> None:
    x, weight, room = (
        torch.randn(3, 8, dtype=torch.float64),
        torch.randn(5, 8, dtype=torch.float64),
        torch.empty(3, 5),
    )
    assert torch.equal(linear(x, weight, room=room), F.linear(x, weight))
