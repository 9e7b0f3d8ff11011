"""What a training run measures on its evaluation rows, all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import gather_object

from unisd.data.rows import Row
from unisd.data.thoughts import completion_text
from unisd.distributed.collectives import on_all_ranks
from unisd.distributed.sharding import all_ranks_must_join
from unisd.evaluation.grading import grade_many
from unisd.evaluation.likelihood import reference_nll
from unisd.rollout.engine import Completion, Engine
from unisd.tasks.base import Grade


class Predictions(NamedTuple):
    """Answers to rows, their grades (None: there is no grader) and what was measured."""

    predictions: list[str]
    grades: list[Grade] | None
    metrics: dict[str, float]


def held_out(
    rows: Sequence[Row],
    model: Any,
    tokenizer: Any,
    accelerator: Accelerator,
    engine: Engine,
    answer: Callable[[Sequence[Row]], list[Completion]],
    grader: Callable[[Row, str], Any] | None,
    asked: bool = False,
) -> Predictions:
    """Measure `loss` (nats per token of the reference, given the plain prompt).

    With a grader also `accuracy` of what `answer` writes, by `engine` with the model's weights.

    asked: the rows are answered without a grader too, and need no references.
    """
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    joins = bool(mine) or all_ranks_must_join(model)
    nll, tokens = reference_nll(model, tokenizer, mine) if joins else (0.0, 0)
    texts: list[str] = []
    grades: list[Grade] = []
    if grader is not None or asked:
        engine.sync()  # on all ranks, those without rows too
        completions = on_all_ranks(accelerator, lambda: answer(mine) if joins else [])
        texts = [completion_text(tokenizer, completion.ids) for completion in completions]
    if grader is not None:
        grades = grade_many(grader, mine, texts)
    parts = [(nll, tokens, texts, grades)]
    if (ranks := accelerator.num_processes) > 1:
        parts = gather_object(parts)
    nll, tokens = sum(part[0] for part in parts), sum(part[1] for part in parts)
    metrics = {"loss": nll / max(tokens, 1)} if tokens or not asked else {}
    order = [(i % ranks, i // ranks) for i in range(len(rows))]  # of which rank, and where there
    if grader is not None:
        grades = [parts[rank][3][place] for rank, place in order]
        metrics["accuracy"] = sum(map(bool, grades)) / len(rows)
    if grader is not None or asked:
        texts = [parts[rank][2][place] for rank, place in order]
    return Predictions(texts, None if grader is None else grades, metrics)
