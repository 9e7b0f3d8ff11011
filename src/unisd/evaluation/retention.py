"""Measures how far an adapted model has moved from its base.

Shapes: N rows, T tokens of a completion, H hidden size, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from unisd.errors import UserError, flag
from unisd.evaluation.accuracy import Interval, generate_greedy
from unisd.evaluation.grading import Z95
from unisd.evaluation.likelihood import TOKEN_BUDGET, Ids, _batches, _check_pairs, _ids, _States, corpus_ppl
from unisd.kernels.lora import inference
from unisd.models.adapters import check_base_is_kept
from unisd.tasks.base import Row

# ---------------------------------------------------------------- retention


def jsd(logp_CV: Tensor, logq_CV: Tensor) -> Tensor:
    """Jensen-Shannon divergence [C] of two distributions given as log-probabilities, in nats.

    Exactly 0 for equal ones.
    """
    p_CV, q_CV = logp_CV.exp(), logq_CV.exp()
    middle_CV = ((p_CV + q_CV) / 2).clamp_min(torch.finfo(p_CV.dtype).tiny)
    terms_CV = torch.xlogy(p_CV, p_CV / middle_CV) + torch.xlogy(q_CV, q_CV / middle_CV)
    return terms_CV.sum(-1).clamp_min(0) / 2


def kl(logp_CV: Tensor, logq_CV: Tensor) -> Tensor:
    """Kullback-Leibler divergence [C] of q from p, given as log-probabilities, in nats.

    Exactly 0 for equal ones.
    """
    # What p cannot say adds nothing, also where q cannot either.
    terms_CV = torch.where(logp_CV.isneginf(), 0.0, logp_CV.exp() * (logp_CV - logq_CV))
    return terms_CV.sum(-1).clamp_min(0)


def retention(
    model: Any,
    base: Any | None,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    max_new_tokens: int = 256,
    batch_size: int | None = None,
    token_budget: int = TOKEN_BUDGET,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure how far an adapted model has moved from its base, on both models' greedy answers.

    Args:
        model: the adapted model.
        base: the model it comes from; None: `model` is a peft model and its base is itself without
            the adapter.

    Returns, raises: see `retention_along`.
    """
    check_base(model, base)
    prompts = [_ids(tokenizer, row["prompt"]) for row in rows]

    def written(which: Any, description: str) -> list[list[int]]:
        return generate_greedy(which, tokenizer, prompts, max_new_tokens, batch_size, progress, description)

    of_model = written(model, "answers of the adapted model")
    with as_base(model, base) as bare:
        of_base = written(bare, "answers of the base model")
    return retention_along(model, base, tokenizer, rows, (of_model, of_base), token_budget)


def retention_along(
    model: Any,
    base: Any | None,
    tokenizer: Any,
    rows: Sequence[Row],
    answers: tuple[Sequence[Ids], Sequence[Ids]],
    token_budget: int = TOKEN_BUDGET,
) -> dict[str, Any]:
    """The same on answers to the rows that the adapted model and its base have written before.

    Returns:
        `forward`: the adapted model's answers; `reverse`: the base's answers; `n`: rows. Each of
        the two holds `ppl` (of the answers under the *other* model: PPL_ret), `own_ppl` (under the
        model that wrote them), `delta` (paired difference of their log-probabilities per token, own
        minus other, nats: `value`, `low`, `high` of a 95 % interval over rows), `jsd` and `kl` (of
        the two models, the one that wrote first; means over tokens, full vocabulary, nats),
        `tokens`.

    Raises:
        UserError: no base, and no adapter to take off.
    """
    check_base(model, base)
    prompts = [_ids(tokenizer, row["prompt"]) for row in rows]
    return {
        "forward": _along(model, base, prompts, answers[0], token_budget, written_by_base=False),
        "reverse": _along(model, base, prompts, answers[1], token_budget, written_by_base=True),
        "n": len(prompts),
    }


def check_base(model: Any, base: Any | None) -> None:
    """Raise `UserError` if the base is neither given nor what is left without the adapter."""
    if base is None and not hasattr(model, "disable_adapter"):
        raise UserError(
            f"retention needs the base model: give {flag('base')}, or a model with an adapter that can be"
            " taken off"
        )
    if base is None:
        check_base_is_kept(model.peft_config)


@contextmanager
def as_base(model: Any, base: Any | None) -> Iterator[Any]:
    """Give the base of a model: the model without its adapter, where there is no other."""
    off: AbstractContextManager[Any] = nullcontext() if base is not None else model.disable_adapter()
    with off:
        yield model if base is None else base


def _along(
    model: Any,
    base: Any | None,
    prompts: Sequence[Ids],
    answers: Sequence[Ids],
    budget: int,
    written_by_base: bool,
) -> dict[str, Any]:
    """Both models along the same answers, row by row and chunk by chunk."""
    _check_pairs(prompts, answers)
    logp_N2 = torch.zeros(len(prompts), 2, dtype=torch.float64)  # adapted, base
    count_N = torch.tensor([len(a) for a in answers], dtype=torch.int64)
    own, other = (1, 0) if written_by_base else (0, 1)
    divergence = relative = 0.0
    with inference(model, *([] if base is None else [base])):
        adapted_states = _States(model)
        base_states = adapted_states if base is None else _States(base)
        for rows in _batches(prompts, answers, budget):
            picked = [prompts[i] for i in rows], [answers[i] for i in rows]
            adapted_hidden = adapted_states.of(*picked)
            with as_base(model, base):
                base_hidden = base_states.of(*picked)
            for i, ours_TH, theirs_TH in zip(rows, adapted_hidden, base_hidden, strict=True):
                target_T = torch.tensor(answers[i], device=ours_TH.device)
                for first in range(0, len(target_T), adapted_states.chunk):
                    part = slice(first, first + adapted_states.chunk)
                    ours_CV = adapted_states.logp(ours_TH[part])
                    with as_base(model, base):  # an adapter may sit on the head
                        theirs_CV = base_states.logp(theirs_TH[part].to(base_states.model.device)).to(ours_CV)
                    for side, logp_CV in enumerate((ours_CV, theirs_CV)):
                        logp_N2[i, side] += logp_CV.gather(-1, target_T[part, None]).double().sum().cpu()
                    sides = (ours_CV, theirs_CV)
                    divergence += float(jsd(*sides).double().sum())
                    relative += float(kl(sides[own], sides[other]).double().sum())
    count = int(count_N.sum())
    return {
        "ppl": corpus_ppl(logp_N2[:, other], count_N),
        "own_ppl": corpus_ppl(logp_N2[:, own], count_N),
        "delta": paired_delta(logp_N2[:, own] - logp_N2[:, other], count_N),
        "jsd": divergence / count if count else math.nan,
        "kl": relative / count if count else math.nan,
        "tokens": count,
    }


def paired_delta(difference_N: Tensor, count_N: Tensor) -> Interval:
    """Total difference per token with a 95 % interval, rows as clusters.

    By the normal approximation of a ratio.
    """
    tokens, n = int(count_N.sum()), len(count_N)
    if not tokens:
        return {"value": math.nan, "low": math.nan, "high": math.nan}
    value = float(difference_N.sum()) / tokens
    residual_N = difference_N - value * count_N
    half = Z95 * math.sqrt(n / (n - 1) * float(residual_N.square().sum())) / tokens if n > 1 else math.inf
    return {"value": value, "low": value - half, "high": value + half}
