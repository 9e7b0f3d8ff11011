"""The student writes: prompts in, completions out.

An engine is anything with the three methods of :class:`Engine`. Sampling noise is keyed by (seed,
optimizer step, row, generation) and position, so what is sampled depends neither on how the step is
cut into micro-batches or ranks nor on what ran before a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from unisd.distributed.sharding import all_ranks_must_join
from unisd.memory import smaller_until_it_fits
from unisd.models.adapters import without_adapter
from unisd.models.tokens import end_tokens
from unisd.rollout.decoding import decode
from unisd.rollout.engine import Completion, NoiseKey, Sampling, uniform_noise


class KeyedSampler(LogitsProcessor):  # type: ignore[misc]
    """Draws the next token: inverts the cumulative distribution at a uniform number.

    Each row has its own number for each position. As a logits processor under greedy search: it
    leaves the drawn token as the only possible one.

    ends: what log-probabilities tell as one outcome.
    """

    def __init__(
        self,
        keys: Sequence[NoiseKey],
        sampling: Sampling,
        prompt_length: int,
        tell_logps: bool,
        ends: Sequence[int] = (),
    ) -> None:
        self.uniform_BT = torch.from_numpy(
            np.stack([uniform_noise(key, sampling.max_new_tokens) for key in keys])
        )
        self.prompt_length = prompt_length
        self.temperature = sampling.temperature
        self.drawn_logps: list[Tensor] | None = [] if tell_logps else None  # [B,1] each
        self.ends = ends
        self.warpers = LogitsProcessorList()
        if sampling.top_k > 0:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0:
            self.warpers.append(MinPLogitsWarper(sampling.min_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = self.warpers(input_ids, scores.float() / self.temperature)
        position = input_ids.shape[1] - self.prompt_length
        # Double precision: a float32 running sum over a large vocabulary would be off by more than
        # rare tokens weigh.
        cumulative_BV = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
        self.uniform_BT = self.uniform_BT.to(scores.device)  # once
        target_B1 = self.uniform_BT[:, position, None] * cumulative_BV[:, -1:]
        drawn_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True).clamp_max(scores.shape[-1] - 1)
        if self.drawn_logps is not None:
            mass_B1 = _mass(cumulative_BV, drawn_B1)
            of_ends_B1 = sum(_mass(cumulative_BV, torch.full_like(drawn_B1, end)) for end in self.ends)
            for end in self.ends:
                mass_B1 = torch.where(drawn_B1 == end, of_ends_B1, mass_B1)
            self.drawn_logps.append((mass_B1 / cumulative_BV[:, -1:]).log())
        return torch.full_like(scores, float("-inf")).scatter_(1, drawn_B1, 0.0)


def _mass(cumulative_BV: Tensor, token_B1: Tensor) -> Tensor:
    below_B1 = torch.where(token_B1 > 0, cumulative_BV.gather(1, (token_B1 - 1).clamp_min(0)), 0.0)
    return cumulative_BV.gather(1, token_B1) - below_B1


class KeyedSamplers:
    """Makes the sampler of each batch of rows, and gathers the log-probabilities that they tell."""

    def __init__(
        self,
        keys: Sequence[NoiseKey],
        sampling: Sampling,
        tell_logps: bool = False,
        ends: Sequence[int] = (),
    ) -> None:
        self.keys, self.sampling, self.tell_logps, self.ends = keys, sampling, tell_logps, ends
        self._made: list[tuple[Sequence[int], KeyedSampler]] = []

    def __call__(self, alive: Sequence[int], prompt_length: int) -> LogitsProcessorList:
        keys = [self.keys[i] for i in alive]
        told = (self.tell_logps, self.ends)
        self._made.append((alive, KeyedSampler(keys, self.sampling, prompt_length, *told)))
        return LogitsProcessorList([self._made[-1][1]])

    def logps(self) -> list[list[float]] | None:
        """The log-probabilities of each row's tokens, as they were drawn."""
        if not self.tell_logps:
            return None
        found: list[list[float]] = [[] for _ in self.keys]
        for alive, sampler in self._made:
            if sampler.drawn_logps:
                for i, of_row in zip(alive, torch.cat(sampler.drawn_logps, dim=1).tolist(), strict=True):
                    found[i] += of_row
        return found


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    keys: Sequence[NoiseKey] | None = None,
    batch_size: int = 64,
    on_rows: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Completions of `prompts` (token ids), in their order; greedy where `keys` is None.

    Rows are sorted by length and left-padded in batches of `batch_size`; `on_rows(n)` is told of
    every `n` finished rows.
    """
    written = decode(
        model,
        prompts,
        sampling.max_new_tokens,
        eos_ids=eos_ids,
        pad_id=pad_id,
        batch_size=batch_size,
        processors=None if keys is None else KeyedSamplers(keys, sampling),
        on_rows=on_rows,
    )
    return _completions(written, sampling, eos_ids)


def _completions(
    written: Sequence[list[int]],
    sampling: Sampling,
    eos_ids: Sequence[int],
    logps: Sequence[list[float]] | None = None,
) -> list[Completion]:
    ends = set(eos_ids)
    return [
        Completion(
            ids,
            truncated=len(ids) >= sampling.max_new_tokens and ids[-1] not in ends,
            logps=None if logps is None else logps[i][: len(ids)],
        )
        for i, ids in enumerate(written)
    ]


@dataclass
class TransformersEngine:
    """Generates with the student itself: nothing to sync, nothing to free, nothing to correct."""

    model: nn.Module
    eos_ids: Sequence[int]
    pad_id: int
    batch_size: int = 64
    tells_logps: bool = False
    """Whether completions come with log-probabilities all the same: l as the step scores it, up to
    rounding.
    """
    returns_logps = False

    def sync(self) -> None:
        pass

    def generate(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[NoiseKey] | None, sampling: Sampling
    ) -> list[Completion]:
        ends = end_tokens(without_adapter(self.model).get_output_embeddings())

        def in_batches_of(size: int) -> list[Completion]:
            samplers = None if keys is None else KeyedSamplers(keys, sampling, self.tells_logps, ends)
            written = decode(
                self.model,
                prompts,
                sampling.max_new_tokens,
                eos_ids=self.eos_ids,
                pad_id=self.pad_id,
                batch_size=size,
                processors=samplers,
            )
            return _completions(
                written, sampling, self.eos_ids, None if samplers is None else samplers.logps()
            )

        # What is sampled does not depend on the batch, so memory that runs out costs time only.
        together = "rollout_batch_size" if all_ranks_must_join(self.model) else None
        written, self.batch_size = smaller_until_it_fits(
            in_batches_of, self.batch_size, what="batches of rows to write", together=together
        )
        return written

    def sleep(self) -> None:
        pass
