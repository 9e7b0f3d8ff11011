"""Run transformers' continuous batching in the harness, with as many tokens a row as asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.shapes import PAD

PAGE = 32
"""Tokens of a block of its cache."""
SPARE = 2
"""Times the memory that all rows need at once: what its scheduler keeps back lies in there."""


def writer(model: Any, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Callable[[], float]:
    """Return a function that greedily writes `lengths[i]` tokens after each prompt and counts them.

    Its manager is made once and kept, as a server would.

    Raises:
        RuntimeError: a request failed.
    """
    longest = max(len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True))
    named = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"
    config = ContinuousBatchingConfig(
        **{named: PAGE},
        num_blocks=SPARE * len(prompts) * (longest // PAGE + 1),
        max_batch_tokens=max(2048, longest),
        allow_block_sharing=False,  # rows of a benchmark have nothing in common
    )
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=PAD, max_new_tokens=max(lengths))

    def write() -> float:
        written = 0
        with model.continuous_batching_context_manager(
            greedy, continuous_batching_config=config, persistent_manager=True
        ) as manager:
            for prompt, length in zip(prompts, lengths, strict=True):
                manager.add_request(list(prompt), max_new_tokens=length, eos_token_id=-1)
            left = len(prompts)
            while left:
                answer = manager.get_result(timeout=60)
                if answer is None or answer.error is not None:
                    raise RuntimeError(f"continuous batching: {answer and answer.error}")
                if answer.is_finished():
                    written += len(answer.generated_tokens)
                    left -= 1
        return float(written)

    return write
