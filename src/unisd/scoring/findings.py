"""What the scoring phase finds: scores on the CPU, hidden states on the device.

Shapes: B rows of the step on this rank, T longest completion, T_i one completion, K auxiliary
contexts, N chosen tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unisd.methods.scores import DIMS, NEED_OF, StepScores
from unisd.methods.targets import Source
from unisd.scoring.passes import Job, JobStates
from unisd.scoring.requests import ScoreRequest
from unisd.scoring.views import Reading, View


@dataclass
class TeacherStates:
    """What the student is compared with: per row the teacher's final hidden states `[T_i,H]`, and
    those of listed layers.
    """

    final: list[Tensor]
    layers: dict[int, list[Tensor]]
    # of the target: final hidden states [T_i,H]
    sources: dict[Source, list[Tensor]] = field(default_factory=dict)
    source_logp: dict[Source, Tensor] = field(default_factory=dict)  # or realised log-probabilities [B,T]
    source_present: dict[Source, Tensor] = field(default_factory=dict)  # [B] bool

    def of_target(
        self, hidden: Callable[[Sequence[Tensor]], Tensor], scalar: Callable[[Tensor], Tensor], length: int
    ) -> tuple[dict[Source, Tensor], dict[Source, Tensor]]:
        """Per source its states `[N,H]` or log-probabilities `[N]`, and which tokens have it.

        By two ways to select.
        """
        values = {source: hidden(of_rows) for source, of_rows in self.sources.items()}
        values |= {source: scalar(logp_BT) for source, logp_BT in self.source_logp.items()}
        present = {
            source: scalar(of_rows_B[:, None].expand(-1, length))
            for source, of_rows_B in self.source_present.items()
        }
        return values, present


class Findings:
    """Collects what the passes of a step find: scores on the CPU, states on the device."""

    def __init__(
        self, requests: Sequence[ScoreRequest], views: Sequence[View], needs: frozenset[str]
    ) -> None:
        self.requests = requests
        self.views = {view.name: view for view in views}
        B = len(requests)
        T = max((len(request.completion) for request in requests), default=0)
        K = max((len(request.auxiliary) for request in requests), default=0)
        size = {"B": B, "T": T, "K": K}
        # fields of `StepScores`; log-probabilities of a target's source under its own name
        wanted = {name for name, need in NEED_OF.items() if need in needs}
        wanted |= {reading.logp for view in views for reading in view.readings} - NEED_OF.keys()
        self.scores = {
            name: torch.zeros([size[d] for d in DIMS.get(name, "BT")], dtype=torch.float32) for name in wanted
        }
        self.scores |= {"mask": torch.zeros(B, T).bool(), "tokens": torch.zeros(B, T).long()}
        for i, request in enumerate(requests):
            loss_mask = torch.tensor(request.loss_mask, dtype=torch.bool)
            self.scores["mask"][i, : len(loss_mask)] = loss_mask
            self.scores["tokens"][i, : len(request.completion)] = torch.tensor(
                request.completion, dtype=torch.long
            )
        for view in views:
            if view.present is not None:
                present_KB = self.present(view)
                self.scores[view.present] = present_KB if "K" in DIMS[view.present] else present_KB.any(0)
        # by view and row, in the order of the passes
        self.states: dict[str, dict[int, JobStates]] = {view.name: {} for view in views}

    def present(self, view: View) -> Tensor:
        """`[K,B]` bool: which of a view's prompts each row has (of most views one)."""
        prompts = [view.prompts(request) for request in self.requests]
        most = max(map(len, prompts), default=0)
        told = [[k < len(of_row) and of_row[k] is not None for of_row in prompts] for k in range(most)]
        return torch.tensor(told, dtype=torch.bool).reshape(most, len(prompts))

    def jobs(self, view: View) -> list[Job]:
        """What there is to read of a view, row by row."""
        return [
            Job(view.name, i, prompt, request.completion, k, view.keeps_layers)
            for i, request in enumerate(self.requests)
            for k, prompt in enumerate(view.prompts(request))
            if prompt is not None
        ]

    def readings(self, group: Sequence[JobStates]) -> list[tuple[JobStates, Reading]]:
        """What is to be projected of a pass: first readings first, in the order of the pass."""
        found = [
            (place, states, reading)
            for states in group
            for place, reading in enumerate(self.views[states.job.view].readings)
            if {reading.logp, reading.entropy} & self.scores.keys()
        ]
        return [(states, reading) for _, states, reading in sorted(found, key=lambda item: item[0])]

    def keep(self, states: JobStates) -> None:
        """Keep the states of a view that wants it."""
        if self.views[states.job.view].keeps_states:
            self.states[states.job.view][states.job.row] = states

    def write(self, name: str | None, job: Job, value_T: Tensor) -> None:
        """Write the scores of one job into a field, where that is needed."""
        if name in self.scores:
            field_BT = self.scores[name][job.context] if self.scores[name].dim() == 3 else self.scores[name]
            field_BT[job.row, : len(value_T)] = value_T

    def final(
        self, view: View, hidden_size: int, device: torch.device | str, dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """Final hidden states `[T_i,H]` of all rows; zeros for those that lack the view."""
        kept = self.states[view.name]
        return [
            kept[i].final_TH
            if i in kept
            else torch.zeros(len(request.completion), hidden_size, device=device, dtype=dtype)
            for i, request in enumerate(self.requests)
        ]

    def step_scores(self) -> StepScores:
        return StepScores(**{name: self.scores.get(name) for name in DIMS})  # type: ignore[arg-type]
