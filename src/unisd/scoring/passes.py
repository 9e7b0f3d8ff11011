"""Forward passes of the scoring phase: sequences to score in, final hidden states out.

Sequences are laid out to a token budget: by length, or with what they begin with read once. Nothing
here knows what a pass is for.

Shapes: T_i length of one completion, H hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unisd.backbone import Backbone, Captured
from unisd.batching import Batch, collate, forward_batches
from unisd.distributed.sharding import in_step
from unisd.kernels.lora import inference
from unisd.scoring.prefix_sharing import collate_shared, shared_batches
from unisd.teacher import Teacher

SHARED_FROM = 64  # tokens of a prompt; below, the smaller passes cost more than they save


@dataclass(frozen=True)
class PassLayout:
    """How forward passes are laid out: changes time and memory, and no score."""

    packed: bool  # rows end to end, or padded
    pad_id: int
    token_budget: int  # most tokens per forward pass
    layers: tuple[int, ...] = ()  # further layers to keep, of the jobs that want them
    # a prompt once for all of its completions, where that saves enough
    share_prompts: bool = False
    # what prompts begin with once for all that lie in a pass (packed then, as `can_share` allows)
    share_prefixes: bool = False
    # adapters into a copy of the weights for all passes of a sweep; else anew in each pass, without
    # the copy
    merge_once: bool = False


@dataclass(frozen=True)
class Job:
    """One sequence to read: a completion behind a prompt."""

    view: str  # under which its tokens are counted
    row: int
    prompt: list[int]
    completion: list[int]
    context: int = 0  # number of the auxiliary context
    keeps_layers: bool = False


@dataclass(frozen=True)
class JobStates:
    """What a forward pass left of one job: the states that predict the completion, final `[T_i,H]`
    and of listed layers.
    """

    job: Job
    final_TH: Tensor
    layers_TH: dict[int, Tensor]


Pass = tuple[Sequence[Job], Captured, Sequence[int], Counter[str]]
"""The jobs of one forward pass, what it left, the flat index of each job's first state, and the
tokens that it read, by view.
"""


class Passes:
    """Makes forward passes without gradient.

    Args:
        backbone: the model.
        layout: how they are laid out.
        autocast: makes the context of a pass (mixed precision as in training).
    """

    def __init__(
        self,
        backbone: Backbone,
        layout: PassLayout,
        autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.backbone = backbone
        self.layout = layout
        self.autocast = autocast or (lambda: torch.autocast("cpu", enabled=False))
        self.tokens: Counter[str] = Counter()  # read for training so far, by view

    @contextmanager
    def under(self, weights: Teacher | None = None, *, merge_once: bool = False) -> Iterator[None]:
        """While active, the model computes with these weights (None: its own), in evaluation mode.

        A context for each set of weights: within one, autocast remembers its casts of a parameter,
        whatever its values are by then.
        """
        in_place = nullcontext() if weights is None else weights.in_place()
        with inference(self.backbone.causal_lm, keep=merge_once), in_place, self.autocast():
            yield

    def hidden_states(
        self, jobs: Sequence[Job], device: torch.device | str, tokens: Counter[str] | None = None
    ) -> Iterator[list[JobStates]]:
        """Read the jobs; yields, by forward pass, their hidden states at the positions that predict
        the completion. Empty completions are left out.

        tokens: where the tokens read are counted by view; None: with those of training.
        """
        tokens = self.tokens if tokens is None else tokens
        with in_step(self.backbone.model):
            for together, captured, firsts, read in self._passes(jobs, device):
                tokens.update(read)
                yield _cut(captured, together, firsts)

    def _passes(self, jobs: Sequence[Job], device: torch.device | str) -> Iterator[Pass]:
        jobs = [job for job in jobs if job.completion]
        if self.layout.share_prompts:
            # A pass that shares beginnings holds them all; a long prompt would leave its
            # completions little room there.
            least = max(SHARED_FROM, self.layout.token_budget // 4 if self.layout.share_prefixes else 0)
            shared, jobs = _sharing(jobs, least)
            for alike in shared:
                yield from self._continuations(alike, device)
        for together, batch, starts, read in self._laid_out(jobs, device):
            captured = self.backbone.hidden_states(batch, self.layout.layers)
            counts: Counter[str] = Counter()
            for job, count in zip(together, read, strict=True):
                counts[job.view] += count
            firsts = [start + len(job.prompt) - 1 for job, start in zip(together, starts, strict=True)]
            yield together, captured, firsts, counts

    def _continuations(self, alike: Sequence[Job], device: torch.device | str) -> Iterator[Pass]:
        """Passes over completions of one prompt, which each of them reads once."""
        layout, prompt = self.layout, alike[0].prompt
        lengths = [len(job.completion) for job in alike]
        for chosen in forward_batches(lengths, layout.token_budget, packed=False):
            together = [alike[i] for i in chosen]
            captured, starts = self.backbone.continuations(
                prompt, [job.completion for job in together], layout.pad_id, device, layout.layers
            )
            counts = Counter({alike[0].view: len(prompt)})
            for job in together:
                counts[job.view] += len(job.completion)
            yield together, captured, starts, counts

    def _laid_out(
        self, jobs: Sequence[Job], device: torch.device | str
    ) -> Iterator[tuple[list[Job], Batch, list[int], list[int]]]:
        """The forward passes: jobs, their sequences laid out, where each begins and how many of its
        tokens are read.
        """
        layout = self.layout
        sequences = [job.prompt + job.completion for job in jobs]
        if layout.share_prefixes:
            # A prompt's last token predicts the completion's first: it is the first that a job has
            # for itself.
            shareable = [len(job.prompt) - 1 for job in jobs]
            for chosen in map(sorted, shared_batches(sequences, shareable, layout.token_budget)):
                laid = collate_shared([sequences[i] for i in chosen], [shareable[i] for i in chosen], device)
                yield [jobs[i] for i in chosen], laid.batch, laid.starts, laid.read
            return
        lengths = [len(sequence) for sequence in sequences]
        for chosen in forward_batches(lengths, layout.token_budget, layout.packed):
            batch = collate([sequences[i] for i in chosen], layout.packed, layout.pad_id, device)
            yield [jobs[i] for i in chosen], batch, batch.starts, [lengths[i] for i in chosen]


def _cut(captured: Captured, jobs: Sequence[Job], firsts: Sequence[int]) -> list[JobStates]:
    """Cut the jobs' states out of a forward pass; copied, so that they do not keep the whole pass
    alive: those of a view by one copy, which are kept or let go together.
    """
    assert captured.final is not None
    final_TH: dict[int, Tensor] = {}
    layers_TH: list[dict[int, Tensor]] = [{} for _ in jobs]
    for view in dict.fromkeys(job.view for job in jobs):
        chosen = [i for i, job in enumerate(jobs) if job.view == view]
        spans = [slice(firsts[i], firsts[i] + len(jobs[i].completion)) for i in chosen]
        final_TH |= zip(chosen, _copied(captured.final, spans), strict=True)
        for layer, hidden in captured.layers.items() if jobs[chosen[0]].keeps_layers else ():
            for i, states_TH in zip(chosen, _copied(hidden, spans), strict=True):
                layers_TH[i][layer] = states_TH
    return [JobStates(job, final_TH[i], layers_TH[i]) for i, job in enumerate(jobs)]


def _copied(hidden: Tensor, spans: Sequence[slice]) -> tuple[Tensor, ...]:
    flat = hidden.flatten(0, 1)
    together = torch.cat([flat[span] for span in spans])
    return torch.split(together, [span.stop - span.start for span in spans])


def _sharing(jobs: Sequence[Job], least: int) -> tuple[list[list[Job]], list[Job]]:
    """Jobs whose prompt, of `least` tokens or more, is worth a pass for all of them (the
    generations of a prompt), and the other jobs.
    """
    by_prompt: dict[tuple[int, ...], list[Job]] = {}
    for job in jobs:
        by_prompt.setdefault(tuple(job.prompt), []).append(job)
    shared, others = [], []
    for prompt, alike in by_prompt.items():
        saved = len(prompt) * (len(alike) - 1)
        rest = len(prompt) + sum(len(job.completion) for job in alike)
        if len(prompt) >= least and saved >= rest / 2:
            shared.append(alike)
        else:
            others += alike
    return shared, others
