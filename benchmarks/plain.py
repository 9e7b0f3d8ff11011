"""Compute UniSD* as published code does: padded, full logits, teacher switches per micro-batch.

All hidden states are kept, only completions are projected (`logits_to_keep`). Loss and gradient are
the library's (tested). B rows of a micro-batch, T longest completion, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.settings import Star
from benchmarks.shapes import PAD, Example


def kl_or_jsd(student_logits: Tensor, teacher_logits: Tensor, alpha: float) -> Tensor:
    """Eq. 7-8 per token."""
    log_p, log_q = F.log_softmax(student_logits, -1), F.log_softmax(teacher_logits, -1)
    if alpha == 0:
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    log_a, log_b = (torch.tensor(x, device=log_p.device).log() for x in (1 - alpha, alpha))
    log_m = torch.logaddexp(log_p + log_a, log_q + log_b)
    to_teacher = F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
    to_student = F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    return alpha * to_teacher + (1 - alpha) * to_student


def padded(rows: list[list[int]], side: str, device: Any) -> tuple[Tensor, Tensor]:
    tensors = [torch.tensor(row, device=device) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=PAD, padding_side=side)
    return ids, pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True, padding_side=side)


def view(model: Any, prompts: list[list[int]], rows: list[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits `[B,T,V]` and states that predict the completions, their ids and mask."""
    ids, mask = padded(prompts, "left", model.device)
    tokens, own = padded([r.completion for r in rows], "right", model.device)
    keep, ids, mask = tokens.shape[1] + 1, torch.cat([ids, tokens], 1), torch.cat([mask, own], 1)
    wanted = {"logits_to_keep": keep, "output_hidden_states": True, "use_cache": False}
    out = model(input_ids=ids, attention_mask=mask, **wanted)
    return out.logits[:, :-1].float(), out.hidden_states[-1][:, -keep:-1], tokens, own.bool()


def realised(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.log_softmax(logits, -1).gather(-1, tokens[..., None])[..., 0]


def star_step(model: Any, teacher: Callable[[], Any], batches: list[list[Example]], s: Star) -> float:
    """Score, weigh, and go backward through all micro-batches; gradients stay on the parameters."""
    spreads, masks = [], []
    with torch.no_grad(), teacher():
        for rows in batches:
            scores = []
            for k in range(len(rows[0].auxiliary)):
                logits, _, tokens, mask = view(model, [r.auxiliary[k] for r in rows], rows)
                scores.append(realised(logits, tokens))
            spreads.append(torch.stack(scores).var(0))
            masks.append(mask)
    scale = torch.cat([d[m] for d, m in zip(spreads, masks, strict=True)]).quantile(s.quantile)
    total, count = 0.0, sum(map(len, batches))
    for rows, spread, mask in zip(batches, spreads, masks, strict=True):
        with torch.no_grad(), teacher():
            teacher_logits, teacher_hidden, tokens, _ = view(model, [r.teacher for r in rows], rows)
            negative = realised(view(model, [r.negative for r in rows], rows)[0] / s.temperature, tokens)
        weights = (1 / (1 + s.gamma * (spread / scale).clamp(max=10))).clamp(min=0.01) * mask
        logits, hidden, _, _ = view(model, [r.student for r in rows], rows)
        logits, teacher_logits = logits / s.temperature, teacher_logits / s.temperature
        divergence = kl_or_jsd(logits, teacher_logits, s.alpha).clamp(max=s.token_clip)
        logp, teacher_logp = realised(logits, tokens), realised(teacher_logits, tokens)
        hinge = torch.relu(s.margin + (logp - teacher_logp).abs() - (logp - negative).abs())
        extra = s.contrast * hinge + s.feature * (hidden - teacher_hidden).float().square().mean(-1)
        per_row = (weights * divergence).sum(-1) / weights.sum(-1) + (extra * mask).sum(-1) / mask.sum(-1)
        loss = per_row.sum() / count
        loss.backward()
        total += float(loss.detach())
    return total
