"""A step's rows cut into micro-batches, each with all that its loss needs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from unisd.batching import Batch, collate
from unisd.methods.scores import StepScores
from unisd.scoring.findings import TeacherStates
from unisd.scoring.requests import ScoreRequest


def rows_to_fill(rows: int, batch: int, rank: int, ranks: int) -> int:
    """How many rows at the end of a rank's last micro-batch of an epoch only fill it: accelerate
    repeats the epoch's first ones.
    """
    left = rows % (batch * ranks)
    return 0 if ranks == 1 or left == 0 else batch - min(max(left - rank * batch, 0), batch)


def alike(rows: Sequence[ScoreRequest], sizes: Sequence[int]) -> list[list[int]]:
    """Micro-batches of the given sizes, rows of like length together: the step's loss does not
    depend on how it is cut.
    """
    order = iter(sorted(range(len(rows)), key=lambda i: len(rows[i].student) + len(rows[i].completion)))
    return [list(islice(order, size)) for size in sizes]


def micro_batch(
    part: Sequence[int],
    rows: Sequence[ScoreRequest],
    scores: StepScores,
    states: TeacherStates,
    coefficients: dict[str, Tensor],
    *,
    packed: bool,
    pad_id: int,
    hidden_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """Rows `part` of this rank laid out for the student, with everything the loss needs at their N
    loss tokens.

    `scores` and `coefficients` are this rank's.
    """
    batch: Batch = collate([rows[i].student + rows[i].completion for i in part], packed, pad_id, device)
    chosen = torch.tensor(part)
    mask_BT = scores.mask[chosen]
    positions = [
        start + len(rows[i].student) - 1 + t
        for start, i in zip(batch.starts, part, strict=True)
        for t, carries_loss in enumerate(rows[i].loss_mask)
        if carries_loss
    ]

    def at_loss_tokens(value_BT: Tensor) -> Tensor:
        return value_BT[chosen][mask_BT].to(device)

    def states_at_loss_tokens(states_of_rows: Sequence[Tensor]) -> Tensor:
        # By number, not by mask: a mask would wait for the device.
        kept = []
        for i in part:
            chosen_of_row = [t for t, carries_loss in enumerate(rows[i].loss_mask) if carries_loss]
            if len(chosen_of_row) == len(states_of_rows[i]):
                kept.append(states_of_rows[i])
            elif chosen_of_row:
                kept.append(states_of_rows[i][torch.tensor(chosen_of_row, device=device)])
        return torch.cat(kept) if kept else torch.zeros(0, hidden_size, device=device)

    inputs: dict[str, Any] = {
        "part": list(part),
        "row_N": torch.tensor(
            [rows[i].number for i in part for kept in rows[i].loss_mask if kept],
            dtype=torch.long,
            device=device,
        ),
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask,
        "starts": batch.starts,
        "bounds": batch.bounds,
        "positions_N": torch.tensor(positions, dtype=torch.long, device=device),
        "targets_N": at_loss_tokens(scores.tokens),
        "teacher_NH": states_at_loss_tokens(states.final),
        "teacher_layers_NH": {
            layer: states_at_loss_tokens(of_rows) for layer, of_rows in states.layers.items()
        },
    }
    if states.source_present:
        inputs["target_states"], inputs["target_present_N"] = states.of_target(
            states_at_loss_tokens, at_loss_tokens, scores.mask.shape[1]
        )
    for name, value_BT in coefficients.items():
        inputs[f"{name}_coefficient_N"] = at_loss_tokens(value_BT)
    if "contrast" in coefficients and scores.negative_logp is not None:
        inputs["negative_logp_N"] = at_loss_tokens(scores.negative_logp)
    return inputs
