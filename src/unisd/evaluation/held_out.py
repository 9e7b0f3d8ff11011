"""What a training run measures on its evaluation rows, all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from unisd.data.rows import Row
from unisd.data.thoughts import completion_text
from unisd.distributed.collectives import on_all_ranks
from unisd.distributed.sharding import all_ranks_must_join
from unisd.evaluation.grading import grade_many
from unisd.evaluation.likelihood import reference_nll
from unisd.rollout.engine import Completion, Engine


def held_out(
    rows: Sequence[Row],
    model: Any,
    tokenizer: Any,
    accelerator: Accelerator,
    engine: Engine,
    answer: Callable[[Sequence[Row]], list[Completion]],
    grader: Callable[[Row, str], Any] | None,
) -> dict[str, float]:
    """Measure `loss` (nats per token of the reference, given the plain prompt).

    With a grader also `accuracy` of what `answer` writes, by `engine` with the model's weights.
    """
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    joins = bool(mine) or all_ranks_must_join(model)
    nll, tokens = reference_nll(model, tokenizer, mine) if joins else (0.0, 0)
    correct = 0
    if grader is not None:
        engine.sync()  # on all ranks, those without rows too
        completions = on_all_ranks(accelerator, lambda: answer(mine) if joins else [])
        texts = [completion_text(tokenizer, completion.ids) for completion in completions]
        correct = sum(map(bool, grade_many(grader, mine, texts)))
    sums = torch.tensor([nll, tokens, correct], dtype=torch.float64)
    if accelerator.num_processes > 1:
        sums = torch.tensor(gather_object([sums.tolist()]), dtype=torch.float64).sum(0)
    found = {"loss": float(sums[0] / sums[1].clamp_min(1))}
    if grader is not None:
        found["accuracy"] = float(sums[2]) / len(rows)
    return found
