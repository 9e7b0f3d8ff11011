"""Score a whole optimizer step without gradient, all views in one sweep (Algorithm 1, line 2).

Which views there are, :mod:`unisd.scoring.views` says. They are read grouped by whose weights they
need: one switch for each set of weights. Kept are the hidden states of the teacher and of any view
whose whole distribution is compared (not logits: at 7B states are 42 times smaller), and of the
others one number or two per token.

Shapes: B rows of the step on this rank, T longest completion, T_i one completion, K auxiliary
contexts, N tokens of a forward pass, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unisd.backbone import Backbone
from unisd.batching import sent
from unisd.losses.chunked import chunked_loss, token_logprobs, token_scores
from unisd.losses.head import Head
from unisd.losses.terms import LossInputs, TargetStates
from unisd.methods.divergence import DivergenceSpec
from unisd.methods.scores import StepScores
from unisd.methods.targets import Source, Target
from unisd.scoring.findings import Findings, TeacherStates
from unisd.scoring.passes import Job, JobStates, Passes
from unisd.scoring.requests import ScoreRequest
from unisd.scoring.views import (
    AUXILIARY,
    STUDENT,
    TEACHER,
    WRONG_REFERENCE,
    Comparison,
    Reading,
    of_source,
    scored_views,
)
from unisd.teacher import Teacher


class Scorer:
    """Scores completions under the views that a run needs.

    Args:
        passes: makes the forward passes.
        weights: who scores, in this order: `teacher`, then those that the target's sources name
            beside it (base, step).
        spec: the divergence, and the temperature of all readings that are tempered.
        needs: what the active reliability weights and clips look at, of `methods.scores.NEEDS`.
        target: what takes the place of the teacher's distribution; None: nothing does.
        sources: of the target's sources those that need a pass of their own.
    """

    def __init__(
        self,
        passes: Passes,
        weights: Mapping[str, Teacher],
        spec: DivergenceSpec,
        *,
        needs: frozenset[str],
        target: Target | None = None,
        sources: Sequence[Source] = (),
    ) -> None:
        self.passes = passes
        self.weights = dict(weights)
        self.spec = spec
        self.needs = needs
        self.target = target
        self.sources = tuple(sources)

    def target_without_states(self, progress: float) -> TargetStates | None:
        """The target as the losses take it, with its sources' heads; None: there is no target.

        The states of its sources and the tokens that have them are filled in by each pass.

        Args:
            progress: share of the run's optimizer steps that are done, for targets with a schedule.
        """
        if self.target is None:
            return None
        return TargetStates(self.target, {}, self._source_heads(), {}, progress)

    def _source_heads(self) -> dict[Source, Head]:
        """Gather the heads of the target's sources (of a sharded model: a collective)."""
        return {
            source: teacher_head(self.passes.backbone, self.weights[source.weights])
            for source in self.sources
        }

    @property
    def _realised(self) -> bool:
        """Whether one number per token is enough of each source."""
        return self.target is not None and self.target.realised and self.spec.mode == "sampled"

    def score(
        self,
        requests: Sequence[ScoreRequest],
        device: torch.device | str,
        *,
        progress: float = 0.0,
        choose_rows: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[StepScores, TeacherStates]:
        """Score all views of all rows.

        Args:
            progress: see `target_without_states`.
            choose_rows: agreement's budget: `[B]` mean teacher entropies -> `[B]` bool, the rows
                whose auxiliary views are scored; None: all. The others count as rows without
                contexts.

        Returns:
            The scores, on the CPU, and the hidden states that the loss needs, on `device`.
        """
        self._source_heads()  # gathered now, while all ranks are here
        views = scored_views(self.needs, self.sources, self._realised)
        asks_student = bool(self.needs & STUDENT.needs)  # then both of its scores are there
        needs = self.needs | STUDENT.needs if asks_student else self.needs
        found = Findings(requests, views, needs)
        # After `found` was made: the fields of the views that are taken out are expected still.
        if self.spec.mode == "nll":  # asks no teacher
            views.remove(TEACHER)
        choose_rows = choose_rows if AUXILIARY in views else None
        if choose_rows is not None:
            views.remove(AUXILIARY)
        for name, weights in self.weights.items():
            jobs = [job for view in views if view.weights == name for job in found.jobs(view)]
            with self.passes.under(weights, merge_once=self.passes.layout.merge_once):
                head = self.passes.backbone.head()
                self._read(jobs, found, head, device)
                if name == "teacher":
                    if choose_rows is not None:
                        self._read_uncertain(found, head, device, choose_rows)
                    self._contrast(found, head)
        states = self._teacher_states(found, device)
        if asks_student:
            self._read_student(found, states, device, progress)
        return found.step_scores(), states

    def _read(self, jobs: Sequence[Job], found: Findings, head: Head, device: torch.device | str) -> None:
        """Make the passes of some jobs, and keep what their views want of them."""
        scores = []
        for group in self.passes.hidden_states(jobs, device):
            for states in group:
                found.keep(states)
            scores += self._token_scores(found.readings(group), found, head)
        for job, reading, logp_T, entropy_T in _on_cpu(scores):
            found.write(reading.logp, job, logp_T)
            found.write(reading.entropy, job, entropy_T)

    def _token_scores(
        self, wanted: Sequence[tuple[JobStates, Reading]], found: Findings, head: Head
    ) -> list[tuple[Job, Reading, Tensor]]:
        """Log-probability of the realised tokens and entropy `[2,T_i]` of each reading, left on the
        device; one projection for all of a temperature.
        """
        scores = []
        for temperature in sorted({self._temperature(reading) for _, reading in wanted}):
            alike = [(states, r) for states, r in wanted if self._temperature(r) == temperature]
            hidden_NH = torch.cat([states.final_TH for states, _ in alike])
            target_N = _targets([states for states, _ in alike])
            if any(reading.entropy in found.scores for _, reading in alike):
                scores_2N = torch.stack(token_scores(hidden_NH, head, target_N, temperature))
            else:  # the entropy is not looked at
                scores_2N = token_logprobs(hidden_NH, head, target_N, temperature).expand(2, -1)
            parts = torch.split(scores_2N, [len(states.final_TH) for states, _ in alike], dim=1)
            scores += [(states.job, r, part) for (states, r), part in zip(alike, parts, strict=True)]
        return scores

    def _temperature(self, reading: Reading) -> float:
        return self.spec.temperature if reading.tempered else 1.0

    def _read_uncertain(
        self,
        found: Findings,
        head: Head,
        device: torch.device | str,
        choose_rows: Callable[[Tensor], Tensor],
    ) -> None:
        """Read the auxiliary views of the rows that agreement's budget is spent on."""
        mask, entropy = found.scores["mask"], found.scores["teacher_entropy"]
        chosen_B = choose_rows(torch.where(mask, entropy, 0.0).sum(-1) / mask.sum(-1).clamp(min=1))
        self._read([job for job in found.jobs(AUXILIARY) if chosen_B[job.row]], found, head, device)
        found.scores["auxiliary_present"] &= chosen_B

    def _contrast(self, found: Findings, head: Head) -> None:
        """Compare the teacher under the right and the wrong reference, where that is needed:
        KL(q||q-) and l-, at the distillation temperature; in mode `topk` of q's largest entries.
        """
        fields = WRONG_REFERENCE.compared
        assert fields is not None
        group = list(found.states.get(WRONG_REFERENCE.name, {}).values())
        if group and fields.divergence in found.scores:
            mode = "topk" if self.spec.mode == "topk" else "full"
            kind: dict[str, Any] = {"mode": mode, "topk_support": "teacher", "topk_estimator": "support"}
            spec = replace(self.spec, alpha=0.0, entry_clip=None, **kind)
            teacher = self._teacher_final(found, group[0].final_TH.device)
            _write(found, fields, [self._compare(group, teacher, (head, head), spec)])

    def _teacher_final(self, found: Findings, device: torch.device | str) -> list[Tensor]:
        """The teacher's final hidden states `[T_i,H]` of all rows."""
        size = self.passes.backbone.head_module.in_features
        # Empty answers have no states: theirs are made, in the type of all others.
        dtype = next((states.final_TH.dtype for states in found.states[TEACHER.name].values()), None)
        return found.final(TEACHER, size, device, dtype)

    def _teacher_states(self, found: Findings, device: torch.device | str) -> TeacherStates:
        """Gather what the loss compares the student with."""
        final, kept = self._teacher_final(found, device), found.states[TEACHER.name]
        layers = {
            layer: [kept[i].layers_TH[layer] if i in kept else final[i] for i in range(len(final))]
            for layer in self.passes.layout.layers
        }
        states = TeacherStates(final, layers)
        for source in self.sources:
            view = of_source(source, self._realised)
            states.source_present[source] = found.present(view).any(0)
            if self._realised:
                states.source_logp[source] = found.scores[view.readings[0].logp]
            else:
                size = self.passes.backbone.head_module.in_features
                states.sources[source] = found.final(view, size, device)
        return states

    def _read_student(
        self, found: Findings, states: TeacherStates, device: torch.device | str, progress: float
    ) -> None:
        """Read the student without gradient: log-probs, and the divergence before any update."""
        assert STUDENT.compared is not None
        backbone = self.passes.backbone
        head_of_teacher = teacher_head(backbone, self.weights["teacher"])
        with self.passes.under():
            heads = (backbone.head(), head_of_teacher)
            target = self.target_without_states(progress)
            compared = []
            for group in self.passes.hidden_states(found.jobs(STUDENT), device):
                if target is not None:
                    values, present = _at_tokens(group, states, found.scores["mask"].shape[1])
                    target = replace(target, states=values, present=present)
                compared.append(self._compare(group, states.final, heads, self.spec, target))
            _write(found, STUDENT.compared, compared)

    def _compare(
        self,
        group: Sequence[JobStates],
        teacher: Sequence[Tensor],
        heads: tuple[Head, Head],
        spec: DivergenceSpec,
        target: TargetStates | None = None,
    ) -> Compared:
        """Log-probability and divergence from the teacher `[2,N]` of some states, without gradient,
        left on the device.

        teacher: final hidden states by row. heads: of `group` and of `teacher`.
        """
        hidden_NH = torch.cat([states.final_TH for states in group])
        of_teacher_NH = torch.cat([teacher[states.job.row] for states in group])
        target_N = _targets(group)
        nothing_N = torch.zeros(len(target_N), device=hidden_NH.device)
        compared = chunked_loss(
            LossInputs(hidden_NH, heads[0], of_teacher_NH, heads[1], target_N, spec, nothing_N, target=target)
        )
        return group, torch.stack([compared.student_logp_N, compared.divergence_N])


def _at_tokens(
    group: Sequence[JobStates], states: TeacherStates, width: int
) -> tuple[dict[Source, Tensor], dict[Source, Tensor]]:
    """What the target needs of the tokens of a pass, end to end."""
    device = group[0].final_TH.device

    def hidden(of_rows: Sequence[Tensor]) -> Tensor:
        return torch.cat([of_rows[one.job.row] for one in group])

    def scalar(value_BT: Tensor) -> Tensor:
        return torch.cat([value_BT[one.job.row, : len(one.final_TH)] for one in group]).to(device)

    return states.of_target(hidden, scalar, width)


def _on_cpu(
    found: Sequence[tuple[Job, Reading, Tensor]],
) -> Iterator[tuple[Job, Reading, Tensor, Tensor]]:
    """Copy the scores of all readings from the device at once: one wait, not one for each pass."""
    if found:
        together = torch.cat([scores_2T for _, _, scores_2T in found], dim=1).cpu()
        parts = torch.split(together, [scores_2T.shape[1] for _, _, scores_2T in found], dim=1)
        for (job, reading, _), (logp_T, entropy_T) in zip(found, parts, strict=True):
            yield job, reading, logp_T, entropy_T


Compared = tuple[Sequence[JobStates], Tensor]
"""Jobs of a pass and two numbers of each of their tokens, on the device."""


def _write(found: Findings, fields: Comparison, compared: Sequence[Compared]) -> None:
    """Copy what comparisons have found from the device at once, and write it."""
    group = [states for of_pass, _ in compared for states in of_pass]
    if group:
        together = torch.cat([values_2N for _, values_2N in compared], dim=1).cpu()
        parts = torch.split(together, [len(states.final_TH) for states in group], dim=1)
        for states, (logp_T, divergence_T) in zip(group, parts, strict=True):
            found.write(fields.logp, states.job, logp_T)
            found.write(fields.divergence, states.job, divergence_T)


def _targets(group: Sequence[JobStates]) -> Tensor:
    """The realised tokens of all views, end to end."""
    tokens = [token for states in group for token in states.job.completion]
    return sent(torch.tensor(tokens), group[0].final_TH.device)


def teacher_head(backbone: Backbone, teacher: Teacher) -> Head:
    """The head with the teacher's weights (they differ from the student's when the head is
    trained).
    """
    module = backbone.head_module
    weight, bias = module.weight, module.bias
    return backbone.head(teacher.weight(weight), None if bias is None else teacher.weight(bias))
