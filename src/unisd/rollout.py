"""The student writes: prompts in, completions out.

An engine is anything with the three methods of :class:`Engine`. Sampling noise is keyed by (seed, optimizer step, row, generation)
and position, so what is sampled depends neither on how the step is cut into micro-batches or ranks nor on what ran before a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

NoiseKey = tuple[int, int, int, int]  # seed, optimizer step, row of the dataset, generation


@dataclass(frozen=True)
class Completion:
    """Token ids that the model wrote (with the end token, if it came to one)."""

    ids: list[int]
    truncated: bool  # ran into the length limit


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


class Engine(Protocol):
    """Turns prompts into completions with the student's current weights."""

    def sync(self) -> None:
        """Take over the student's weights (nothing to do where the engine shares them)."""

    def generate(self, prompts: Sequence[Sequence[int]], keys: Sequence[NoiseKey] | None, sampling: Sampling) -> list[Completion]:
        """One completion per prompt; `keys=None` means greedy."""

    def sleep(self) -> None:
        """Give memory back until the next `sync`."""


def uniform_noise(key: NoiseKey, length: int) -> np.ndarray:
    """`length` uniform numbers in [0, 1) of one completion: a counter-based generator, position by position."""
    seed, step, row, generation = key
    bits = np.random.SeedSequence([seed, step, row, generation]).generate_state(2, np.uint64)
    return np.random.Generator(np.random.Philox(key=bits)).random(length)


class KeyedSampler(LogitsProcessor):
    """Draws the next token by inverting the cumulative distribution at this row's and position's own uniform number.

    As a logits processor under greedy search: it leaves the drawn token as the only possible one.
    """

    def __init__(self, keys: Sequence[NoiseKey], sampling: Sampling, prompt_length: int) -> None:
        self.uniform_BT = torch.from_numpy(np.stack([uniform_noise(key, sampling.max_new_tokens) for key in keys]))
        self.prompt_length = prompt_length
        self.temperature = sampling.temperature
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
        # Double precision: a float32 running sum over a large vocabulary would be off by more than rare tokens weigh.
        cumulative_BV = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
        target_B1 = self.uniform_BT[:, position, None].to(scores.device) * cumulative_BV[:, -1:]
        drawn_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True).clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter_(1, drawn_B1, 0.0)


@contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient, undone afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    keys: Sequence[NoiseKey] | None = None,
    batch_size: int = 64,
    on_batch: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Completions of `prompts` (token ids), in their order; greedy where `keys` is None.

    Rows are sorted by length and left-padded in batches of `batch_size`; `on_batch(rows)` is called after each batch.
    Nothing of the model's own generation defaults (penalties, top-k) applies.
    """
    results: list[Completion | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i), reverse=True)
    ends = set(eos_ids)
    # The model's own defaults would fill every option that this configuration leaves open.
    own_config, config = model.generation_config, GenerationConfig(
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )
    with generating(model):
        model.generation_config = config
        try:
            for first in range(0, len(order), batch_size):
                chosen = order[first : first + batch_size]
                longest = max(len(prompts[i]) for i in chosen)
                ids = torch.full((len(chosen), longest), pad_id)
                mask = torch.zeros_like(ids)
                for row, i in enumerate(chosen):
                    ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
                    mask[row, longest - len(prompts[i]) :] = 1
                processors = LogitsProcessorList()
                if keys is not None:
                    processors.append(KeyedSampler([keys[i] for i in chosen], sampling, longest))
                output = model.generate(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    generation_config=config,
                    logits_processor=processors,
                )
                for row, i in enumerate(chosen):
                    results[i] = _cut(output[row, longest:].tolist(), ends, sampling.max_new_tokens)
                if on_batch is not None:
                    on_batch(len(chosen))
        finally:
            model.generation_config = own_config
    return [result for result in results if result is not None]


def _cut(ids: list[int], ends: set[int], limit: int) -> Completion:
    """The tokens up to and with the first end token (padding may equal it)."""
    for position, token in enumerate(ids):
        if token in ends:
            return Completion(ids[: position + 1], truncated=False)
    return Completion(ids, truncated=len(ids) >= limit)


@dataclass
class TransformersEngine:
    """Generates with the student itself: nothing to sync, nothing to free."""

    model: nn.Module
    eos_ids: Sequence[int]
    pad_id: int
    batch_size: int = 64

    def sync(self) -> None:
        pass

    def generate(self, prompts: Sequence[Sequence[int]], keys: Sequence[NoiseKey] | None, sampling: Sampling) -> list[Completion]:
        return generate(
            self.model, prompts, sampling, eos_ids=self.eos_ids, pad_id=self.pad_id, keys=keys, batch_size=self.batch_size
        )

    def sleep(self) -> None:
        pass
