"""What a method may look at: `StepScores` for a token weight, `TargetInputs` for a target.

The one thing an author has to learn. A new statistic of the scoring phase is a field of
`StepScores` and the view that fills it, in :mod:`unisd.scoring.views`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

NORMALIZERS = ("weights", "tokens", "mean1")


@dataclass(frozen=True, eq=False)
class TargetInputs:
    """Everything that a target may use: log-probabilities without gradient, `[C,V]`; or `[C]` of
    the realised tokens.
    """

    student_logp: Tensor
    teacher_logp: Tensor
    sources: Mapping[str, Tensor]  # by the names that the target declares, in its order
    progress: float = 0.0  # share of the run's optimizer steps that are done, for schedules
    # [C] bool by source that has a pass of its own: whether the token's row has it
    present: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TermInputs:
    """Everything that a loss term may use: values `[N]` of loss tokens, at the distillation
    temperature.

    Gradients flow through `student_logp`; for a term that needs `hidden`, only through the
    student's states. Everything else is constant.
    """

    student_logp: Tensor  # l
    teacher_logp: Tensor  # l+
    student_entropy: Tensor  # H(p)
    divergence: Tensor  # D, after the entry clip
    negative_logp: Tensor | None = None  # l-; 0 where the row has no wrong reference (negative)
    # student's and teacher's states [N,H]: the head's input, or those of each of `feature_layers`
    # (hidden)
    hidden: Sequence[tuple[Tensor, Tensor]] = ()


def _described(dims: str, what: str, need: str | None = None) -> dict[str, str | None]:
    return {"dims": dims, "what": what, "need": need}


def _scored(dims: str, need: str | None, what: str) -> Any:
    """Declare a field that is filled only where its need is declared."""
    return field(default=None, metadata=_described(dims, what, need))


@dataclass(frozen=True, eq=False)
class StepScores:
    """Everything that a reliability weight may use: one optimizer step, all ranks, no gradient.

    Values at positions outside `mask`, and of contexts that are not present, are arbitrary (even
    NaN): select before you sum. A field of :func:`_scored` is None unless a registered function in
    use declares its need, the word behind its dimensions: K auxiliary contexts, B rows, T
    completion length. Log-probabilities l are those of the realised tokens.
    """

    mask: Tensor = field(metadata=_described("BT", "bool: tokens that carry loss"))
    tokens: Tensor = field(metadata=_described("BT", "realised token ids"))
    teacher_logp: Tensor | None = _scored("BT", "teacher", "l+, at the distillation temperature")
    auxiliary_logp: Tensor | None = _scored("KBT", "auxiliary", "l^k, at temperature 1")
    auxiliary_present: Tensor | None = _scored("KB", "auxiliary", "bool: a row may have fewer contexts")
    negative_logp: Tensor | None = _scored("BT", "negative", "l- of the teacher under a wrong reference")
    negative_present: Tensor | None = _scored("B", "negative", "bool: the row has a wrong reference")
    negative_divergence: Tensor | None = _scored(
        "BT", "contrast", "KL(q||q-), at l-'s temperature; in mode topk of q's entries"
    )
    student_logp: Tensor | None = _scored("BT", "student", "l, by a student pass or the rollout itself")
    teacher_entropy: Tensor | None = _scored("BT", "entropy", "H(q)")
    divergence: Tensor | None = _scored("BT", "divergence", "D of student and teacher")
    # None unless the importance ratio is taken
    behaviour_logp: Tensor | None = _scored(
        "BT", None, "l' at which the token was drawn, NaN if nobody drew it"
    )
    score: Tensor | None = _scored("B", "verdict", "the grader's, from 0 to 1; NaN if it gave none")
    passed: Tensor | None = _scored("B", "verdict", "bool: the answer counts as solved")
    group: Tensor | None = _scored("B", "verdict", "int: the prompt that the answer is to")
    untempered_logp: Tensor | None = _scored("BT", "untempered", "l+, at temperature 1 as l^k is")


DIMS: Mapping[str, str] = {item.name: item.metadata["dims"] for item in fields(StepScores)}
NEED_OF: Mapping[str, str | None] = {item.name: item.metadata["need"] for item in fields(StepScores)}
NEEDS = frozenset(need for need in NEED_OF.values() if need is not None)


def select(scores: StepScores, rows: Tensor) -> StepScores:
    """Take the scores of some rows."""
    found = {name: value for name, value in vars(scores).items() if value is not None}
    return replace(
        scores,
        **{name: value[(slice(None),) * DIMS[name].index("B") + (rows,)] for name, value in found.items()},
    )


def concatenate(parts: Sequence[StepScores]) -> StepScores:
    """Stack rows; completions and contexts are padded to the longest and to the most."""

    def stacked(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        if any(value is None for value in values):
            return None
        rows = DIMS[name].index("B")
        most = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
        padded = []
        for value in values:
            missing = [0 if d == rows else most[d] - value.shape[d] for d in range(value.dim())]
            # `pad` counts from the last dimension, before and after
            grow = [count for d in reversed(missing) for count in (0, d)]
            padded.append(torch.nn.functional.pad(value, grow))
        return torch.cat(padded, dim=rows)

    return StepScores(**{name: stacked(name) for name in DIMS})  # type: ignore[arg-type]
