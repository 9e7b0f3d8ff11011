"""Keeps rollouts that serve several optimizer steps, and corrects for their age.

The importance correction is also for an engine with weights of its own.

A completion y was drawn from the policy of an earlier step, or by an engine whose arithmetic is not
the trainer's. With l the student's log-probability of the realised token now and l' the one it was
drawn with, each token's divergence is multiplied by the truncated ratio

    rho_it = min(exp(l_it - l'_it), importance_cap)

which multiplies D and not the normaliser: a mean over tokens stays one over all tokens.

Shapes: B rows of the step, T longest completion.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Sampler

from unisd.errors import UserError
from unisd.rollout.engine import Completion
from unisd.tasks.base import Verdict

FILE = "rollout.json"
Key = tuple[int, int]  # row of the dataset, generation


class RepeatedSteps(Sampler[int]):
    """Row numbers in shuffled order, the rows of each optimizer step `times` times in a row.

    Rows that do not fill a step at the end of an epoch are left out (another order lets them in, in
    the next epoch).

    Args:
        count: rows of the dataset.
        per_step: rows of an optimizer step, over all ranks.
        times: steps that share a rollout.
        seed: of the order.
        shuffled: else the rows come as they are.
        epoch: tells which pass this is; the order is that of (seed, epoch), on every rank and after
            a resume.
    """

    def __init__(
        self,
        count: int,
        per_step: int,
        times: int,
        seed: int,
        epoch: Callable[[], int],
        shuffled: bool = True,
    ) -> None:
        if count < per_step:
            raise UserError(
                f"num_iterations={times} needs a full step of {per_step} rows, but there are {count}: lower "
                "per_device_train_batch_size or gradient_accumulation_steps."
            )
        self.count, self.per_step, self.times, self.seed, self.epoch = count, per_step, times, seed, epoch
        self.shuffled = shuffled

    def __len__(self) -> int:
        return self.count // self.per_step * self.per_step * self.times

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        order = torch.randperm(self.count, generator=generator).tolist()
        order = order if self.shuffled else list(range(self.count))
        for first in range(0, len(self) // self.times, self.per_step):
            for _ in range(self.times):
                yield from order[first : first + self.per_step]


class RolloutStore:
    """The completions of the current rollout and the log-probabilities they were drawn with.

    Args:
        times: optimizer steps that a rollout serves (`num_iterations`).
    """

    def __init__(self, times: int) -> None:
        self.times = times
        self.step = -1  # optimizer step of the rollout
        self._kept: dict[Key, Completion] = {}

    def is_fresh(self, step: int) -> bool:
        """Whether step number `step` (from 0) begins with a new rollout."""
        return step % self.times == 0

    def completions(self, numbers: Sequence[Key], step: int) -> list[Completion]:
        """The completions that this step shares with the earlier ones of its rollout."""
        if self.step != step - step % self.times or any(key not in self._kept for key in numbers):
            raise UserError(
                f"step {step + 1} reuses the answers of step {step - step % self.times + 1}, which are not"
                " there: resume with the num_iterations, batch sizes and data of the checkpoint."
            )
        return [self._kept[key] for key in numbers]

    def keep(self, numbers: Sequence[Key], completions: Sequence[Completion], step: int) -> None:
        """Take over a new rollout."""
        self.step, self._kept = step, dict(zip(numbers, completions, strict=True))

    # -- checkpoints: the policy that drew them is gone, so they must be kept ----------------------

    def save(self, folder: str | Path, is_writer: bool, world_size: int) -> None:
        """Write the completions of all ranks (all must call)."""
        rows: list[Any] = [[*key, *_fields(c)] for key, c in self._kept.items()]
        if world_size > 1:
            rows = gather_object(rows)
        if is_writer:
            (Path(folder) / FILE).write_text(
                json.dumps({"step": self.step, "completions": rows}), encoding="utf-8"
            )

    def load(self, folder: str | Path) -> None:
        """Take over what `save` wrote, on any number of ranks; nothing if there is none."""
        path = Path(folder) / FILE
        if not path.is_file():
            return
        content = json.loads(path.read_text(encoding="utf-8"))
        self.step = content["step"]
        self._kept = {
            (row, generation): _completion(*fields) for row, generation, *fields in content["completions"]
        }


def _fields(c: Completion) -> tuple[Any, ...]:
    """A completion as a line of JSON keeps it."""
    return c.ids, c.truncated, c.logps, c.sampled, c.version, c.verdict and astuple(c.verdict), c.written


def _completion(*fields: Any) -> Completion:
    """A completion of `_fields`."""
    ids, truncated, logps, sampled, version, verdict, written = fields
    return Completion(ids, truncated, logps, sampled, version, verdict and Verdict(*verdict), written)


def behaviour_logp(completions: Sequence[Completion], width: int) -> Tensor:
    """l' [B,T] of completions that know it, NaN for all others."""
    found = torch.full((len(completions), width), math.nan, dtype=torch.float32)
    for i, completion in enumerate(completions):
        if completion.logps is not None:
            found[i, : len(completion.logps)] = torch.tensor(completion.logps)
    return found


def with_logps(completions: Sequence[Completion], student_logp: Tensor) -> list[Completion]:
    """Add the student's own log-probabilities `[B,T]` to what it has just sampled.

    Where the engine told none.
    """
    return [
        replace(c, logps=student_logp[i, : len(c.ids)].tolist()) if c.sampled and c.logps is None else c
        for i, c in enumerate(completions)
    ]
