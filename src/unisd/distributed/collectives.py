"""Small agreements between processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from unisd.errors import OutOfMemory, RolloutError, UserError
from unisd.methods.scores import StepScores, concatenate

Result = TypeVar("Result")


def gather_scores(accelerator: Accelerator, scores: StepScores) -> tuple[slice, StepScores]:
    """The scores of all ranks, and which rows of them are this rank's."""
    count = len(scores.mask)
    if accelerator.num_processes == 1:
        return slice(0, count), scores
    parts: list[StepScores] = gather_object([scores])
    first = sum(len(part.mask) for part in parts[: accelerator.process_index])
    return slice(first, first + count), concatenate(parts)


def on_any_rank(flag: bool, world_size: int) -> bool:
    """Whether any rank says so (a collective: all ranks must ask)."""
    return flag if world_size == 1 else any(gather_object([flag]))


def on_all_ranks(accelerator: Accelerator, rollout: Callable[[], Result]) -> Result:
    """Return what `rollout` returns; where one rank raises `UserError`, all raise `RolloutError`.

    So none waits for the others.
    """
    found: list[Result] = []
    failure: str | None = None
    try:
        found.append(rollout())
    except UserError as error:
        if isinstance(error, OutOfMemory) and accelerator.distributed_type in (
            DistributedType.FSDP,
            DistributedType.DEEPSPEED,
        ):
            # the others wait inside a forward pass of all ranks, and would take a message for a
            # part of it
            raise
        failure = str(error)
    failures = [failure] if accelerator.num_processes == 1 else gather_object([failure])
    if any(failures):
        raise RolloutError(next(text for text in failures if text))
    return found[0]
