"""A chunk's divergence and its gradient in closed form (mode `full`), in the memory of the chunk's
own projections.

Shapes: C tokens of a chunk, V vocabulary. Notation: p student, q teacher, M their mixture; l
log-probability of the realised token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unisd.kernels.cpu_linear import linear
from unisd.kernels.devices import shares_host
from unisd.losses import triton_kernels as fused
from unisd.losses.head import Head
from unisd.losses.terms import ChunkResult, LossInputs, TokenValues, slopes
from unisd.methods.divergence import DivergenceSpec, at_least_float32, pick

BLOCK_BYTES = 2 * 2**20
"""On a CPU the arithmetic between the products goes through a chunk in row blocks of this size,
which stay in the cache.
"""


def closed_form(part: LossInputs, want_gradient: bool, room: Tensor | None = None) -> ChunkResult:
    """Mode `full`: both projections at once, then row block by row block; the gradient takes the
    place of the student's logits.

    room: 2 C rows or more of V values, where the projections may go.
    """
    if fused.fits(part):
        return fused.closed_form(part, want_gradient)
    student_CV, teacher_CV = _projections(part, room)
    blocks = row_blocks(student_CV)
    # One set of scratch rows for all blocks: on a CPU, getting fresh memory costs more than what is
    # computed in it.
    scratch = student_CV.new_empty(2 if part.spec.alpha in (0.0, 1.0) else 3, *student_CV[blocks[0]].shape)
    collected = [
        _closed_form_of(
            part.rows(rows),
            student_CV[rows],
            teacher_CV[rows],
            scratch[:, : rows.stop - rows.start],
            want_gradient,
        )
        for rows in blocks
    ]
    values = collected[0]
    if len(collected) > 1:
        divergence_C, logp_C, entropy_C, teacher_logp_C = map(torch.cat, zip(*collected, strict=True))
        values = (divergence_C, logp_C, entropy_C, teacher_logp_C)
    return values, student_CV if want_gradient else None


def _projections(part: LossInputs, room: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of student and teacher; by one product where they have one head, which is then read once."""
    student_CH, teacher_CH, tokens = (
        part.student_hidden_NH,
        part.teacher_hidden_NH,
        len(part.student_hidden_NH),
    )
    one, other = part.student_head, part.teacher_head
    if one.weight is other.weight and one.bias is other.bias and student_CH.dtype == teacher_CH.dtype:
        both = project_into(one, torch.cat([student_CH, teacher_CH]), room)
        student_CV, teacher_CV = both[:tokens], both[tokens:]
    else:
        rest = None if room is None else room[tokens:]
        student_CV = project_into(one, student_CH, room)
        teacher_CV = project_into(other, teacher_CH, rest)
    return student_CV, teacher_CV.to(student_CV.dtype)


def project_into(head: Head, hidden_CH: Tensor, room: Tensor | None) -> Tensor:
    """As `Head.project`; `room`: see :func:`unisd.kernels.cpu_linear.linear`."""
    if room is None:
        return head.project(hidden_CH)
    return at_least_float32(linear(hidden_CH.to(head.weight.dtype), head.weight, head.finite_bias, room))


def row_blocks(x_CV: Tensor) -> list[slice]:
    """Rows of a chunk that are worked on together: all, or on a CPU as many as the cache holds."""
    tokens, vocabulary = x_CV.shape
    size = tokens if not shares_host(x_CV.device) else BLOCK_BYTES // (vocabulary * x_CV.element_size())
    size = max(size, 1)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _closed_form_of(
    part: LossInputs, student_CV: Tensor, teacher_CV: Tensor, scratch: Tensor, want_gradient: bool
) -> TokenValues:
    """With s_v the summands of D and r_v = ds_v/dp_v (0 where clipped), dD/dz = p (r - <p, r>).

    Returns (D, l, H(p), l+).

    Both projections are overwritten, the student's by the gradient. scratch: two or three more
    [C,V].
    """
    head, spec = part.student_head, part.spec
    cap_slope_CV = None if head.softcap is None else 1.0 - (head.shape_logits(student_CV) / head.softcap) ** 2
    logp_CV, share_CE = log_probs_in_place(head, student_CV, spec.temperature)
    p_CV = torch.exp(logp_CV, out=scratch[0])
    logp_C, entropy_C = pick(logp_CV, part.targets_N), -torch.mul(p_CV, logp_CV, out=scratch[1]).sum(-1)
    logq_CV, _ = log_probs_in_place(part.teacher_head, teacher_CV, spec.temperature)
    teacher_logp_C = pick(logq_CV, part.targets_N)
    if part.target is not None:
        logq_CV = part.target.logp(logp_CV, logq_CV, part.targets_N, spec)

    divergence_C, pr_CV, pr_C1 = _sums_and_slopes(p_CV, logp_CV, logq_CV, scratch[1:], spec)
    values = (divergence_C, logp_C, entropy_C, teacher_logp_C)
    if not want_gradient:
        return values

    slope_C, l_slope_C = slopes(part, values)
    inner = head.scale / spec.temperature  # from the softmax's argument back to the projection
    slope_C1 = slope_C[:, None] * inner
    p_slope_C1 = slope_C1 * pr_C1
    l_slope_C1 = None if l_slope_C is None else l_slope_C[:, None] * inner
    if l_slope_C1 is not None:  # dl/dz = onehot - p
        p_slope_C1 = p_slope_C1 + l_slope_C1
    grad_CV = torch.mul(pr_CV, slope_C1, out=student_CV).addcmul_(p_CV, p_slope_C1, value=-1.0)
    if l_slope_C1 is not None:
        grad_CV.scatter_add_(-1, part.targets_N[:, None], l_slope_C1)
    head.part_ends(grad_CV, share_CE)
    if cap_slope_CV is not None:
        grad_CV.mul_(cap_slope_CV)
    return values


def log_probs_in_place(head: Head, projected_CV: Tensor, temperature: float) -> tuple[Tensor, Tensor | None]:
    """log softmax of the head's logits / temperature, in the memory of the projection; and each
    end's share of all, where there are several.
    """
    if head.softcap is not None:
        projected_CV.copy_(head.shape_logits(projected_CV))
    elif head.scale != 1.0:
        projected_CV.mul_(head.scale)
    if temperature != 1.0:
        projected_CV.div_(temperature)
    logp_CV = torch.log_softmax(projected_CV, -1, out=projected_CV)
    return logp_CV, head.join_ends(logp_CV)


def _sums_and_slopes(
    p_CV: Tensor, logp_CV: Tensor, logq_CV: Tensor, scratch: Tensor, spec: DivergenceSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """D [C], p * ds/dp [C,V] (finite where p underflows) and its sum over V [C,1].

    Overwrites both logs.
    """
    alpha = spec.alpha
    if alpha == 0.0:  # s = q log(q/p), p ds/dp = -q
        q_CV = torch.exp(logq_CV, out=scratch[0])
        summand_CV = logq_CV.sub_(logp_CV).mul_(q_CV)
        pr_CV = torch.neg(q_CV, out=logp_CV)
    elif alpha == 1.0:  # s = p log(p/q), p ds/dp = s + p
        summand_CV = torch.sub(logp_CV, logq_CV, out=logq_CV).mul_(p_CV)
        pr_CV = torch.add(summand_CV, p_CV, out=logp_CV)
    else:  # s = alpha q log(q/M) + (1-alpha) p log(p/M), p ds/dp = (1-alpha) p log(p/M)
        # M = 0 only where p = q = 0.
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
