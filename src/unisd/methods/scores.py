"""What a method may look at: `StepScores` for a token weight, `TargetInputs` for a target.

The one thing an author has to learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


def select(scores: StepScores, rows: Tensor) -> StepScores:
    """The scores of some rows."""
    chosen: dict[str, Tensor] = {}
    for item in fields(StepScores):
        value = getattr(scores, item.name)
        if value is not None:
            chosen[item.name] = value[:, rows] if item.name.startswith("auxiliary") else value[rows]
    return replace(scores, **chosen)


def concatenate(parts: Sequence[StepScores]) -> StepScores:
    """Stack rows; completions and contexts are padded to the longest and to the most."""
    T = max(part.mask.shape[1] for part in parts)
    K = max((len(part.auxiliary_logp) for part in parts if part.auxiliary_logp is not None), default=0)

    def stacked(name: str) -> Tensor | None:
        values: list[Tensor | None] = [getattr(part, name) for part in parts]
        padded = []
        for value in values:
            if value is None:
                return None
            grow = [0, T - value.shape[-1]] if not name.endswith("_present") else [0, 0]
            if name.startswith("auxiliary"):
                grow += [0] * 2 * (value.dim() - 2) + [0, K - len(value)]
            padded.append(torch.nn.functional.pad(value, grow))
        return torch.cat(padded, dim=1 if name.startswith("auxiliary") else 0)

    return StepScores(**{item.name: stacked(item.name) for item in fields(StepScores)})  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class TargetInputs:
    """Everything a target may look at: log-probabilities without gradient, `[C,V]`; or `[C]` of the
    realised tokens.
    """

    student_logp: Tensor
    teacher_logp: Tensor
    sources: Mapping[str, Tensor]  # by the names that the target declares, in its order
    progress: float = 0.0  # share of the run's optimizer steps that are done, for schedules


@dataclass(frozen=True, eq=False)
class TermInputs:
    """Everything a loss term may look at: values `[N]` of loss tokens, at the distillation
    temperature.

    Gradients flow through `student_logp`; of a term that needs `hidden`, through the student's
    states alone. Everything else is constant.
    """

    student_logp: Tensor  # l
    teacher_logp: Tensor  # l+
    student_entropy: Tensor  # H(p)
    divergence: Tensor  # D, after the entry clip
    negative_logp: Tensor | None = None  # l-; 0 where the row has no wrong reference (negative)
    # student's and teacher's states [N,H]: the head's input, or those of each of `feature_layers`
    # (hidden)
    hidden: Sequence[tuple[Tensor, Tensor]] = ()


NEEDS = frozenset(
    {"teacher", "auxiliary", "untempered", "negative", "contrast", "student", "entropy", "divergence"}
)
NORMALIZERS = ("weights", "tokens", "mean1")


@dataclass(frozen=True, eq=False)
class StepScores:
    """Everything a reliability weight may look at: one optimizer step, all ranks, no gradient.

    Values at positions outside `mask`, and of contexts that are not present, are arbitrary (even
    NaN): select before you sum. A field is None unless a registered function in use declares the
    need in brackets.
    """

    mask: Tensor  # [B,T] bool, tokens that carry loss
    tokens: Tensor  # [B,T] realised token ids
    teacher_logp: Tensor | None = None  # [B,T] l+, primary teacher, distillation temperature (teacher)
    auxiliary_logp: Tensor | None = None  # [K,B,T] l^k at temperature 1 (auxiliary)
    auxiliary_present: Tensor | None = None  # [K,B] bool: a row may have fewer than K contexts (auxiliary)
    negative_logp: Tensor | None = None  # [B,T] l- (negative)
    negative_present: Tensor | None = None  # [B] bool (negative)
    negative_divergence: Tensor | None = None  # [B,T] KL(q||q-), at the distillation temperature (contrast)
    # [B,T] l, from a student pass without gradient or the rollout itself (student)
    student_logp: Tensor | None = None
    teacher_entropy: Tensor | None = None  # [B,T] H(q) (entropy)
    divergence: Tensor | None = None  # [B,T] D (divergence)
    # [B,T] l' with which the token was drawn, NaN if nobody drew it (importance)
    behaviour_logp: Tensor | None = None
    # [B,T] l+ at temperature 1, as the auxiliary scores are (untempered)
    untempered_logp: Tensor | None = None
