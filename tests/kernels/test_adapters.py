"""Adapters merged, and fused into one product where a gradient is asked for: the same results, and
no trace afterwards.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from unisd.kernels.lora import _kept, _product, fused_lora, mergeable, merged_lora


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 12, bias=True), nn.Linear(12, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def adapted(dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    """A net with an adapter whose both factors are other than zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["first", "second"], **options)  # type: ignore[arg-type]
    model = get_peft_model(Net().to(dtype), config)  # type: ignore[arg-type]
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.mark.parametrize("keep", [True, False])
@torch.no_grad()
def test_the_results_are_those_of_the_adapter(keep: bool) -> None:
    model, x = adapted(), torch.randn(4, 6, 7)
    before = {name: p.clone() for name, p in model.named_parameters()}
    plain = model(x)
    with model.disable_adapter():
        assert not torch.allclose(plain, model(x), atol=0.1)
    with merged_lora(model, keep=keep), merged_lora(model, keep=not keep):  # the outer one counts
        assert_close(model(x), plain)
        assert_close(model(x[0]), plain[0])
        with model.disable_adapter():
            base = model(x)
    with model.disable_adapter():
        assert torch.equal(base, model(x))
    assert torch.equal(model(x), plain)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@torch.no_grad()
def test_all_active_adapters_count_and_only_they() -> None:
    model, x = adapted(), torch.randn(5, 7)
    model.add_adapter(
        "other", LoraConfig(r=2, lora_alpha=2, target_modules=["first"], init_lora_weights=False)
    )
    for active in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(active)
        plain = model(x)
        with merged_lora(model, keep=False):
            assert_close(model(x), plain)


@torch.no_grad()
def test_weights_that_change_meanwhile_are_followed() -> None:
    model, x = adapted(), torch.randn(5, 7)
    factor = next(p for name, p in model.named_parameters() if "lora_B" in name)
    with merged_lora(model, keep=False):
        model(x)
        factor.data = factor.data + 1
        merged = model(x)
    assert_close(model(x), merged)


@torch.no_grad()
def test_a_new_adapter_needs_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(), torch.randn(5, 7)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.zero_()
    monkeypatch.delattr(torch, "addmm")
    with model.disable_adapter():
        base = model(x)
    with merged_lora(model, keep=True):
        assert torch.equal(model(x), base)


def test_an_error_leaves_nothing_behind() -> None:
    model = adapted()
    with pytest.raises(RuntimeError), merged_lora(model, keep=True):
        model(torch.randn(2, 3))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"dtype": torch.bfloat16}])
def test_others_are_left_alone(options: dict[str, object]) -> None:
    assert mergeable(adapted(**options)) == []  # type: ignore[arg-type]


@torch.no_grad()
def test_autocast_computes_as_in_training() -> None:
    model, x = adapted(), torch.randn(5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        with merged_lora(model, keep=True):
            assert torch.equal(model(x), plain)


def gradients(model: nn.Module, x: torch.Tensor, checkpointing: bool) -> list[torch.Tensor]:
    """The output, and the gradients of a fixed function of it."""
    model.zero_grad()
    x.grad = None
    out = checkpoint(model, x, use_reentrant=False) if checkpointing else model(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in (x, *model.parameters()) if p.grad is not None)]


@pytest.mark.parametrize("into_input", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_fused_gives_the_gradients_of_the_adapter(checkpointing: bool, into_input: bool) -> None:
    model, x = adapted().train(), torch.randn(4, 6, 7, requires_grad=into_input)

    peft = gradients(model, x, checkpointing)
    with fused_lora(model):
        ours = gradients(model, x, checkpointing)
    assert len(ours) == len(peft) == 5 + into_input
    for a, b in zip(ours, peft, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("tokens", [64, 69])
@pytest.mark.parametrize("dropout", [False, True])
def test_fused_is_that_of_float64_where_products_are_large(tokens: int, dropout: bool) -> None:
    x, weight, bias, A, B = (
        torch.randn(*size) for size in ((2, tokens, 512), (1024, 512), (1024,), (8, 512), (1024, 8))
    )
    kept = torch.rand(x.shape) > 0.3 if dropout else None

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        x_, weight_, bias_, A_, B_ = (t.to(dtype) for t in (x, weight, bias, A, B))
        tracked = [t.requires_grad_() for t in (x_, A_, B_)]
        out = _product(x_, weight_, bias_, A_, B_, 1.7, kept)
        return [out.detach(), *torch.autograd.grad(out.clamp_(-30, 30).sum(), tracked)]

    x.requires_grad_(False)
    for ours, exact in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        torch.testing.assert_close(ours, exact.float(), atol=0.02, rtol=1e-3)


def test_fused_is_exact_in_float64() -> None:
    sizes = {"x": (2, 3, 5), "weight": (7, 5), "bias": (7,), "A": (2, 5), "B": (7, 2)}
    x, weight, bias, A, B = (torch.randn(*size, dtype=torch.float64) for size in sizes.values())
    tracked = [t.requires_grad_() for t in (x, A, B)]
    kept = torch.rand(sizes["x"]) > 0.3
    assert torch.autograd.gradcheck(lambda x, A, B: _product(x, weight, bias, A, B, 1.7), tracked)
    assert torch.autograd.gradcheck(lambda x, A, B: _product(x, weight, bias, A, B, 1.7, kept), tracked)
    torch.testing.assert_close(_product(x, weight, bias, A, B, 1.7), x @ (weight + 1.7 * B @ A).T + bias)


def test_a_checkpointed_block_does_not_compute_its_last_product_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = adapted().train(), torch.randn(4, 6, 7, requires_grad=True)
    computed: list[tuple[int, ...]] = []

    def watched(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        computed.append(tuple(weight.shape))
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr("unisd.kernels.lora.linear", watched)
    with fused_lora(model):
        gradients(model, x, checkpointing=True)
    assert len(computed) == 3 and computed[0] == computed[2]  # first and last layer; the first once more


def test_what_cannot_be_fused_is_left_to_peft() -> None:
    x = torch.randn(3, 7)
    model = adapted().train()
    for p in model.parameters():
        p.requires_grad_(True)
    plain = model(x)
    with fused_lora(model):
        out = model(x)
    assert torch.equal(out, plain)
    out.sum().backward()
    assert sum(p.grad is not None for p in model.parameters()) == 7


@pytest.mark.parametrize("p", [0.05, 0.5, 0.999, 1.0])
def test_dropout_leaves_its_share_and_follows_the_generator(p: float) -> None:
    x = torch.zeros(1001, 999)
    torch.manual_seed(3)
    kept = _kept(x, p)
    assert (
        kept.shape == x.shape
        and abs(float(kept.float().mean()) - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-16
    )
    # Neighbours come from one random number: they must not go together.
    both = float((kept[:, :-1] & kept[:, 1:]).float().mean())
    assert abs(both - (1 - p) ** 2) < 0.002
    assert not torch.equal(_kept(x, p), kept)
    torch.manual_seed(3)
    assert torch.equal(_kept(x, p), kept)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_fused_dropout_is_that_of_its_mask(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(lora_dropout=0.25).train(), torch.randn(4, 6, 7, requires_grad=True)
    masks: list[torch.Tensor] = []

    def remembered(x: torch.Tensor, p: float) -> torch.Tensor:
        masks.append(_kept(x, p))
        return masks[-1]

    monkeypatch.setattr("unisd.kernels.lora._kept", remembered)

    with fused_lora(model):
        ours = gradients(model, x, checkpointing)
    assert len(masks) == (4 if checkpointing else 2)
    assert all(torch.equal(a, b) for a, b in zip(masks[:2], masks[-2:], strict=True))  # drawn again, the same
    used = iter([*masks])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.forward = lambda value: value * next(used) / 0.75  # type: ignore[method-assign]
    for a, b in zip(ours, gradients(model, x, checkpointing), strict=True):
        assert_close(a, b)
    assert any(not mask.all() for mask in masks)
