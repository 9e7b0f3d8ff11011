"""The arithmetic of a chunk on CUDA, in Triton: what :mod:`unisd.losses.closed_form` computes in a
score of passes over `[C,V]`, in three.

A program goes through one token's row of logits in blocks. Logits are read as the products leave
them (bfloat16, say) and computed on in float32; the gradient takes their place. Shapes and
notation: see :mod:`unisd.losses.closed_form`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Arguments of a kernel have no annotations but `constexpr`: Triton would look the names up.

from __future__ import annotations

import importlib.util
import logging
import os
from functools import lru_cache

import torch
from torch import Tensor

from unisd.losses.head import Head
from unisd.losses.terms import ChunkResult, LossInputs, slopes

logger = logging.getLogger(__name__)
AVAILABLE = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # by numpy, on any device: for tests
BLOCK = 4096

if AVAILABLE:
    import triton
    import triton.language as tl

    @triton.jit
    def _shaped(z, factor, cap, CAPPED: tl.constexpr):
        """Projection -> the softmax's argument: scale, softcap, temperature.

        Without a softcap `factor` holds all of them.
        """
        if CAPPED:  # tanh by the sigmoid
            return factor * (2.0 * tl.sigmoid(2.0 * z / cap) - 1.0)
        return z * factor

    @triton.jit
    def _moments_kernel(
        z_ptr,
        target_ptr,
        out_ptr,
        N,
        V,
        factor,
        cap,
        CAPPED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Of each row: log of the softmax's sum, log-probability of the target, entropy; `out
        [3,N]`.
        """
        row = tl.program_id(0).to(tl.int64)
        top = -1e30
        total = 0.0
        weighted = 0.0  # sum of e^(z - top) (z - top)
        for start in range(0, V, BLOCK):
            places = start + tl.arange(0, BLOCK)
            inside = places < V
            z = _shaped(
                tl.load(z_ptr + row * V + places, mask=inside, other=0.0).to(tl.float32), factor, cap, CAPPED
            )
            z = tl.where(inside, z, -1e30)
            new_top = tl.maximum(top, tl.max(z, 0))
            shrink = tl.exp(top - new_top)
            weighted = shrink * (weighted + (top - new_top) * total)
            e = tl.exp(z - new_top)
            total = shrink * total + tl.sum(e, 0)
            weighted += tl.sum(tl.where(e > 0, e * (z - new_top), 0.0), 0)
            top = new_top
        lse = top + tl.log(total)
        target = tl.load(target_ptr + row)
        chosen = _shaped(tl.load(z_ptr + row * V + target).to(tl.float32), factor, cap, CAPPED)
        tl.store(out_ptr + row, lse)
        tl.store(out_ptr + N + row, chosen - lse)
        tl.store(out_ptr + 2 * N + row, tl.log(total) - weighted / total)

    @triton.jit
    def _summand_and_slope(p, logp, q, logq, alpha, KIND: tl.constexpr):
        """s and p ds/dp of one block (see `closed_form._sums_and_slopes`)."""
        if KIND == 0:  # forward
            return tl.where(q > 0, q * (logq - logp), 0.0), -q
        if KIND == 1:  # reverse
            s = tl.where(p > 0, p * (logp - logq), 0.0)
            return s, s + p
        m = (1.0 - alpha) * p + alpha * q
        logm = tl.log(tl.maximum(m, 1.1754943508222875e-38))
        slope = tl.where(p > 0, (1.0 - alpha) * p * (logp - logm), 0.0)
        return tl.where(q > 0, alpha * q * (logq - logm), 0.0) + slope, slope

    @triton.jit
    def _divergence_kernel(
        zp_ptr, zq_ptr, lsep_ptr, lseq_ptr, out_ptr, N, V, factor_p, cap_p,
        factor_q, cap_q, alpha,
        CAPPED_P: tl.constexpr, CAPPED_Q: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Of each row: D and the sum of p ds/dp; `out [2,N]`."""
        row = tl.program_id(0).to(tl.int64)
        lsep, lseq = tl.load(lsep_ptr + row), tl.load(lseq_ptr + row)
        total = 0.0
        slopes = 0.0
        for start in range(0, V, BLOCK):
            places = start + tl.arange(0, BLOCK)
            inside = places < V
            zp = tl.load(zp_ptr + row * V + places, mask=inside, other=0.0).to(tl.float32)
            zq = tl.load(zq_ptr + row * V + places, mask=inside, other=0.0).to(tl.float32)
            logp = _shaped(zp, factor_p, cap_p, CAPPED_P) - lsep
            logq = _shaped(zq, factor_q, cap_q, CAPPED_Q) - lseq
            s, slope = _summand_and_slope(tl.exp(logp), logp, tl.exp(logq), logq, alpha, KIND)
            total += tl.sum(tl.where(inside, s, 0.0), 0)
            slopes += tl.sum(tl.where(inside, slope, 0.0), 0)
        tl.store(out_ptr + row, total)
        tl.store(out_ptr + N + row, slopes)

    @triton.jit
    def _gradient_kernel(
        zp_ptr,
        zq_ptr,
        lsep_ptr,
        lseq_ptr,
        target_ptr,
        slope_ptr,
        back_ptr,
        hinge_ptr,
        V,
        factor_p,
        cap_p,
        factor_q,
        cap_q,
        alpha,
        CAPPED_P: tl.constexpr,
        CAPPED_Q: tl.constexpr,
        KIND: tl.constexpr,
        HINGE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """slope * (p ds/dp) - back * p + hinge * onehot, through the softcap, in the place of the
        student's projection.
        """
        row = tl.program_id(0).to(tl.int64)
        lsep, lseq = tl.load(lsep_ptr + row), tl.load(lseq_ptr + row)
        slope_of_row, back = tl.load(slope_ptr + row), tl.load(back_ptr + row)
        for start in range(0, V, BLOCK):
            places = start + tl.arange(0, BLOCK)
            inside = places < V
            zp = tl.load(zp_ptr + row * V + places, mask=inside, other=0.0).to(tl.float32)
            zq = tl.load(zq_ptr + row * V + places, mask=inside, other=0.0).to(tl.float32)
            shaped = _shaped(zp, factor_p, cap_p, CAPPED_P)
            logp, logq = shaped - lsep, _shaped(zq, factor_q, cap_q, CAPPED_Q) - lseq
            p = tl.exp(logp)
            _, slope = _summand_and_slope(p, logp, tl.exp(logq), logq, alpha, KIND)
            grad = slope_of_row * slope - back * p
            if HINGE:
                grad += tl.where(places == tl.load(target_ptr + row), tl.load(hinge_ptr + row), 0.0)
            if CAPPED_P:
                bent = shaped / factor_p
                grad *= 1.0 - bent * bent
            tl.store(zp_ptr + row * V + places, grad.to(zp_ptr.dtype.element_ty), mask=inside)


def fits(part: LossInputs) -> bool:
    """Whether this chunk can be computed here: full vocabulary, no clip of entries, the teacher
    itself as the target.
    """
    return takes(part.student_head) and part.target is None and part.spec.entry_clip is None


def takes(head: Head) -> bool:
    """Whether logits of this head can be worked on here: ends are joined before a softcap that
    comes in the kernel.
    """
    weight = head.weight
    on_device = AVAILABLE and (INTERPRETED or (weight.is_cuda and _works(weight.device)))
    return on_device and weight.dtype != torch.float64 and not (head.ends and head.softcap is not None)


@lru_cache
def _works(device: torch.device) -> bool:
    """Tried once: Triton compiles for the device, and needs a C compiler to do so."""
    try:
        moments(
            torch.zeros(1, 2, device=device),
            Head(torch.zeros(2, 1)),
            torch.zeros(1, dtype=torch.long, device=device),
            1.0,
        )
    except Exception as error:  # of many kinds
        logger.warning("The loss runs without its Triton kernels, which cannot be built here: %s", error)
        return False
    return True


def _shape(head: Head, temperature: float) -> tuple[float, float, bool]:
    """Factor, cap and whether there is a softcap, for the kernels."""
    if head.softcap is None:
        return head.scale / temperature, 1.0, False
    return head.softcap / temperature, head.softcap / head.scale, True


def project(head: Head, hidden_CH: Tensor, temperature: float) -> tuple[Tensor, Tensor | None]:
    """The projection that the kernels read, all ends in one column, and each end's share."""
    projected_CV = head.matmul(hidden_CH).contiguous()
    return projected_CV, head.join_ends(projected_CV, head.scale / temperature)


def moments(projected_CV: Tensor, head: Head, targets_C: Tensor, temperature: float) -> Tensor:
    """Log of the softmax's sum, log-probability of the target and entropy of each row, `[3,C]` in
    float32.
    """
    factor, cap, capped = _shape(head, temperature)
    C, V = projected_CV.shape
    out_3C = torch.empty(3, C, dtype=torch.float32, device=projected_CV.device)
    if C:
        _moments_kernel[(C,)](projected_CV, targets_C, out_3C, C, V, factor, cap, capped, BLOCK, num_warps=8)
    return out_3C


def closed_form(part: LossInputs, want_gradient: bool) -> ChunkResult:
    """As :func:`unisd.losses.closed_form.closed_form`; the gradient has the dtype of the
    projection.
    """
    head, other, spec = part.student_head, part.teacher_head, part.spec
    zp_CV, share_CE = project(head, part.student_hidden_NH, spec.temperature)
    zq_CV, _ = project(other, part.teacher_hidden_NH, spec.temperature)
    lsep_C, logp_C, entropy_C = moments(zp_CV, head, part.targets_N, spec.temperature)
    lseq_C, teacher_logp_C, _ = moments(zq_CV, other, part.targets_N, spec.temperature)
    C, V = zp_CV.shape
    shape_p, shape_q = _shape(head, spec.temperature), _shape(other, spec.temperature)
    factors = (*shape_p[:2], *shape_q[:2], spec.alpha)
    kind = {0.0: 0, 1.0: 1}.get(spec.alpha, 2)
    divergence_C, slopes_C = sums_2C = torch.empty(2, C, dtype=torch.float32, device=zp_CV.device)
    capped = (shape_p[2], shape_q[2])
    _divergence_kernel[(C,)](
        zp_CV, zq_CV, lsep_C, lseq_C, sums_2C, C, V, *factors, *capped, kind, BLOCK, num_warps=8
    )
    values = (divergence_C, logp_C, entropy_C, teacher_logp_C)
    if not want_gradient:
        return values, None
    of_divergence_C, of_logp_C = slopes(part, values)
    inner = head.scale / spec.temperature  # from the softmax's argument back to the projection
    slope_C = of_divergence_C.float() * inner
    l_slope_C = None if of_logp_C is None else of_logp_C.float() * inner
    back_C = slope_C * slopes_C if l_slope_C is None else slope_C * slopes_C + l_slope_C
    _gradient_kernel[(C,)](
        zp_CV, zq_CV, lsep_C, lseq_C, part.targets_N, slope_C, back_C,
        slope_C if l_slope_C is None else l_slope_C, V,
        *factors, *capped, kind, l_slope_C is not None, BLOCK, num_warps=8,
    )  # fmt: skip
    head.part_ends(zp_CV, share_CE)
    return values, zp_CV
