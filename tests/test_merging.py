"""Adapters merged where no gradient is asked for: the same results, and no trace afterwards."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

from unisd.merging import mergeable, merged_lora


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
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules=["first"], init_lora_weights=False))
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
