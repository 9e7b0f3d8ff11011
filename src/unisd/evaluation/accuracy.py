"""Measures what a model can do: greedy accuracy, on rows that several processes may share.

The model is as before afterwards: training mode, generation config and adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from unisd.console import show_progress
from unisd.data.thoughts import completion_text
from unisd.evaluation.grading import grade_many, summarize
from unisd.evaluation.likelihood import Ids, _ids
from unisd.models.tokens import eos_ids, pad_id
from unisd.rollout.decoding import decode, default_batch_size
from unisd.tasks.base import Grade, Row

Interval = dict[str, float]


# ---------------------------------------------------------------- several processes


def _in_shares(work: Callable[[Sequence[Any]], list[Any]], items: Sequence[Any]) -> list[Any]:
    """Do `work(items)`, one result for each, a share on each rank; all get all results.

    All ranks of a training must call.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1:
        return work(items)
    parts: list[list[Any]] = [[] for _ in range(ranks)]
    mine = items[dist.get_rank() :: ranks]
    # A rank without a share does an item again: of a sharded model all must generate.
    done = work(mine) if mine or not items else work(items[:1])[:0]
    dist.all_gather_object(parts, done)
    return [parts[i % ranks][i // ranks] for i in range(len(items))]


# ---------------------------------------------------------------- generation


def generate_greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Ids | str | list[dict[str, Any]]],
    max_new_tokens: int = 256,
    batch_size: int | None = None,
    progress: bool | None = None,
    description: str = "generating",
) -> list[list[int]]:
    """Greedy completions (token ids up to and with the first end token) of prompts, in their order.

    Args:
        prompts: token ids as they are; a string or chat messages are rendered by
            `prompts.encode_prompt`.
        batch_size: prompts at a time; None: 48 on a CPU, 256 on an accelerator.
        progress: a bar on stderr; None: only where stderr is a terminal, after a few seconds.
    """
    at_once = batch_size or default_batch_size(model.device)
    ends = eos_ids(model, tokenizer)
    pad = pad_id(model, tokenizer)

    def write(mine: Sequence[Ids | str | list[dict[str, Any]]]) -> list[list[int]]:
        with show_progress(description, len(mine), progress) as advance:
            return decode(
                model, [_ids(tokenizer, p) for p in mine], max_new_tokens,
                eos_ids=ends, pad_id=pad, batch_size=at_once, on_rows=advance,
            )  # fmt: skip

    return _in_shares(write, prompts)


def accuracy(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    grade: Callable[[Row, str], Grade | bool],
    *,
    max_new_tokens: int = 256,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Greedy accuracy on rows, overall and by the column `skill`.

    Args:
        grade: `(row, completion) -> Grade` (a task's `grade`) or a bool.

    Returns:
        `overall` and each of `by_skill` as `wilson` gives them; `outcomes` (how many are right,
        wrong, unanswered and ambiguous; None where the grader only says right or wrong), `details`
        (means of the grader's further figures), `completions` (texts), `completion_ids`, `grades`.
    """
    prompts = [row["prompt"] for row in rows]
    ids = generate_greedy(model, tokenizer, prompts, max_new_tokens, batch_size, progress)
    texts = [completion_text(tokenizer, one) for one in ids]

    def graded(pairs: Sequence[tuple[Row, str]]) -> list[Grade]:
        return grade_many(grade, [row for row, _ in pairs], [text for _, text in pairs])

    grades = _in_shares(graded, list(zip(rows, texts, strict=True)))
    found = summarize(rows, [[one] for one in grades])
    says = any(one.extracted is not None or one.reason for one in grades)  # a plain bool does not
    return {
        "overall": found["accuracy"],
        "by_skill": found["by_skill"],
        "outcomes": found["outcomes"] if says else None,
        "details": found["details"],
        "completions": texts,
        "completion_ids": ids,
        "grades": grades,
    }
