"""With every mechanism off, the loss and its gradients are TRL's: SDFT (per sequence) and the
chunked kernel (per token).

TRL's names: `distillation_alpha` and `beta` are both our alpha (0 forward KL, 1 reverse KL, mixture
(1-alpha) p + alpha q). SDFT divides the logits by the temperature before its loss; the kernel takes
the temperature. Its sampled mode reports (l - l+) * l as value, ours l - l+; the gradients are the
same.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", reason="TRL is the oracle here: pip install 'unisd[dev]'")

from trl.experimental.sdft import loss_utils
from trl.experimental.sdft.sdft_trainer import SDFTTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from unisd.losses.chunked import chunked_loss
from unisd.losses.head import Head
from unisd.losses.plain import plain_loss
from unisd.losses.terms import LossInputs
from unisd.methods.aggregation import step_coefficients
from unisd.methods.divergence import DivergenceSpec

ALPHAS = [0.0, 0.5, 1.0]
B, T, H, V = 4, 6, 16, 50


def tensors() -> SimpleNamespace:
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(T) < torch.tensor([[6], [3], [5], [1]])
    return SimpleNamespace(
        mask=mask,
        hidden=torch.randn(B, T, H, generator=g).requires_grad_(),
        weight=torch.randn(V, H, generator=g).mul_(0.5).requires_grad_(),
        bias=torch.randn(V, generator=g).requires_grad_(),
        teacher_hidden=torch.randn(B, T, H, generator=g),
        teacher_weight=torch.randn(V, H, generator=g).mul_(0.5),
        targets=torch.randint(V, (B, T), generator=g),
    )


def ours(
    function: object, x: SimpleNamespace, spec: DivergenceSpec, aggregation: str, **head: float
) -> tuple[Tensor, ...]:
    coefficient = step_coefficients(x.mask, torch.ones(B, T), torch.ones(B), aggregation, "weights")
    inputs = LossInputs(
        x.hidden[x.mask],
        Head(x.weight, x.bias, **head),
        x.teacher_hidden[x.mask],
        Head(x.teacher_weight, **head),
        x.targets[x.mask],
        spec,
        coefficient[x.mask],
    )
    out = function(inputs)  # type: ignore[operator]
    return out.loss, *torch.autograd.grad(out.loss, (x.hidden, x.weight, x.bias))


def sdft(x: SimpleNamespace, spec: DivergenceSpec) -> Tensor:
    """TRL's own method, on its own masking and reduction, with just enough of a trainer around
    it.
    """
    names = {"full": "full_logits", "topk": "topk_logits", "sampled": "sampled_token"}
    trainer = SimpleNamespace(
        args=SimpleNamespace(
            distillation_mode=names[spec.mode],
            distillation_alpha=spec.alpha,
            distillation_topk=spec.topk,
            distillation_add_tail=spec.add_tail,
            distillation_is_clip=None,
        ),
        accelerator=SimpleNamespace(gather=lambda value: value),
        _log_self_distillation_metric=lambda mode, value: None,
    )
    logits = SimpleNamespace(
        student_logits=(x.hidden @ x.weight.T + x.bias) / spec.temperature,
        teacher_logits=(x.teacher_hidden @ x.teacher_weight.T) / spec.temperature,
        completion_ids=x.targets,
        loss_mask=x.mask.float(),
    )
    return SDFTTrainer._compute_self_distillation_loss(trainer, SimpleNamespace(training=True), {}, logits)


def assert_same(found: tuple[Tensor, ...], loss: Tensor, x: SimpleNamespace) -> None:
    for a, b in zip(found, (loss, *torch.autograd.grad(loss, (x.hidden, x.weight, x.bias))), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [plain_loss, chunked_loss])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sdft_full(function: object, alpha: float, temperature: float) -> None:
    x, spec = tensors(), DivergenceSpec(alpha=alpha, temperature=temperature)
    assert_same(ours(function, x, spec, "sequence"), sdft(x, spec), x)


@pytest.mark.parametrize("function", [plain_loss, chunked_loss])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("add_tail", [True, False])
def test_sdft_topk(function: object, alpha: float, add_tail: bool) -> None:
    x, spec = (
        tensors(),
        DivergenceSpec(alpha=alpha, mode="topk", topk=7, add_tail=add_tail, topk_support="student"),
    )
    assert_same(ours(function, x, spec, "sequence"), sdft(x, spec), x)


@pytest.mark.parametrize("function", [plain_loss, chunked_loss])
def test_sdft_sampled_gradient(function: object) -> None:
    x, spec = tensors(), DivergenceSpec(alpha=1.0, mode="sampled")
    found, loss = ours(function, x, spec, "sequence"), sdft(x, spec)
    assert_same((loss, *found[1:]), loss, x)


@pytest.mark.parametrize("function", [plain_loss, chunked_loss])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("head", [{}, {"scale": 0.5, "softcap": 4.0}], ids=str)
def test_chunked_kernel(function: object, alpha: float, head: dict) -> None:
    x, spec = tensors(), DivergenceSpec(alpha=alpha, temperature=0.7)
    scale, softcap = head.get("scale", 1.0), head.get("softcap")
    loss, entropy_sum, tokens = _chunked_divergence_loss(
        x.hidden,
        x.teacher_hidden,
        x.weight,
        x.teacher_weight,
        x.mask.long(),
        beta=alpha,
        num_items_in_batch=int(x.mask.sum()),
        student_lm_head_bias=x.bias,
        student_logit_scale=scale,
        teacher_logit_scale=scale,
        student_final_logit_softcapping=softcap,
        teacher_final_logit_softcapping=softcap,
        temperature=0.7,
    )
    assert tokens.item() == x.mask.sum().item()
    assert_same(ours(function, x, spec, "token", **head), loss, x)
    with torch.no_grad():
        inputs = LossInputs(
            x.hidden[x.mask], Head(x.weight, x.bias, **head), x.teacher_hidden[x.mask],
            Head(x.teacher_weight, **head), x.targets[x.mask], spec, torch.ones(int(x.mask.sum())),
        )  # fmt: skip
        out = function(inputs)  # type: ignore[operator]
    torch.testing.assert_close(out.student_entropy_N.sum(), entropy_sum, rtol=1e-5, atol=1e-5)


def test_direction_is_not_swapped() -> None:
    """The same on TRL's lowest function, so that a swap of alpha on both sides of a wrapper cannot
    hide.
    """
    x = tensors()
    p, q = (
        (x.hidden @ x.weight.T + x.bias).log_softmax(-1),
        (x.teacher_hidden @ x.teacher_weight.T).log_softmax(-1),
    )
    forward, reverse = (
        loss_utils.compute_divergence(p, q, alpha)[x.mask].sum().item() for alpha in (0.0, 1.0)
    )
    assert abs(forward - reverse) > 0.1
    assert forward == pytest.approx((q.exp() * (q - p)).sum(-1)[x.mask].sum().item(), rel=1e-5)
