"""Writes one answer and tells its tokens while they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from unisd.rollout.decoding import decode
from unisd.rollout.engine import Completion, NoiseKey, Sampling
from unisd.rollout.transformers_engine import KeyedSamplers

OnTokens = Callable[[list[int]], None]


class _Watcher(LogitsProcessor):  # type: ignore[misc]
    """Tells what there is before each further token, and changes nothing.

    A streamer of transformers would take the pieces that `decode` generates for answers of their
    own.
    """

    def __init__(self, prompt_length: int, on_tokens: OnTokens) -> None:
        self.prompt_length, self.on_tokens = prompt_length, on_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.on_tokens(input_ids[0, self.prompt_length :].tolist())
        return scores


def stream(
    model: Any,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    key: NoiseKey | None,
    on_tokens: OnTokens,
) -> Completion:
    """The completion that `generate` would give, greedy where `key` is None.

    `on_tokens` gets all tokens so far, each time that there is one more but for the last.
    """
    samplers = None if key is None else KeyedSamplers([key], sampling)

    def processors(alive: Sequence[int], prompt_length: int) -> LogitsProcessorList:
        own = [] if samplers is None else samplers(alive, prompt_length)
        return LogitsProcessorList([_Watcher(prompt_length, on_tokens), *own])

    (ids,) = decode(
        model, [prompt], sampling.max_new_tokens, eos_ids=eos_ids, pad_id=pad_id, processors=processors
    )
    return Completion(ids, truncated=len(ids) >= sampling.max_new_tokens and ids[-1] not in {*eos_ids})
