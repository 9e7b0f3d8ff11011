"""A random problem for the losses, and its solution."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from unisd.losses.head import Head
from unisd.losses.terms import LossInputs, LossTerm
from unisd.methods.divergence import DivergenceSpec, log_probs
from unisd.methods.registry import parse_term

F64 = torch.float64


def problem(
    dtype: torch.dtype = torch.float32, tokens: int = 13, vocabulary: int = 37, seed: int = 0, **head: Any
) -> SimpleNamespace:
    """Random hidden states, trainable head with bias, teacher of another width, mixed coefficients,
    partly negatives.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64).to(dtype)

    value = SimpleNamespace(
        hidden=normal(tokens, 16).requires_grad_(),
        weight=(normal(vocabulary, 16) * 0.7).requires_grad_(),
        bias=normal(vocabulary).requires_grad_(),
        teacher_hidden=normal(tokens, 24),
        teacher=Head(normal(vocabulary, 24) * 0.4, normal(vocabulary), **head),
        targets=torch.randint(vocabulary, (tokens,), generator=g),
        coefficient=torch.rand(tokens, generator=g, dtype=F64).to(dtype) / 50,
        head=head,
    )
    value.coefficient[::5] = 0.0
    with torch.no_grad():
        student_l = log_probs(Head(value.weight, value.bias, **head).logits(value.hidden), 1.0)
        student_l = student_l.gather(-1, value.targets[:, None])[:, 0]
    negatives = student_l - 0.4
    negatives[1::4] = math.nan
    value.contrast = LossTerm(
        parse_term("contrast:margin=0.5"),
        coefficient_N=torch.where(negatives.isnan(), 0.0, 0.013).to(dtype),
        negative_logp_N=negatives,
    )
    return value


def run(
    loss_function: object,
    x: SimpleNamespace,
    spec: DivergenceSpec,
    scale: float = 1.7,
    chunk_tokens: int | None = None,
    **options: object,
) -> tuple:
    student = Head(x.weight, x.bias, **x.head)
    inputs = LossInputs(
        x.hidden, student, x.teacher_hidden, x.teacher, x.targets, spec, x.coefficient, **options
    )
    out = loss_function(*(inputs,) if chunk_tokens is None else (inputs, chunk_tokens))  # type: ignore[operator]
    leaves = [leaf for leaf in (x.hidden, x.weight, x.bias) if leaf is not None and leaf.requires_grad]
    return out, torch.autograd.grad(out.loss * scale, leaves)
