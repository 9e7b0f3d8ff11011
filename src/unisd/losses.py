"""The loss of a micro-batch from hidden states: plain (the readable reference) and chunked (what training runs).

`plain_loss` builds every `[N,V]` tensor over the equations of :mod:`unisd.divergences` and leaves the gradient to
autograd: the oracle of the tests. `chunked_loss` gives the same loss and gradients, but projects the hidden states chunk
by chunk and takes the gradient with respect to the student's hidden states *in the forward pass*: nothing is recomputed,
and no `[N,V]` tensor is ever held.

Both return a *sum*: `coefficient_N` already holds mask, reliability weights and the normaliser of the whole optimizer
step, so the loss does not depend on how the step is cut into micro-batches or spread over ranks (see
:func:`unisd.mechanisms.step_coefficients`).

Shapes: N loss tokens of a micro-batch, V vocabulary, H hidden size (student's and teacher's may differ), C tokens of a
chunk. Notation: p student, q teacher, M their mixture; l log-probability of the realised token; values in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unisd.divergences import (
    Contrast,
    DivergenceSpec,
    Head,
    check_token_clip,
    contrast_hinge,
    divergence,
    divergence_bound,
    divergence_of_logp,
    entropy,
    log_probs,
    pick,
)
from unisd.targets import TargetStates

__all__ = [
    "Contrast",
    "DivergenceSpec",
    "Head",
    "LossOutput",
    "check_token_clip",
    "chunked_loss",
    "contrast_hinge",
    "default_chunk_tokens",
    "divergence",
    "divergence_bound",
    "plain_loss",
    "token_logprobs",
    "token_scores",
]

# From (D, l, H(p)) [N] of all tokens, without gradient, to a factor [N] of their coefficients: weights that look at the student
Reweigh = Callable[[Tensor, Tensor, Tensor], Tensor]

CHUNK_BYTES = 96 * 2**20
"""Most bytes of one [C,V] float32 tensor on a CPU; a chunk holds two of them, of the student and of the teacher. Each product reads the
whole head, so that few rows at a time are slow: at V = 152k and H = 896, 31.0 ms a token for the three products of a chunk of 82 tokens
and 28.0 for 164 (one AVX2 core)."""
BLOCK_BYTES = 2 * 2**20
"""On a CPU the arithmetic between the products goes through a chunk in row blocks of this size, which stay in the cache."""
LARGEST_CHUNK_BYTES = 512 * 2**20
"""The same on an accelerator, which needs more rows per product to be busy and holds four of them (mixture: five) at a time; there
also at most 1/64 of its memory."""


@dataclass(frozen=True, eq=False)
class LossOutput:
    """Loss of a micro-batch and, detached, its per-token quantities at the distillation temperature."""

    loss: Tensor  # [] differentiable; a sum, normalised by the coefficients
    divergence_N: Tensor  # D after the entry clip, before the token clip
    student_logp_N: Tensor  # l
    student_entropy_N: Tensor  # H(p)
    teacher_logp_N: Tensor  # l+
    clipped_N: Tensor  # bool: D exceeds the token clip, gradient zero
    contrast_active_N: Tensor | None  # bool: the hinge has a gradient (l between l- and l+); None without contrast
    contrast_N: Tensor | None  # h


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Everything a loss is made of, for N tokens or for the C tokens of a chunk."""

    student_hidden_NH: Tensor
    student_head: Head
    teacher_hidden_NH: Tensor
    teacher_head: Head
    targets_N: Tensor
    spec: DivergenceSpec
    coefficient_N: Tensor
    token_clip: float | None
    contrast: Contrast | None
    target: TargetStates | None = None
    reweigh: Reweigh | None = None

    def rows(self, rows: slice) -> _Inputs:
        return replace(
            self,
            student_hidden_NH=self.student_hidden_NH[rows],
            teacher_hidden_NH=self.teacher_hidden_NH[rows],
            targets_N=self.targets_N[rows],
            coefficient_N=self.coefficient_N[rows],
            contrast=None if self.contrast is None else self.contrast.rows(rows),
            target=None if self.target is None else self.target.rows(rows),
        )

    def divided_by(self, unit: Tensor) -> _Inputs:
        contrast = self.contrast
        if contrast is not None:
            contrast = replace(contrast, coefficient_N=contrast.coefficient_N / unit)
        return replace(self, coefficient_N=self.coefficient_N / unit, contrast=contrast)


@dataclass(frozen=True, eq=False)
class _TokenTerms:
    """What follows from D and l of each token, the same for the plain and the chunked form."""

    loss: Tensor
    clipped_N: Tensor
    hinge_N: Tensor | None
    slope_divergence_N: Tensor  # d loss / d D
    slope_logp_N: Tensor | None  # d loss / d l, from the contrast

    def output(self, loss: Tensor, divergence_N: Tensor, logp_N: Tensor, entropy_N: Tensor, teacher_logp_N: Tensor) -> LossOutput:
        active_N = None if self.slope_logp_N is None else self.slope_logp_N != 0
        hinge_N = None if self.hinge_N is None else self.hinge_N.detach()
        values = (divergence_N.detach(), logp_N.detach(), entropy_N.detach(), teacher_logp_N)
        return LossOutput(loss, *values, self.clipped_N, active_N, hinge_N)


def _token_terms(inputs: _Inputs, divergence_N: Tensor, logp_N: Tensor, teacher_logp_N: Tensor) -> _TokenTerms:
    """`sum_N coefficient * min(D, token_clip) + sum_N contrast.coefficient * h`, and its slopes."""
    cap = math.inf if inputs.token_clip is None else inputs.token_clip
    clipped_N = divergence_N.detach() > cap
    loss = (inputs.coefficient_N * divergence_N.clamp(max=cap)).sum()
    slope_divergence_N = torch.where(clipped_N, 0.0, inputs.coefficient_N).to(divergence_N.dtype)
    contrast = inputs.contrast
    if contrast is None:
        return _TokenTerms(loss, clipped_N, None, slope_divergence_N, None)
    contrast = contrast.against(teacher_logp_N)
    assert contrast.teacher_logp_N is not None
    hinge_N = contrast_hinge(logp_N, contrast)
    loss = loss + (contrast.coefficient_N * hinge_N).sum()
    l_N = logp_N.detach()
    direction_N = (l_N - contrast.teacher_logp_N).sign() - (l_N - contrast.negative_logp_N).sign()
    slope_logp_N = torch.where(hinge_N.detach() > 0, contrast.coefficient_N * direction_N, 0.0).to(logp_N.dtype)
    return _TokenTerms(loss, clipped_N, hinge_N, slope_divergence_N, slope_logp_N)


def plain_loss(
    student_hidden_NH: Tensor,
    student_head: Head,
    teacher_hidden_NH: Tensor,
    teacher_head: Head,
    targets_N: Tensor,
    spec: DivergenceSpec,
    coefficient_N: Tensor,
    token_clip: float | None = None,
    contrast: Contrast | None = None,
    *,
    target: TargetStates | None = None,
    reweigh: Reweigh | None = None,
) -> LossOutput:
    """`sum_N coefficient * min(D, token_clip) + sum_N contrast.coefficient * h`, its gradient by autograd.

    targets_N: the realised tokens. coefficient_N: constants, no gradient (see the module). token_clip: cap on a token's
    D in nats; above it the gradient is zero. target: takes the place of the teacher's distribution in D. reweigh: gives a further
    factor of each coefficient, from the values of this very pass. N = 0 gives exactly zero, still attached to the graph.
    """
    inputs = _Inputs(
        student_hidden_NH, student_head, teacher_hidden_NH, teacher_head, targets_N, spec, coefficient_N, token_clip, contrast,
        target,
    )  # fmt: skip
    student_logp_NV = log_probs(student_head.logits(student_hidden_NH), spec.temperature)
    own_NV, teacher_logp_NV = _teacher_logp(inputs, student_logp_NV)
    own_N = pick(own_NV, targets_N)
    divergence_N = divergence_of_logp(student_logp_NV, teacher_logp_NV, targets_N, spec)
    logp_N, entropy_N = pick(student_logp_NV, targets_N), entropy(student_logp_NV.detach())
    if reweigh is not None:
        factor_N = reweigh(divergence_N.detach(), logp_N.detach(), entropy_N)
        inputs = replace(inputs, coefficient_N=inputs.coefficient_N * factor_N)
    terms = _token_terms(inputs, divergence_N, logp_N, own_N)
    return terms.output(terms.loss, divergence_N, logp_N, entropy_N, own_N)


def chunked_loss(
    student_hidden_NH: Tensor,
    student_head: Head,
    teacher_hidden_NH: Tensor,
    teacher_head: Head,
    targets_N: Tensor,
    spec: DivergenceSpec,
    coefficient_N: Tensor,
    token_clip: float | None = None,
    contrast: Contrast | None = None,
    chunk_tokens: int | None = None,
    *,
    target: TargetStates | None = None,
    reweigh: Reweigh | None = None,
) -> LossOutput:
    """:func:`plain_loss` without any `[N,V]` tensor: same loss, same gradients (also of a trainable head).

    The gradient is taken in the forward pass; backward only multiplies it by what comes in, and is not differentiable
    again. Under `torch.no_grad` only values are computed. `chunk_tokens` defaults to :func:`default_chunk_tokens`.

    With `reweigh` and a frozen head the coefficients are multiplied in at the end, so that it costs nothing. A head that is trained
    sums over tokens, and must know them before: a first sweep without gradient finds the values.
    """
    tracked = (student_hidden_NH, student_head.weight, student_head.bias)
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tracked)
    chunk = chunk_tokens or default_chunk_tokens(student_head.weight.shape[0], student_hidden_NH.device)
    if reweigh is not None and (wanted[1] or wanted[2] or contrast is not None):
        with torch.no_grad():
            known = chunked_loss(
                student_hidden_NH, student_head, teacher_hidden_NH, teacher_head, targets_N, spec, coefficient_N,
                chunk_tokens=chunk, target=target,
            )  # fmt: skip
        factor_N = reweigh(known.divergence_N, known.student_logp_N, known.student_entropy_N)
        coefficient_N, reweigh = coefficient_N * factor_N, None
    inputs = _Inputs(
        student_hidden_NH, student_head, teacher_hidden_NH, teacher_head, targets_N, spec, coefficient_N, token_clip, contrast,
        target, reweigh,
    )  # fmt: skip
    loss, *values = _ChunkedLoss.apply(*tracked, inputs, chunk, wanted)  # type: ignore[no-untyped-call]
    divergence_N, logp_N, entropy_N, teacher_logp_N = values
    terms = _token_terms(inputs, divergence_N, logp_N, teacher_logp_N)
    return terms.output(loss, divergence_N, logp_N, entropy_N, teacher_logp_N)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        inputs: _Inputs,
        chunk: int,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor, ...]:
        """The first three are those of `inputs`, named apart because autograd sees only tensors that are arguments."""
        device, tokens = hidden_NH.device, len(hidden_NH)
        full = torch.promote_types(weight_VH.dtype, torch.float32)  # float32, or float64 when given

        def gradient_of(x: Tensor | None, want: bool, dtype: torch.dtype) -> Tensor | None:
            return torch.zeros(x.shape, dtype=dtype, device=device) if x is not None and want else None

        # What is summed over chunks is summed in float32: rounding each chunk's share to bf16 first biases training.
        grad_hidden_NH = gradient_of(hidden_NH, wanted[0], _kept_dtype(hidden_NH))
        grad_weight_VH = gradient_of(weight_VH, wanted[1], full)
        grad_bias_V = gradient_of(bias_V, wanted[2], full)
        values_4N = torch.empty(4, tokens, dtype=full, device=device)

        # Coefficients are about 1 / (tokens of the step). Divided by the largest, the gradient in the logits is of order
        # one and survives float16 in front of the matrix products, which are multiplied back in full precision.
        coefficients = [inputs.coefficient_N] + ([] if inputs.contrast is None else [inputs.contrast.coefficient_N])
        unit = torch.cat([torch.zeros(1, dtype=full, device=device)] + [c.to(full).abs() for c in coefficients]).amax()
        unit = torch.where(unit > 0, unit, 1.0)

        head = _autocast_head(inputs.student_head)
        scaled = replace(inputs.divided_by(unit), student_head=head, teacher_head=_autocast_head(inputs.teacher_head))
        if inputs.target is not None:
            scaled = replace(scaled, target=inputs.target.with_heads(_autocast_head))
        if inputs.reweigh is not None:  # every token's gradient for itself; multiplied by its coefficient below
            unit, scaled = torch.ones_like(unit), replace(scaled, coefficient_N=torch.ones(tokens, dtype=full, device=device))
        with torch.autocast(device.type, enabled=False):
            for start in range(0, tokens, chunk):
                rows = slice(start, start + chunk)
                part = scaled.rows(rows)
                form = _closed_form if part.spec.mode == "full" else _by_autograd
                values, grad_CV = form(part, any(wanted))
                values_4N[:, rows] = torch.stack(values)
                if grad_CV is None:
                    continue
                if grad_bias_V is not None:
                    grad_bias_V += grad_CV.sum(0)
                if grad_weight_VH is not None:
                    _add_outer(grad_weight_VH, grad_CV, part.student_hidden_NH.to(head.weight.dtype))
                if grad_hidden_NH is not None:
                    grad_hidden_NH[rows] = _times_head(grad_CV, head.weight).to(full) * unit
                del grad_CV  # before the next chunk's tensors, not after
            divergence_N, logp_N, entropy_N, teacher_logp_N = values_4N.unbind()
            if inputs.reweigh is not None:
                coefficient_N = inputs.coefficient_N * inputs.reweigh(divergence_N, logp_N, entropy_N)
                inputs = replace(inputs, coefficient_N=coefficient_N)
                if grad_hidden_NH is not None:
                    grad_hidden_NH *= coefficient_N[:, None]
        ctx.dtypes = (hidden_NH.dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype)
        ctx.save_for_backward(
            grad_hidden_NH,
            None if grad_weight_VH is None else grad_weight_VH.mul_(unit).to(_kept_dtype(weight_VH)),
            None if grad_bias_V is None or bias_V is None else grad_bias_V.mul_(unit).to(_kept_dtype(bias_V)),
        )
        loss = _token_terms(inputs, divergence_N, logp_N, teacher_logp_N).loss
        ctx.mark_non_differentiable(divergence_N, logp_N, entropy_N, teacher_logp_N)
        return loss, divergence_N, logp_N, entropy_N, teacher_logp_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*(None if grad is None else (grad * grad_loss).to(dtype) for grad, dtype in grads), None, None, None)


# A chunk's (D, l, H(p), l+), each [C], and the gradient [C,V] of its loss in the student's projected hidden states
_ChunkResult = tuple[tuple[Tensor, ...], Tensor | None]


def _closed_form(part: _Inputs, want_gradient: bool) -> _ChunkResult:
    """Mode `full`: both projections at once, then row block by row block; the gradient takes the place of the student's logits."""
    student_CV = part.student_head.project(part.student_hidden_NH)
    teacher_CV = part.teacher_head.project(part.teacher_hidden_NH).to(student_CV.dtype)
    blocks = _row_blocks(student_CV)
    # One set of scratch rows for all blocks: on a CPU, getting fresh memory costs more than what is computed in it.
    scratch = student_CV.new_empty(2 if part.spec.alpha in (0.0, 1.0) else 3, *student_CV[blocks[0]].shape)
    collected = [
        _closed_form_of(part.rows(rows), student_CV[rows], teacher_CV[rows], scratch[:, : rows.stop - rows.start], want_gradient)
        for rows in blocks
    ]
    return tuple(map(torch.cat, zip(*collected, strict=True))), student_CV if want_gradient else None


def _row_blocks(x_CV: Tensor) -> list[slice]:
    """Rows of a chunk that are worked on together: all, or on a CPU as many as the cache holds."""
    tokens, vocabulary = x_CV.shape
    size = tokens if x_CV.device.type != "cpu" else BLOCK_BYTES // (vocabulary * x_CV.element_size())
    size = max(size, 1)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _closed_form_of(
    part: _Inputs, student_CV: Tensor, teacher_CV: Tensor, scratch: Tensor, want_gradient: bool
) -> tuple[Tensor, ...]:
    """With s_v the summands of D and r_v = ds_v/dp_v (0 where clipped), dD/dz = p (r - <p, r>). Returns (D, l, H(p), l+).

    Both projections are overwritten, the student's by the gradient. scratch: two or three more [C,V].
    """
    head, spec = part.student_head, part.spec
    cap_slope_CV = None if head.softcap is None else 1.0 - (head.shape_logits(student_CV) / head.softcap) ** 2
    logp_CV = _log_probs_in_place(head, student_CV, spec.temperature)
    p_CV = torch.exp(logp_CV, out=scratch[0])
    logp_C, entropy_C = pick(logp_CV, part.targets_N), -torch.mul(p_CV, logp_CV, out=scratch[1]).sum(-1)
    logq_CV = _log_probs_in_place(part.teacher_head, teacher_CV, spec.temperature)
    teacher_logp_C = pick(logq_CV, part.targets_N)
    if part.target is not None:
        logq_CV = part.target.logp(logp_CV, logq_CV, part.targets_N, spec)

    divergence_C, pr_CV, pr_C1 = _sums_and_slopes(p_CV, logp_CV, logq_CV, scratch[1:], spec)
    values = (divergence_C, logp_C, entropy_C, teacher_logp_C)
    if not want_gradient:
        return values

    terms = _token_terms(part, divergence_C, logp_C, teacher_logp_C)
    inner = head.scale / spec.temperature  # from the softmax's argument back to the projection
    slope_C1 = terms.slope_divergence_N[:, None] * inner
    p_slope_C1 = slope_C1 * pr_C1
    l_slope_C1 = None if terms.slope_logp_N is None else terms.slope_logp_N[:, None] * inner
    if l_slope_C1 is not None:  # dl/dz = onehot - p
        p_slope_C1 = p_slope_C1 + l_slope_C1
    grad_CV = torch.mul(pr_CV, slope_C1, out=student_CV).addcmul_(p_CV, p_slope_C1, value=-1.0)
    if l_slope_C1 is not None:
        grad_CV.scatter_add_(-1, part.targets_N[:, None], l_slope_C1)
    if cap_slope_CV is not None:
        grad_CV.mul_(cap_slope_CV)
    return values


def _log_probs_in_place(head: Head, projected_CV: Tensor, temperature: float) -> Tensor:
    """log softmax of the head's logits / temperature, in the memory of the projection."""
    if head.softcap is not None:
        projected_CV.copy_(head.shape_logits(projected_CV))
    elif head.scale != 1.0:
        projected_CV.mul_(head.scale)
    if temperature != 1.0:
        projected_CV.div_(temperature)
    return torch.log_softmax(projected_CV, -1, out=projected_CV)


def _sums_and_slopes(
    p_CV: Tensor, logp_CV: Tensor, logq_CV: Tensor, scratch: Tensor, spec: DivergenceSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """D [C], p * ds/dp [C,V] (finite where p underflows) and its sum over V [C,1]. Overwrites both logs."""
    alpha = spec.alpha
    if alpha == 0.0:  # s = q log(q/p), p ds/dp = -q
        q_CV = torch.exp(logq_CV, out=scratch[0])
        summand_CV = logq_CV.sub_(logp_CV).mul_(q_CV)
        pr_CV = torch.neg(q_CV, out=logp_CV)
    elif alpha == 1.0:  # s = p log(p/q), p ds/dp = s + p
        summand_CV = torch.sub(logp_CV, logq_CV, out=logq_CV).mul_(p_CV)
        pr_CV = torch.add(summand_CV, p_CV, out=logp_CV)
    else:  # s = alpha q log(q/M) + (1-alpha) p log(p/M), p ds/dp = (1-alpha) p log(p/M). M = 0 only where p = q = 0.
        q_CV = torch.exp(logq_CV, out=scratch[0])
        mixture_CV = torch.mul(p_CV, 1.0 - alpha, out=scratch[1]).add_(q_CV, alpha=alpha)
        logm_CV = mixture_CV.clamp_(min=torch.finfo(p_CV.dtype).tiny).log_()
        pr_CV = logp_CV.sub_(logm_CV).mul_(p_CV).mul_(1.0 - alpha)
        logq_CV.sub_(logm_CV)
        if spec.entry_clip is None:  # the sums alone
            pr_C1 = pr_CV.sum(-1, keepdim=True)
            return logq_CV.mul_(q_CV).sum(-1).mul_(alpha).add_(pr_C1.squeeze(-1)), pr_CV, pr_C1
        summand_CV = logq_CV.mul_(q_CV).mul_(alpha).add_(pr_CV)
    if spec.entry_clip is not None:
        pr_CV.masked_fill_(summand_CV >= spec.entry_clip, 0.0)
        summand_CV.clamp_(max=spec.entry_clip)
    return summand_CV.sum(-1), pr_CV, pr_CV.sum(-1, keepdim=True)


def _by_autograd(part: _Inputs, want_gradient: bool) -> _ChunkResult:
    """Any mode, by autograd over one chunk's logits."""
    spec = part.spec
    projected_CV = part.student_head.project(part.student_hidden_NH).requires_grad_(want_gradient)
    with torch.set_grad_enabled(want_gradient):
        logp_CV = log_probs(part.student_head.shape_logits(projected_CV), spec.temperature)
        own_CV, logq_CV = _teacher_logp(part, logp_CV)
        divergence_C = divergence_of_logp(logp_CV, logq_CV, part.targets_N, spec)
        logp_C, teacher_logp_C = pick(logp_CV, part.targets_N), pick(own_CV, part.targets_N)
        loss = _token_terms(part, divergence_C, logp_C, teacher_logp_C).loss
    values = (divergence_C.detach(), logp_C.detach(), entropy(logp_CV.detach()), teacher_logp_C)
    return values, torch.autograd.grad(loss, projected_CV)[0] if want_gradient else None


@torch.no_grad()
def _teacher_logp(part: _Inputs, student_logp_CV: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's own log-probabilities, and the target's where there is one; the student's where no teacher is asked."""
    if part.spec.mode == "nll":
        return student_logp_CV.detach(), student_logp_CV.detach()
    own_CV = log_probs(part.teacher_head.logits(part.teacher_hidden_NH), part.spec.temperature)
    return own_CV, own_CV if part.target is None else part.target.logp(student_logp_CV, own_CV, part.targets_N, part.spec)


def chunk_bytes(device: torch.device | None = None) -> int:
    """Most bytes of one [C,V] float32 tensor on a device (default: a CPU)."""
    if device is None or device.type != "cuda":
        return CHUNK_BYTES
    return max(CHUNK_BYTES, min(LARGEST_CHUNK_BYTES, torch.cuda.get_device_properties(device).total_memory // 64))


def default_chunk_tokens(vocabulary: int, device: torch.device | None = None) -> int:
    """Tokens of a chunk whose [C,V] float32 tensor takes `chunk_bytes(device)`."""
    return max(1, chunk_bytes(device) // (4 * vocabulary))


def _autocast_head(head: Head) -> Head:
    """The head in autocast's dtype, cast once for all chunks; autocast leaves float64 alone."""
    device = head.weight.device.type
    if not torch.is_autocast_enabled(device) or head.weight.dtype == torch.float64:
        return head
    return replace(head, weight=head.weight.to(torch.get_autocast_dtype(device)))


def _add_outer(total_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor) -> None:
    """total += grad.T @ hidden, in the total's precision."""
    half = hidden_CH.dtype in (torch.float16, torch.bfloat16)
    if total_VH.is_cuda and half and torch.__version__ >= "2.8":  # tensor cores that add up in float32
        torch.addmm(total_VH, grad_CV.to(hidden_CH.dtype).T, hidden_CH, out_dtype=torch.float32, out=total_VH)
    else:
        total_VH.addmm_(grad_CV.T, hidden_CH.to(total_VH.dtype))


def _times_head(grad_CV: Tensor, weight_VH: Tensor) -> Tensor:
    """grad @ weight; on a CPU from the left, which took 7 to 10 % less there."""
    grad_CV = grad_CV.to(weight_VH.dtype)
    return grad_CV @ weight_VH if grad_CV.is_cuda else (weight_VH.T @ grad_CV.T).T


def _kept_dtype(like: Tensor) -> torch.dtype:
    """A gradient waits for backward in its own dtype; one of float16 in float32: the loss scale has yet to come."""
    return torch.float32 if like.dtype == torch.float16 else like.dtype


def _scores(
    hidden_NH: Tensor, head: Head, targets_N: Tensor, temperature: float, chunk_tokens: int | None, want_entropy: bool
) -> tuple[Tensor, Tensor]:
    chunk = chunk_tokens or default_chunk_tokens(head.weight.shape[0], hidden_NH.device)
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    logp_N, entropy_N = torch.empty(2, len(hidden_NH), dtype=dtype, device=hidden_NH.device)
    head = _autocast_head(head)
    with torch.no_grad(), torch.autocast(hidden_NH.device.type, enabled=False):
        for start in range(0, len(hidden_NH), chunk):
            rows = slice(start, start + chunk)
            projected_CV = head.project(hidden_NH[rows])
            blocks = _row_blocks(projected_CV)
            scratch_RV = torch.empty_like(projected_CV[blocks[0]]) if want_entropy else projected_CV
            for block in blocks:
                chosen = slice(start + block.start, start + block.stop)
                logp_RV = _log_probs_in_place(head, projected_CV[block], temperature)
                logp_N[chosen] = pick(logp_RV, targets_N[chosen])
                if want_entropy:
                    p_RV = torch.exp(logp_RV, out=scratch_RV[: len(logp_RV)])
                    entropy_N[chosen] = -p_RV.mul_(logp_RV).sum(-1)
            del projected_CV  # before the next chunk's, not after
    return logp_N, entropy_N


def token_logprobs(
    hidden_NH: Tensor, head: Head, targets_N: Tensor, temperature: float = 1.0, chunk_tokens: int | None = None
) -> Tensor:
    """Log-probability [N] of the realised tokens, without gradient and chunk by chunk: never holds [N,V]."""
    return _scores(hidden_NH, head, targets_N, temperature, chunk_tokens, want_entropy=False)[0]


def token_scores(
    hidden_NH: Tensor, head: Head, targets_N: Tensor, temperature: float = 1.0, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`token_logprobs` and the entropy [N] of the distribution they come from, in nats."""
    return _scores(hidden_NH, head, targets_N, temperature, chunk_tokens, want_entropy=True)
