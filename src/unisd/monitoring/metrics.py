"""Collects what a step did over micro-batches and ranks: a line of `metrics.jsonl` per step.

An evaluation during training has a line of its own, after that of its step.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce as over_ranks
from torch import Tensor

from unisd.files import append_line, is_evaluation, keep_until


class StepMetrics:
    """Metrics of the optimizer step in progress, and of the steps since the last log line.

    Args:
        path: `metrics.jsonl`; only rank 0 writes.
        device: where sums over ranks are formed.
        world_size: number of ranks.
    """

    def __init__(self, path: Path, device: torch.device, world_size: int) -> None:
        self.path = path
        self.device = device
        self.world_size = world_size
        self.phases: dict[str, float] = dict.fromkeys(
            ("rollout", "score", "student", "update", "eval", "diagnostics"), 0.0
        )
        self.values: dict[str, float] = {}  # already means over all ranks
        # over micro-batches of this rank: numbers, and what still lies on the device
        self._sums: dict[str, list[Tensor | float]] = {}
        self._marked: dict[str, list[Tensor | float]] = {}
        self._unlogged: list[dict[str, float]] = []

    def add(self, **values: Tensor | float) -> None:
        """Add to this rank's sums over micro-batches."""
        for name, value in values.items():
            self._sums.setdefault(name, []).append(value)

    def mark(self) -> None:
        """Remember the sums: before the first micro-batch."""
        self._marked = {name: list(parts) for name, parts in self._sums.items()}

    def rewind(self) -> None:
        """Back to the mark: the micro-batches are done again."""
        self._sums = {name: list(parts) for name, parts in self._marked.items()}

    def sum_of(self, name: str) -> Tensor | float:
        """This rank's sum so far, left on the device."""
        return reduce(add, self._sums.get(name, [0.0]))

    def _fetched(self) -> dict[str, float]:
        """This rank's sums, for which the device is asked once."""
        parts = [value for values in self._sums.values() for value in values if isinstance(value, Tensor)]
        on_device = [torch.as_tensor(value, dtype=torch.float32, device=self.device) for value in parts]
        found = iter(torch.stack(on_device).cpu().numpy() if parts else ())
        return {
            name: float(
                reduce(add, [next(found) if isinstance(value, Tensor) else value for value in values])
            )
            for name, values in self._sums.items()
        }

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the wall time to a phase, in seconds.

        A device works asynchronously: what it is still to do counts where its values are asked for,
        which is the last thing that a phase does.
        """
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.phases[phase] += seconds
        if phase != "eval":
            key = f"step_time/{phase}"
            self.values[key] = self.values.get(key, 0.0) + seconds

    def finish(self, step: int, is_writer: bool) -> dict[str, float]:
        """End optimizer step number `step`: reduce the sums over ranks and append one line.

        Returns its values.
        """
        with self.timed("update"):
            sums = self._fetched()
        if self.world_size > 1:
            names = sorted(sums)
            of_rank = torch.tensor([sums[name] for name in names], device=self.device)
            sums = dict(zip(names, over_ranks(of_rank, "sum").tolist(), strict=True))
        values = self.values
        # Every rank's loss was multiplied by the number of ranks, against DDP's averaging.
        values["loss"] = sums["loss"] / self.world_size
        values["completions/loss_tokens"] = sums["tokens"]
        values["teacher/overlong_views"] = sums["overlong_views"]
        if "weight_distance" in sums:  # the same on every rank
            values["teacher/weight_distance"] = sums["weight_distance"] / self.world_size
        if sums["tokens"]:
            values |= _per_token(sums)
        values |= _of_terms(sums)
        # a sync is within rollout
        values["step_time"] = sum(values.get(f"step_time/{phase}", 0.0) for phase in self.phases)
        if is_writer:
            line: dict[str, Any] = {
                "step": step,
                "loss": values["loss"],
                "learning_rate": values["learning_rate"],
            }
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(line | values)) + "\n")
        self._unlogged.append(values)
        self.values, self._sums = {}, {}
        return values

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Append the line of an evaluation that followed optimizer step number `step`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.path, {"step": step, **_finite(values)})

    def take_means(self) -> dict[str, float]:
        """Means over the steps since the last call, without what the Trainer logs itself."""
        steps, self._unlogged = self._unlogged, []
        names = sorted({name for step in steps for name in step} - {"loss", "learning_rate"})
        return {name: mean([step[name] for step in steps if name in step]) for name in names}

    def forget_after(self, step: int) -> list[dict[str, Any]]:
        """Drop lines of steps that a resumed run does again; returns those of earlier steps.

        And a line that a kill cut short.
        """
        return [line for line in keep_until(self.path, step) if not is_evaluation(line)]


PER_TOKEN = {
    "teacher/divergence": "divergence",
    "teacher/logp": "teacher_logp",
    "student/entropy": "entropy",
    "student/logp": "student_logp",
    "clip/share": "clipped",
    "leak/answer_token_share": "answer_tokens",
}
"""Means over the tokens with loss, and the sums that they are of.

A step whose answers all carry none has not measured them: zero would read as a collapse.
"""


def _per_token(sums: Mapping[str, float]) -> dict[str, float]:
    values = {name: sums[of] / sums["tokens"] for name, of in PER_TOKEN.items() if of in sums}
    if "teacher_logp" not in sums:  # there is no teacher: it is the loss's negative log-likelihood
        del values["teacher/divergence"]
    if "style_loss" in sums:
        values["words/style_loss_share"] = sums["style_loss"] / (sums["whole_loss"] or 1.0)
        values["leak/answer_loss_share"] = sums["answer_loss"] / (sums["whole_loss"] or 1.0)
    return values


TERM_METRICS = {
    "contrast": ("contrastive/loss", "contrastive/active_share"),
    "features": ("features/distance", ""),
}
"""The names of a term's mean and share of tokens with a gradient, where they are not `term/...`."""


def _of_terms(sums: Mapping[str, float]) -> dict[str, float]:
    """Means of the loss's terms over the tokens that have them."""
    values: dict[str, float] = {}
    for name in (key.removeprefix("term/") for key in sums if key.startswith("term/")):
        tokens = sums[f"term_tokens/{name}"]
        if not tokens:
            continue
        of_mean, of_share = TERM_METRICS.get(name, (f"term/{name}/mean", f"term/{name}/active_share"))
        values[of_mean] = sums[f"term/{name}"] / tokens
        if f"term_active/{name}" in sums:
            values[of_share] = sums[f"term_active/{name}"] / tokens
    return values


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """The values as JSON can hold them."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
