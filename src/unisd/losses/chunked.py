"""The loss of a micro-batch from hidden states: plain (the readable reference) and chunked (what
training runs).

`plain_loss` builds every `[N,V]` tensor over the equations of :mod:`unisd.methods.divergence` and
leaves the gradient to autograd: the oracle of the tests. `chunked_loss` gives the same loss and
gradients, but projects the hidden states chunk by chunk and takes the gradient with respect to the
student's hidden states *in the forward pass*: nothing is recomputed, and no `[N,V]` tensor is ever
held.

Both return a *sum*: `coefficient_N` already holds mask, reliability weights and the normaliser of
the whole optimizer step, so the loss does not depend on how the step is cut into micro-batches or
spread over ranks (see :func:`unisd.methods.aggregation.step_coefficients`).

Shapes: N loss tokens of a micro-batch, V vocabulary, H hidden size (student's and teacher's may
differ), C tokens of a chunk. Notation: p student, q teacher, M their mixture; l log-probability of
the realised token; values in nats.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unisd.kernels import cpu_memory as heap
from unisd.kernels.cpu_linear import ROW_MULTIPLE, add_matmul_tn, matmul_nt
from unisd.losses import triton_kernels as fused
from unisd.losses.closed_form import closed_form, log_probs_in_place, project_into, row_blocks
from unisd.losses.head import Head
from unisd.losses.plain import teacher_logp
from unisd.losses.terms import ChunkResult, LossInputs, LossOutput, output, total
from unisd.methods.divergence import divergence_of_logp, entropy, log_probs, pick

CHUNK_BYTES = 112 * 2**20
"""Most bytes of one [C,V] float32 tensor on a CPU; a chunk holds two of them, of the student and of
the teacher. Each product reads the whole head, so that few rows at a time are slow.
"""
ACCELERATOR_CHUNK_BYTES = 128 * 2**20
"""The same on an accelerator: two in the head's precision where :mod:`unisd.losses.triton_kernels`
does the arithmetic, else four or five in float32.
"""


def chunked_loss(inputs: LossInputs, chunk_tokens: int | None = None) -> LossOutput:
    """:func:`plain_loss` without any `[N,V]` tensor: same loss, same gradients (also of a trainable
    head).

    The gradient is taken in the forward pass; backward only multiplies it by what comes in, and is
    not differentiable again. Under `torch.no_grad` only values are computed. `chunk_tokens`
    defaults to :func:`default_chunk_tokens`.

    With `inputs.deferred` and a frozen head the coefficients are multiplied in at the end, so that
    it costs nothing. A head that is trained sums over tokens, and must know them before: a first
    sweep without gradient finds the values.
    """
    inputs = inputs.with_outcomes()
    hidden_NH, head = inputs.student_hidden_NH, inputs.student_head
    tracked = (hidden_NH, head.weight, head.bias)
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tracked)
    most = chunk_tokens or default_chunk_tokens(head.weight.shape[0], hidden_NH.device)
    chunk = _chunk(len(hidden_NH), most)
    if inputs.deferred is not None and (wanted[1] or wanted[2] or inputs.terms):
        with torch.no_grad():
            bare = replace(inputs, token_clip=None, clipped_N=None, terms=(), deferred=None)
            known = chunked_loss(bare, chunk)
        factor_N = inputs.deferred(known.divergence_N, known.student_logp_N, known.student_entropy_N)
        inputs = replace(inputs, coefficient_N=inputs.coefficient_N * factor_N, deferred=None)
    loss, *values = _ChunkedLoss.apply(*tracked, inputs, chunk, wanted)  # type: ignore[no-untyped-call]
    divergence_N, logp_N, entropy_N, teacher_logp_N = values
    return output(inputs, loss, (divergence_N, logp_N, entropy_N, teacher_logp_N))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        inputs: LossInputs,
        chunk: int,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor, ...]:
        """The first three are those of `inputs`, named apart because autograd sees only tensors
        that are arguments.
        """
        device, tokens = hidden_NH.device, len(hidden_NH)
        full = torch.promote_types(weight_VH.dtype, torch.float32)  # float32, or float64 when given

        def gradient_of(x: Tensor | None, want: bool, dtype: torch.dtype) -> Tensor | None:
            return torch.zeros(x.shape, dtype=dtype, device=device) if x is not None and want else None

        # What is summed over chunks is summed in float32: rounding each chunk's share to bf16 first
        # biases training.
        grad_hidden_NH = gradient_of(hidden_NH, wanted[0], _kept_dtype(hidden_NH))
        grad_weight_VH = gradient_of(weight_VH, wanted[1], full)
        grad_bias_V = gradient_of(bias_V, wanted[2], full)
        found = [torch.empty(4, 0, dtype=full, device=device)]
        scaled, unit = _scaled(inputs, full)
        head = scaled.student_head
        room = _room_for_products(scaled, min(chunk, tokens))
        with torch.autocast(device.type, enabled=False):
            for start in range(0, tokens, chunk):
                rows = slice(start, start + chunk)
                part = scaled.rows(rows)
                if part.spec.mode == "full":
                    values, grad_CV = closed_form(part, any(wanted), room)
                else:
                    values, grad_CV = _by_autograd(part, any(wanted))
                found.append(torch.stack(values).to(full))
                if grad_CV is None:
                    continue
                if grad_bias_V is not None:
                    grad_bias_V += grad_CV.sum(0, dtype=full)
                if grad_weight_VH is not None:
                    _add_outer(grad_weight_VH, grad_CV, part.student_hidden_NH.to(head.weight.dtype))
                if grad_hidden_NH is not None:
                    grad_CH = matmul_nt(grad_CV.to(head.weight.dtype), head.weight.T).to(full)
                    torch.mul(grad_CH, unit, out=grad_hidden_NH[rows])
                del grad_CV  # before the next chunk's tensors, not after
            values_4N = torch.cat(found, dim=1)
            inputs = _with_deferred(inputs, values_4N, grad_hidden_NH)
        if grad_weight_VH is not None:
            if _is_half(head):  # a pass over the whole head
                grad_weight_VH.mul_(unit)
            grad_weight_VH = grad_weight_VH.to(_kept_dtype(weight_VH))
        if grad_bias_V is not None and bias_V is not None:
            grad_bias_V = grad_bias_V.mul_(unit).to(_kept_dtype(bias_V))
        ctx.dtypes = (hidden_NH.dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype)
        ctx.save_for_backward(grad_hidden_NH, grad_weight_VH, grad_bias_V)
        divergence_N, logp_N, entropy_N, teacher_logp_N = values_4N.unbind()
        loss = total(inputs, (divergence_N, logp_N, entropy_N, teacher_logp_N))
        ctx.mark_non_differentiable(divergence_N, logp_N, entropy_N, teacher_logp_N)
        return loss, divergence_N, logp_N, entropy_N, teacher_logp_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # A copy of a trained head's gradient is worth a look at the factor where that does not wait
        # for a device.
        is_one = grad_loss.device.type == "cpu" and float(grad_loss) == 1.0
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = (
            None if grad is None else (grad if is_one else grad * grad_loss).to(dtype)
            for grad, dtype in grads
        )
        return (*scaled, None, None, None)


def _scaled(inputs: LossInputs, full: torch.dtype) -> tuple[LossInputs, Tensor]:
    """What the chunks are computed from, and the unit that their gradients in the hidden states are
    in.

    The heads are in autocast's dtype. In half precision coefficients are about 1 / (tokens of the
    step). Divided by the largest, the gradient in the logits is of order one and survives float16
    in front of the matrix products, which are multiplied back in full precision.
    """
    head, device = _autocast_head(inputs.student_head), inputs.student_hidden_NH.device
    unit = torch.ones((), dtype=full, device=device)
    if _is_half(head):
        coefficients = [inputs.coefficient_N, *(term.coefficient_N for term in inputs.terms)]
        largest = torch.cat(
            [torch.zeros(1, dtype=full, device=device)] + [c.to(full).abs() for c in coefficients]
        ).amax()
        unit = torch.where(largest > 0, largest, unit)
    scaled = replace(
        inputs.divided_by(unit), student_head=head, teacher_head=_autocast_head(inputs.teacher_head)
    )
    if inputs.target is not None:
        scaled = replace(scaled, target=inputs.target.with_heads(_autocast_head))
    if inputs.deferred is not None:  # every token's gradient for itself; multiplied at the end
        ones_N = torch.ones(len(inputs.coefficient_N), dtype=full, device=device)
        return replace(scaled, coefficient_N=ones_N), torch.ones_like(unit)
    return scaled, unit


def _room_for_products(scaled: LossInputs, rows: int) -> Tensor | None:
    """On a CPU a block for the logits of a chunk of both sides, used for all chunks."""
    weight_VH = scaled.student_head.weight
    if weight_VH.device.type != "cpu" or weight_VH.dtype != torch.float32 or scaled.spec.mode != "full":
        return None
    return heap.passing_block((2 * rows, len(weight_VH)), torch.float32)


def _with_deferred(inputs: LossInputs, values_4N: Tensor, grad_hidden_NH: Tensor | None) -> LossInputs:
    """The inputs with the coefficients that deferred weights find from the values; multiplies the
    gradient by them.
    """
    if inputs.deferred is None:
        return inputs
    coefficient_N = inputs.coefficient_N * inputs.deferred(values_4N[0], values_4N[1], values_4N[2])
    if grad_hidden_NH is not None:
        grad_hidden_NH *= coefficient_N[:, None]
    return replace(inputs, coefficient_N=coefficient_N)


def _by_autograd(part: LossInputs, want_gradient: bool) -> ChunkResult:
    """Any mode, by autograd over one chunk's logits."""
    spec = part.spec
    projected_CV = part.student_head.project(part.student_hidden_NH).requires_grad_(want_gradient)
    with torch.set_grad_enabled(want_gradient):
        logits_CV = part.student_head.shape_logits(projected_CV)
        logp_CV = part.student_head.with_one_end(log_probs(logits_CV, spec.temperature))
        own_CV, logq_CV = teacher_logp(part, logp_CV)
        divergence_C = divergence_of_logp(logp_CV, logq_CV, part.targets_N, spec)
        logp_C, teacher_logp_C = pick(logp_CV, part.targets_N), pick(own_CV, part.targets_N)
        entropy_C = entropy(logp_CV.detach())
        loss = total(part, (divergence_C, logp_C, entropy_C, teacher_logp_C))
    values = (divergence_C.detach(), logp_C.detach(), entropy_C, teacher_logp_C)
    return values, torch.autograd.grad(loss, projected_CV)[0] if want_gradient else None


def chunk_bytes(device: torch.device | None = None) -> int:
    """Most bytes of one [C,V] float32 tensor on a device (default: a CPU)."""
    return CHUNK_BYTES if device is None or device.type == "cpu" else ACCELERATOR_CHUNK_BYTES


def default_chunk_tokens(vocabulary: int, device: torch.device | None = None) -> int:
    """Tokens of a chunk whose [C,V] float32 tensor takes at most `chunk_bytes(device)`: as many as
    products are fast with.
    """
    most = max(1, chunk_bytes(device) // (4 * vocabulary))
    return _fast(most) or most


def _fast(most: int) -> int:
    """The largest multiple of `ROW_MULTIPLE` up to `most`; 0 where there is none."""
    return most // ROW_MULTIPLE * ROW_MULTIPLE


def _chunk(tokens: int, most: int) -> int:
    """Tokens of each chunk but the last: as many as products are fast with, unless that leaves a
    small last one; then all alike.
    """
    fast = _fast(most)
    if fast and (tokens % fast == 0 or tokens % fast >= ROW_MULTIPLE):
        return fast
    tokens = max(tokens, 1)
    return math.ceil(tokens / math.ceil(tokens / most))


def _is_half(head: Head) -> bool:
    return head.weight.dtype in (torch.float16, torch.bfloat16)


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
        add_matmul_tn(total_VH, grad_CV.to(total_VH.dtype), hidden_CH.to(total_VH.dtype))


def _kept_dtype(like: Tensor) -> torch.dtype:
    """A gradient waits for backward in its own dtype; one of float16 in float32: the loss scale has
    yet to come.
    """
    return torch.float32 if like.dtype == torch.float16 else like.dtype


def _scores(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    temperature: float,
    chunk_tokens: int | None,
    want_entropy: bool,
) -> tuple[Tensor, Tensor]:
    on_cpu = hidden_NH.device.type == "cpu"
    usual = default_chunk_tokens(head.weight.shape[0], hidden_NH.device)
    # One tensor, where the loss holds two. On a CPU longer chunks are no faster.
    chunk = _chunk(len(hidden_NH), chunk_tokens or (usual if on_cpu else 2 * usual))
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    nothing = torch.empty(0, dtype=dtype, device=hidden_NH.device)
    logps, entropies = [nothing], [nothing]
    head, targets_N = _autocast_head(head), head.outcomes(targets_N)
    room = None
    # in the heap it would lie between what passes use again
    if on_cpu and head.weight.dtype == torch.float32:
        room = heap.own_block((min(chunk, len(hidden_NH)), len(head.weight)), torch.float32)
    with torch.no_grad(), torch.autocast(hidden_NH.device.type, enabled=False):
        for start in range(0, len(hidden_NH), chunk):
            rows = slice(start, start + chunk)
            if fused.takes(head):
                projected_CV, _ = fused.project(head, hidden_NH[rows], temperature)
                _, logp_C, entropy_C = fused.moments(projected_CV, head, targets_N[rows], temperature)
                logps.append(logp_C)
                entropies.append(entropy_C)
                continue
            projected_CV = project_into(head, hidden_NH[rows], room)
            blocks = row_blocks(projected_CV)
            scratch_RV = torch.empty_like(projected_CV[blocks[0]]) if want_entropy else projected_CV
            for block in blocks:
                chosen = slice(start + block.start, start + block.stop)
                logp_RV, _ = log_probs_in_place(head, projected_CV[block], temperature)
                logps.append(pick(logp_RV, targets_N[chosen]))
                if want_entropy:
                    p_RV = torch.exp(logp_RV, out=scratch_RV[: len(logp_RV)])
                    entropies.append(-p_RV.mul_(logp_RV).sum(-1))
            del projected_CV  # before the next chunk's, not after
    return torch.cat(logps).to(dtype), torch.cat(entropies).to(dtype)


def token_logprobs(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Log-probability [N] of the realised tokens, without gradient and chunk by chunk: never holds
    [N,V].
    """
    return _scores(hidden_NH, head, targets_N, temperature, chunk_tokens, want_entropy=False)[0]


def token_scores(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`token_logprobs` and the entropy [N] of the distribution they come from, in nats."""
    return _scores(hidden_NH, head, targets_N, temperature, chunk_tokens, want_entropy=True)
