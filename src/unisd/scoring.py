"""The phase without gradient: every view of a whole optimizer step, in one sweep (Algorithm 1, line 2).

All views of all rows are sorted by length and packed to a token budget under one switch of the teacher's weights. Kept are the primary
teacher's hidden states (not logits: at 7B they are 42 times smaller) and one number per token for every other view.

Shapes: B rows of the step on this rank, T longest completion, K auxiliary contexts, N tokens of a forward pass, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from unisd.backbone import Backbone, lay_out
from unisd.losses import DivergenceSpec, Head, LossOutput, chunked_loss, token_scores
from unisd.mechanisms import StepScores
from unisd.rollout import generating
from unisd.teacher import Teacher


@dataclass(frozen=True)
class ScoringRow:
    """One completion and the prompts it is scored under."""

    completion: list[int]
    loss_mask: list[bool]
    student: list[int]
    teacher: list[int]
    negative: list[int] | None = None
    auxiliary: list[list[int]] = field(default_factory=list)


@dataclass
class TeacherStates:
    """What the student is compared with: per row the teacher's final hidden states `[T_i,H]`, and those of listed layers."""

    final: list[Tensor]
    layers: dict[int, list[Tensor]]


def forward_batches(lengths: Sequence[int], budget: int, packed: bool) -> list[list[int]]:
    """Group sequences, longest first, so that no forward pass holds more than `budget` tokens (or a single sequence)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    used = 0
    for i in order:
        cost = lengths[i] if packed or not batches else lengths[batches[-1][0]]
        if not batches or used + cost > budget:
            batches.append([])
            used = 0
            cost = lengths[i]
        batches[-1].append(i)
        used += cost
    return batches


@dataclass(frozen=True)
class _Job:
    """One sequence to score: which view, of which row."""

    view: str  # primary, negative, auxiliary or student
    row: int
    context: int  # number of the auxiliary context
    prompt: list[int]


@dataclass(frozen=True)
class _View:
    """What a forward pass left of one job: the states that predict the completion, final `[T_i,H]` and of listed layers."""

    job: _Job
    final_TH: Tensor
    layers_TH: dict[int, Tensor]


class Scorer:
    """Scores completions under teacher views.

    Args:
        backbone: the model, shared by student and teacher.
        teacher: its other weights.
        spec: divergence (its temperature applies to all views but the auxiliary ones).
        needs: what the active reliability weights and clips declare: auxiliary, negative, student, entropy, divergence.
        packed: rows end to end, or padded.
        token_budget: most tokens per forward pass.
        layers: further layers to keep of the primary teacher.
        autocast: makes the context of a forward pass (mixed precision as in training).
        choose_rows: agreement's budget: `[B]` mean teacher entropies -> `[B]` bool, the rows whose auxiliary views are scored;
            None: all. The others count as rows without contexts.
    """

    def __init__(
        self,
        backbone: Backbone,
        teacher: Teacher,
        spec: DivergenceSpec,
        *,
        needs: frozenset[str],
        packed: bool,
        token_budget: int,
        pad_id: int,
        layers: Sequence[int] = (),
        autocast: Any = None,
        choose_rows: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.choose_rows = choose_rows
        self.backbone = backbone
        self.teacher = teacher
        self.spec = spec
        self.needs = needs
        self.packed = packed
        self.token_budget = token_budget
        self.pad_id = pad_id
        self.layers = tuple(layers)
        self._autocast = autocast

    def _context(self) -> AbstractContextManager[Any]:
        return self._autocast() if self._autocast is not None else torch.autocast("cpu", enabled=False)

    def score(self, rows: Sequence[ScoringRow], device: torch.device | str) -> tuple[StepScores, TeacherStates]:
        """All views of all rows. The returned scores live on the CPU, the hidden states on `device`."""
        B = len(rows)
        T = max((len(row.completion) for row in rows), default=0)
        K = max((len(row.auxiliary) for row in rows), default=0)
        zeros = torch.zeros(B, T)
        mask, tokens = zeros.bool(), zeros.long()
        for i, row in enumerate(rows):
            mask[i, : len(row.loss_mask)] = torch.tensor(row.loss_mask, dtype=torch.bool)
            tokens[i, : len(row.completion)] = torch.tensor(row.completion, dtype=torch.long)
        teacher_logp, negative_logp, entropy = zeros.clone(), zeros.clone(), zeros.clone()
        auxiliary_logp = torch.zeros(K, B, T)
        states = TeacherStates([zeros] * B, {layer: [zeros] * B for layer in self.layers})
        jobs = [_Job("primary", i, 0, row.teacher) for i, row in enumerate(rows)]
        if self.spec.mode == "nll":  # no teacher: the shapes stay, nothing is scored
            size = self.backbone.head_module.in_features
            states.final, jobs = [torch.zeros(len(row.completion), size, device=device) for row in rows], []
        if "negative" in self.needs:
            jobs += [_Job("negative", i, 0, row.negative) for i, row in enumerate(rows) if row.negative is not None]
        auxiliary = [_Job("auxiliary", i, k, prompt) for i, row in enumerate(rows) for k, prompt in enumerate(row.auxiliary)]
        if "auxiliary" in self.needs and self.choose_rows is None:
            jobs += auxiliary
        auxiliary_present = torch.tensor([[k < len(row.auxiliary) for row in rows] for k in range(K)], dtype=torch.bool)
        auxiliary_present = auxiliary_present.reshape(K, B)

        def record(jobs: Sequence[_Job]) -> None:
            for group in self._hidden_states(jobs, rows, device):
                for view, logp_T, entropy_T in self._token_scores(group, rows, head):
                    job, length = view.job, len(logp_T)
                    if job.view == "primary":
                        teacher_logp[job.row, :length] = logp_T
                        entropy[job.row, :length] = entropy_T
                        states.final[job.row] = view.final_TH
                        for layer, hidden_TH in view.layers_TH.items():
                            states.layers[layer][job.row] = hidden_TH
                    elif job.view == "negative":
                        negative_logp[job.row, :length] = logp_T
                    else:
                        auxiliary_logp[job.context, job.row, :length] = logp_T

        with generating(self.backbone.causal_lm), self.teacher.in_place(), self._context():
            head = self.backbone.head()
            record(jobs)
            if "auxiliary" in self.needs and self.choose_rows is not None:
                chosen_B = self.choose_rows(torch.where(mask, entropy, 0.0).sum(-1) / mask.sum(-1).clamp(min=1))
                record([job for job in auxiliary if chosen_B[job.row]])
                auxiliary_present &= chosen_B

        scores = StepScores(
            mask=mask,
            tokens=tokens,
            teacher_logp=teacher_logp,
            auxiliary_logp=auxiliary_logp if "auxiliary" in self.needs else None,
            auxiliary_present=auxiliary_present if "auxiliary" in self.needs else None,
            negative_logp=negative_logp if "negative" in self.needs else None,
            negative_present=torch.tensor([row.negative is not None for row in rows]) if "negative" in self.needs else None,
            student_logp=None,
            teacher_entropy=entropy if "entropy" in self.needs else None,
            divergence=None,
        )
        if self.needs & {"student", "divergence"}:
            scores = self._add_student(scores, rows, states, device)
        return scores, states

    def _add_student(
        self, scores: StepScores, rows: Sequence[ScoringRow], states: TeacherStates, device: torch.device | str
    ) -> StepScores:
        """One student pass without gradient: its log-probabilities and the divergence before any update."""
        student_logp, divergence = torch.zeros_like(scores.teacher_logp), torch.zeros_like(scores.teacher_logp)
        head_of_teacher = teacher_head(self.backbone, self.teacher)
        jobs = [_Job("student", i, 0, row.student) for i, row in enumerate(rows)]
        with generating(self.backbone.causal_lm), self._context():
            head = self.backbone.head()
            for group in self._hidden_states(jobs, rows, device):
                student_NH = torch.cat([view.final_TH for view in group])
                teacher_NH = torch.cat([states.final[view.job.row] for view in group])
                target_N = _targets(group, rows, student_NH.device)
                compared = _compare(student_NH, head, teacher_NH, head_of_teacher, target_N, self.spec)
                lengths = [len(view.final_TH) for view in group]
                logps, divergences = (
                    torch.split(value.cpu(), lengths) for value in (compared.student_logp_N, compared.divergence_N)
                )
                for view, logp_T, divergence_T in zip(group, logps, divergences, strict=True):
                    student_logp[view.job.row, : len(logp_T)] = logp_T
                    divergence[view.job.row, : len(logp_T)] = divergence_T
        return replace(scores, student_logp=student_logp, divergence=divergence)

    def _token_scores(
        self, group: Sequence[_View], rows: Sequence[ScoringRow], head: Head
    ) -> Iterator[tuple[_View, Tensor, Tensor]]:
        """Log-probability of the realised tokens and entropy `[T_i]` of each view, on the CPU; one projection for all."""
        for temperature in sorted({self._temperature(view) for view in group}):
            alike = [view for view in group if self._temperature(view) == temperature]
            hidden_NH = torch.cat([view.final_TH for view in alike])
            logp_N, entropy_N = token_scores(hidden_NH, head, _targets(alike, rows, hidden_NH.device), temperature)
            lengths = [len(view.final_TH) for view in alike]
            yield from zip(alike, torch.split(logp_N.cpu(), lengths), torch.split(entropy_N.cpu(), lengths), strict=True)

    def _temperature(self, view: _View) -> float:
        return 1.0 if view.job.view == "auxiliary" else self.spec.temperature

    def _hidden_states(
        self, jobs: Sequence[_Job], rows: Sequence[ScoringRow], device: torch.device | str
    ) -> Iterator[list[_View]]:
        """The views of each forward pass: hidden states at the positions that predict the completion."""
        jobs = [job for job in jobs if rows[job.row].completion]
        sequences = [job.prompt + rows[job.row].completion for job in jobs]
        for chosen in forward_batches([len(s) for s in sequences], self.token_budget, self.packed):
            batch = lay_out([sequences[i] for i in chosen], self.packed, self.pad_id, device)
            with self.backbone.capture(self.layers) as captured:
                self.backbone.decoder(**batch.inputs, use_cache=False)
            assert captured.final is not None
            final_NH = captured.final.flatten(0, 1)
            group = []
            for start, i in zip(batch.starts, chosen, strict=True):
                job = jobs[i]
                first = start + len(job.prompt) - 1
                span = slice(first, first + len(rows[job.row].completion))
                kept = captured.layers.items() if job.view == "primary" else ()
                # Cloned, so that a row's states do not keep the whole forward pass alive.
                layers_TH = {layer: hidden.flatten(0, 1)[span].clone() for layer, hidden in kept}
                group.append(_View(job, final_NH[span].clone(), layers_TH))
            yield group


def _targets(group: Sequence[_View], rows: Sequence[ScoringRow], device: torch.device | str) -> Tensor:
    """The realised tokens of all views, end to end."""
    return torch.tensor([token for view in group for token in rows[view.job.row].completion], device=device)


def teacher_head(backbone: Backbone, teacher: Teacher) -> Head:
    """The head with the teacher's weights (they differ from the student's when the head is trained)."""
    module = backbone.head_module
    weight, bias = module.weight, module.bias
    return backbone.head(teacher.weight(weight), None if bias is None else teacher.weight(bias))


def _compare(
    student_TH: Tensor, student_head: Head, teacher_TH: Tensor, teacher_head: Head, target_T: Tensor, spec: DivergenceSpec
) -> LossOutput:
    """Divergence, log-probability and entropy per token, without gradient."""
    nothing_T = torch.zeros(len(target_T), device=student_TH.device)
    return chunked_loss(student_TH, student_head, teacher_TH, teacher_head, target_T, spec, nothing_T)
