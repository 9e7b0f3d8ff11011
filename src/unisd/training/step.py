"""Hold what an optimizer step knows before its first gradient, and cut its rows into micro-batches.

Both are values: made in `get_batch_samples`, read in `compute_loss`, never changed, but for the
record that `deferred` keeps of its weights for the log.

Shapes: B rows of the step on this rank, T longest completion, N loss tokens of a micro-batch, H
hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from unisd.backbone import Captured
from unisd.batching import Batch, collate, sent, sent_together
from unisd.losses.head import Head
from unisd.losses.terms import LossInputs, LossTerm, TargetStates
from unisd.methods.divergence import DivergenceSpec
from unisd.methods.registry import Term
from unisd.methods.scores import StepScores
from unisd.scoring.findings import TeacherStates
from unisd.scoring.requests import ScoreRequest
from unisd.training.coefficients import DeferredWeights


def rows_to_fill(rows: int, batch: int, rank: int, ranks: int) -> int:
    """Count the rows that accelerate repeats to even out an epoch's last micro-batch over ranks.

    They stand at its end, and carry no loss.
    """
    left = rows % (batch * ranks)
    return 0 if ranks == 1 or left == 0 else batch - min(max(left - rank * batch, 0), batch)


def padding_rows(trainer: Trainer, rows: int) -> int:
    """Count them in the step that a trainer on so many `rows` is at; 0 but at an epoch's end."""
    args, accelerator = trainer.args, trainer.accelerator
    at_end = accelerator.gradient_state.end_of_dataloader
    if not at_end or args.dataloader_drop_last or args.num_iterations > 1:
        return 0
    return rows_to_fill(rows, trainer._train_batch_size, accelerator.process_index, accelerator.num_processes)


def group_by_length(rows: Sequence[ScoreRequest], sizes: Sequence[int]) -> list[list[int]]:
    """Micro-batches of the given sizes, rows of like length together: the step's loss does not
    depend on how it is cut.
    """
    order = iter(sorted(range(len(rows)), key=lambda i: len(rows[i].student) + len(rows[i].completion)))
    return [list(islice(order, size)) for size in sizes]


@dataclass(frozen=True)
class Layout:
    """How rows are laid out for the student's pass."""

    packed: bool
    pad_id: int
    hidden_size: int
    device: torch.device


@dataclass(frozen=True, eq=False)
class Step:
    """Everything that lines 1-3 of the algorithm found, of this rank's rows."""

    rows: Sequence[ScoreRequest]
    scores: StepScores
    states: TeacherStates
    weights_BT: Tensor  # reliability, as far as it is known before the student's pass
    coefficient_BT: Tensor  # of the divergence; normalised over all ranks
    terms: Sequence[tuple[Term, Tensor]]  # with their coefficients [B,T]
    token_clip: float | None
    clipped_BT: Tensor | None  # bool: the tokens above it, as scored; None: the student's pass tells
    teacher_head: Head
    target: TargetStates | None  # its heads and schedule; the states are those of each micro-batch
    deferred: DeferredWeights | None
    layout: Layout
    marks: Mapping[str, Tensor] = field(default_factory=dict)  # [B,T] of diagnostics: 1 or 0

    def micro_batch(self, part: Sequence[int]) -> MicroBatch:
        """The rows `part`, laid out for the student, with everything the loss needs."""
        rows, width = [self.rows[i] for i in part], self.scores.mask.shape[1]
        layout, device = self.layout, self.layout.device
        batch = collate([row.student + row.completion for row in rows], layout.packed, layout.pad_id, device)
        chosen = torch.tensor(part, dtype=torch.long)
        mask_BT = self.scores.mask[chosen]

        def at_loss_tokens(value_BT: Tensor) -> Tensor:
            return value_BT[chosen][mask_BT]

        places = _loss_places(batch, rows)
        every_token = len(places["places"]) == sum(len(row.completion) for row in rows)
        scalars = {name: at_loss_tokens(value_BT) for name, value_BT in self._scalars().items()}
        found = sent_together(places | scalars, device)

        def states_at_loss_tokens(states_of_rows: Sequence[Tensor]) -> Tensor:
            kept = [states_of_rows[i] for i in part if len(states_of_rows[i])]
            states = torch.cat(kept) if kept else torch.zeros(0, layout.hidden_size, device=device)
            # By number, not by mask: a mask would wait for the device.
            return states if every_token else states[found["places"]]

        target = self.target
        if target is not None:
            values, present = self.states.of_target(
                states_at_loss_tokens, lambda value_BT: sent(at_loss_tokens(value_BT), device), width
            )
            target = replace(target, states=values, present=present)
        return MicroBatch(
            step=self,
            part=list(part),
            batch=batch,
            row_N=found["rows"],
            positions_N=found["positions"],
            targets_N=found["targets"],
            teacher_NH=states_at_loss_tokens(self.states.final),
            teacher_layers_NH={
                layer: states_at_loss_tokens(of_rows) for layer, of_rows in self.states.layers.items()
            },
            target=target,
            coefficient_N=found["coefficient"],
            clipped_N=found.get("clipped"),
            terms=tuple(
                LossTerm(
                    term, found[f"term {term.name}"], found["negative"] if "negative" in term.needs else None
                )
                for term, _ in self.terms
            ),
            marks={name: found[f"mark {name}"] for name in self.marks},
        )

    def _scalars(self) -> dict[str, Tensor]:
        """What the host holds of each token `[B,T]` that a micro-batch needs."""
        known = {"targets": self.scores.tokens, "coefficient": self.coefficient_BT}
        known |= {f"term {term.name}": value_BT for term, value_BT in self.terms}
        known |= {f"mark {name}": value_BT for name, value_BT in self.marks.items()}
        if self.clipped_BT is not None:
            known["clipped"] = self.clipped_BT
        negative = self.scores.negative_logp
        if negative is not None and any("negative" in term.needs for term, _ in self.terms):
            known["negative"] = negative
        return known


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What `compute_loss` reads: rows of a step laid out for the student, and what its loss needs
    at their N loss tokens.
    """

    step: Step
    part: list[int]  # the numbers of its rows in the step
    batch: Batch
    row_N: Tensor  # dataset index of each loss token's row
    positions_N: Tensor  # into the flat batch: of the states that predict the loss tokens
    targets_N: Tensor
    teacher_NH: Tensor
    teacher_layers_NH: Mapping[int, Tensor]
    target: TargetStates | None
    coefficient_N: Tensor  # of the divergence
    clipped_N: Tensor | None  # as in the step
    terms: tuple[LossTerm, ...]
    marks: Mapping[str, Tensor]  # [N], as in the step

    @property
    def share(self) -> float:
        """Of the step's rows on this rank."""
        return len(self.part) / len(self.step.rows)

    @property
    def inputs(self) -> dict[str, Any]:
        """As the Trainer passes it on to `compute_loss`: it moves tensors, and counts
        `input_ids`.
        """
        return {**self.batch.inputs, "micro_batch": self}

    def at_loss_tokens(self, hidden: Tensor) -> Tensor:
        """The states `[N,H]` of a forward pass over the batch that predict the loss tokens."""
        return hidden.flatten(0, 1)[self.positions_N]

    def loss_inputs(self, student_NH: Tensor, head: Head, spec: DivergenceSpec) -> LossInputs:
        """What the loss is made of, but for terms of hidden states."""
        deferred = self.step.deferred
        return LossInputs(
            student_NH,
            head,
            self.teacher_NH,
            self.step.teacher_head,
            self.targets_N,
            spec,
            self.coefficient_N,
            self.step.token_clip,
            terms=tuple(term for term in self.terms if "hidden" not in term.term.needs),
            target=self.target,
            deferred=None if deferred is None else partial(deferred.factor, torch.tensor(self.part)),
            clipped_N=self.clipped_N,
        )

    @property
    def hidden_terms(self) -> tuple[LossTerm, ...]:
        """The terms that look at hidden states."""
        return tuple(term for term in self.terms if "hidden" in term.term.needs)

    def hidden_pairs(
        self, student_NH: Tensor, captured: Captured, layers: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """States `[N,H]` of student and teacher: the head's input or, where there are any, those of
        `layers`.
        """
        if not layers:
            return [(student_NH, self.teacher_NH)]
        return [
            (self.at_loss_tokens(captured.layers[layer]), self.teacher_layers_NH[layer]) for layer in layers
        ]


def _loss_places(batch: Batch, rows: Sequence[ScoreRequest]) -> dict[str, Tensor]:
    """Of each loss token, on the host: its row's number in the dataset, the flat index of the state
    that predicts it, and its place among the tokens of all completions, end to end.
    """
    lengths = torch.tensor([len(row.loss_mask) for row in rows], dtype=torch.long)
    mask = torch.tensor(list(chain.from_iterable(row.loss_mask for row in rows)), dtype=torch.bool)
    places = mask.nonzero()[:, 0]
    before = [start + len(row.student) - 1 for start, row in zip(batch.starts, rows, strict=True)]
    first = torch.tensor(before, dtype=torch.long) - (lengths.cumsum(0) - lengths)
    numbers = torch.tensor([row.number for row in rows], dtype=torch.long)
    return {
        "rows": numbers.repeat_interleave(lengths)[places],
        "positions": first.repeat_interleave(lengths)[places] + places,
        "places": places,
    }
