"""One step of UniSD* in plain torch, as the paper writes it (arXiv 2605.06597): read this first.

A model, the student, answers a problem. The same model with the reference solution in its prompt,
the teacher, reads the answer and says at every token what it would have written; the student moves
towards that. Five mechanisms guard the signal: agreement (A: a token counts less where the model
disagrees with itself in other contexts), teacher weights that follow slowly (B), contrast with a
plausible wrong reference (C), features (D: hidden states follow, too), and clipping (E).

    teacher = initial_teacher(model)  # any causal LM of transformers, trained whole or by LoRA
    for batch in batches:
        step(model, teacher, optimizer, batch, UniSDConfig(agreement="token", feature_weight=0.01))

`UniSDTrainer` does the same in micro-batches of packed rows, without holding logits; tests compare
the two. It knows more options: those not named here have their default values. Shapes: T tokens of
an answer, V vocabulary, H hidden size, K contexts, B rows. `x_BT` is a list of B tensors `[T]`,
each as long as its answer, so that the paper's mask m is 1 everywhere. p student, q teacher,
l log-probability of the answer's own tokens. Values in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call


@dataclass(frozen=True)
class Row:
    """One problem in all its contexts, as token ids up to where the answer begins."""

    prompt: list[int]  # x: what the student sees
    reference: list[int]  # x with the reference solution c*: what the teacher sees
    answer: list[int] = field(default_factory=list)  # y; empty: the student writes it
    contexts: Sequence[list[int]] = ()  # x with other problems, solved, c_1 .. c_K (agreement)
    negative: list[int] | None = None  # x with a plausible wrong reference (contrast)


class View(NamedTuple):  # what a model says to an answer, in one context
    logp_TV: Tensor
    l_T: Tensor
    h_TH: Tensor  # final hidden states, of which the head makes the logits


def step(model: Any, teacher: dict[str, Tensor], optimizer: Any, batch: Sequence[Row], o: Any) -> Tensor:
    """Algorithm 1: changes student and teacher, returns the loss. `o`: as in `UniSDConfig`."""
    tau = o.temperature
    # 1. The student answers.
    rows = [row if row.answer else replace(row, answer=sample(model, row.prompt, o)) for row in batch]
    # 2. The teacher reads each answer, in every context. What it says is a constant.
    with torch.no_grad():
        q_B = [view(model, row.reference, row.answer, tau, teacher) for row in rows]
        n_B = [view(model, row.negative, row.answer, tau, teacher) if row.negative else None for row in rows]
        # contexts at temperature 1: their log-probs are compared with each other only
        l_BKT = [[view(model, c, row.answer, 1.0, teacher).l_T for c in row.contexts] for row in rows]
    # 3. A token, or a row, counts by how far the contexts agree on it.
    token_BT, row_B = agreement(l_BKT, [torch.ones_like(q.l_T) for q in q_B], o)
    # 4. The student reads its answers, this time to learn from them.
    p_B = [view(model, row.prompt, row.answer, tau, {}) for row in rows]
    D_BT = [divergence(p.logp_TV, q.logp_TV, o) for p, q in zip(p_B, q_B, strict=True)]
    h_BT = [contrast(p.l_T, q.l_T, n.l_T, o) for p, q, n in zip(p_B, q_B, n_B, strict=True) if n]
    f_BT = [(p.h_TH - q.h_TH).square().mean(-1) for p, q in zip(p_B, q_B, strict=True)]  # Eq. 6, mean over H
    loss: Tensor = o.distillation_weight * aggregate(clip(D_BT, o), token_BT, row_B, o)
    for weight, x_BT in ((o.contrastive_weight, h_BT), (o.feature_weight, f_BT)):
        if weight and x_BT:  # over the rows that have the term, all alike
            ones_BT = [torch.ones_like(x_T) for x_T in x_BT]
            loss = loss + weight * aggregate(x_BT, ones_BT, row_B.new_ones(len(x_BT)), o)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    # 5. The teacher follows.
    if o.teacher_model_kind == "ema":  # else base: the initial model
        ema(teacher, model, 1 - o.teacher_update_rate)
    return loss.detach()


@torch.no_grad()
def sample(model: Any, prompt: list[int], o: Any) -> list[int]:
    """An answer of the student, drawn token by token at temperature tau."""
    answer: list[int] = []
    for _ in range(o.max_completion_length):
        logits_V = model(torch.tensor([prompt + answer], device=model.device)).logits[0, -1]
        answer.append(int(torch.multinomial((logits_V / o.temperature).softmax(-1), 1)))
        if answer[-1] in torch.tensor(model.generation_config.eos_token_id):  # one or several
            break
    return answer


def view(model: Any, prompt: list[int], answer: list[int], tau: float, weights: dict[str, Tensor]) -> View:
    """One forward pass, with `weights` in the place of the model's own."""
    ids = torch.tensor([prompt + answer], device=model.device)
    out = functional_call(model, weights, (ids,), {"output_hidden_states": True})
    here = slice(len(prompt) - 1, -1)  # the logits of a position are about the token after it
    logp_TV = (out.logits[0, here] / tau).log_softmax(-1)  # with the model's softcap and scale
    ends = torch.tensor(model.generation_config.eos_token_id, device=model.device).flatten()
    if len(ends) > 1:  # several tokens mean stop: one outcome, in the column of the first
        together_T1 = logp_TV[:, ends].logsumexp(-1, keepdim=True)
        logp_TV = logp_TV.index_fill(-1, ends, -1e30).index_copy(-1, ends[:1], together_T1)
        answer = [int(ends[0]) if token in ends else token for token in answer]
    return View(logp_TV, logp_TV[range(len(answer)), answer], out.hidden_states[-1][0, here])


def agreement(l_BKT: Sequence[list[Tensor]], token_BT: list[Tensor], o: Any) -> tuple[list[Tensor], Tensor]:
    """Eq. 1-2: b = 1 / (1 + gamma d / s), d = var_k l^k, s a quantile of d; or a = exp(-gamma d).

    `token_BT`: ones, which stay where a row has no two contexts that could disagree.
    """
    gamma, row_B = o.agreement_gamma, torch.stack([b_T[0] for b_T in token_BT])
    several = {i: torch.stack(l_KT) for i, l_KT in enumerate(l_BKT) if len(l_KT) > 1}
    if o.agreement == "sequence":
        for i, l_KT in several.items():
            # over K means the variance is biased, over a token's K values unbiased (as published)
            row_B[i] = (-gamma * l_KT.mean(1).var(correction=0)).exp().clamp(min=1e-6)
    if o.agreement == "token" and several:
        scale = torch.cat([l_KT.var(0) for l_KT in several.values()]).quantile(o.agreement_quantile)
        for i, l_KT in several.items() if scale >= 1e-6 else ():  # below it they agree to rounding
            d_T = (l_KT.var(0) / scale).clamp(max=o.agreement_cap)
            token_BT[i] = (1 / (1 + gamma * d_T)).clamp(min=0.01)
    return token_BT, row_B


def divergence(logp_TV: Tensor, logq_TV: Tensor, o: Any) -> Tensor:
    """Eq. 7-8: KL(q||p) at alpha = 0, KL(p||q) at 1, alpha KL(q||M) + (1 - alpha) KL(p||M) between.

    M = (1 - alpha) p + alpha q. As published, the ends are not the limits of what is between.
    """
    alpha, p_TV, q_TV = o.distillation_alpha, logp_TV.exp(), logq_TV.exp()
    if alpha == 0:
        D_TV = q_TV * (logq_TV - logp_TV)
    elif alpha == 1:
        D_TV = p_TV * (logp_TV - logq_TV)
    else:
        logm_TV = torch.logaddexp(logp_TV + math.log(1 - alpha), logq_TV + math.log(alpha))
        D_TV = alpha * q_TV * (logq_TV - logm_TV) + (1 - alpha) * p_TV * (logp_TV - logm_TV)
    return D_TV.clamp(max=o.entry_clip or math.inf).sum(-1)


def clip(D_BT: list[Tensor], o: Any) -> list[Tensor]:
    """min(D, kappa): above kappa no gradient; what equals it to rounding is not above it."""
    kappa = o.token_clip or math.inf
    if o.token_clip_quantile:
        kappa = float(torch.cat(D_BT).detach().quantile(o.token_clip_quantile))
    return [torch.where(D_T.gt(kappa + 1e-5 * max(kappa, 0.1)), kappa, D_T) for D_T in D_BT]


def contrast(l_T: Tensor, teacher_T: Tensor, negative_T: Tensor, o: Any) -> Tensor:
    """Eq. 4-5: h = relu(margin + |l - l+| - |l - l-|); a gradient only between l- and l+."""
    return torch.relu(o.contrastive_margin + (l_T - teacher_T).abs() - (l_T - negative_T).abs())


def aggregate(x_BT: list[Tensor], b_BT: list[Tensor], a_B: Tensor, o: Any) -> Tensor:
    """Eq. 9: sum_i a_i [sum_t b x / sum_t b]_i / sum_i a_i, or sum_it a b x / sum_it a b."""
    x_B = torch.stack([(b_T * x_T).sum() for b_T, x_T in zip(b_BT, x_BT, strict=True)])
    b_B = torch.stack([b_T.sum() for b_T in b_BT])
    if o.loss_aggregation == "sequence":
        return (a_B * x_B / b_B).sum() / a_B.sum()
    return (a_B * x_B).sum() / (a_B * b_B).sum()


def initial_teacher(model: torch.nn.Module) -> dict[str, Tensor]:
    """The student's trained weights: all of them, or under LoRA the adapter's two factors."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def ema(teacher: dict[str, Tensor], model: torch.nn.Module, beta: float) -> None:
    """Eq. 3: phi <- beta phi + (1 - beta) theta, in place; under LoRA of each factor."""
    theta = dict(model.named_parameters())
    for name, phi in teacher.items():
        phi.copy_(beta * phi + (1 - beta) * theta[name])
