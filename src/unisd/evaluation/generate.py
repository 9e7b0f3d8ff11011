"""Answers to prompts: what `unisd eval` and `unisd chat` would say, in Python."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unisd.console import show_progress
from unisd.data.prompts import encode_prompt
from unisd.data.rows import check_prompt
from unisd.data.thoughts import completion_text
from unisd.errors import UserError
from unisd.models.inference import opened
from unisd.models.load import context_length
from unisd.models.tokens import eos_ids, pad_id
from unisd.rollout import transformers_engine
from unisd.rollout.engine import Sampling

logger = logging.getLogger(__name__)

Prompt = str | list[dict[str, Any]]
SEED = 42  # of samples, where nobody says which


def generate(
    model: Any,
    prompts: Sequence[Prompt],
    tokenizer: Any = None,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = SEED,
    batch_size: int = 64,
) -> list[str]:
    """Answer prompts (texts or chat messages), in their order.

    Args:
        model: a folder (of a model or an adapter), a hub id, or a loaded model.
        tokenizer: that of a loaded model.
        temperature: 0: greedy; else samples, which `seed` repeats.
        batch_size: prompts at a time; it changes answers only by rounding.

    Raises:
        UserError: a single prompt, a bad one, one that leaves no room for an answer, or a model
            that cannot be opened.
    """
    check_sampling(max_new_tokens, temperature)
    model, tokenizer = opened(model, tokenizer)
    ids = encode_prompts(model, tokenizer, prompts)
    max_new_tokens = within_context(model, ids, max_new_tokens)
    with show_progress("answering", len(ids)) as advance:
        written = transformers_engine.generate(
            model,
            ids,
            Sampling(max_new_tokens, temperature or 1.0),
            eos_ids=eos_ids(model, tokenizer),
            pad_id=pad_id(model, tokenizer),
            keys=[(seed, 0, i, 0) for i in range(len(ids))] if temperature > 0 else None,
            batch_size=batch_size,
            on_rows=advance,
        )
    return [completion_text(tokenizer, one.ids) for one in written]


def check_sampling(max_new_tokens: int, temperature: float) -> None:
    """Raise `UserError` for answers of no token, and for what is no temperature."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} writes nothing: give 1 or more.")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature={temperature} is no temperature: give 0 (greedy) or more.")


def within_context(model: Any, ids: Sequence[list[int]], max_new_tokens: int) -> int:
    """The most tokens of an answer for which the longest prompt leaves room; fewer are told."""
    context = context_length(model)
    room = max_new_tokens if context is None else context - max(map(len, ids), default=0)
    if room < max_new_tokens:
        logger.warning(
            "answers end after %d tokens in place of %d: the longest prompt leaves no more of the model's"
            " context of %d.",
            *(room, max_new_tokens, context),
        )
    return min(room, max_new_tokens)


def encode_prompts(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of several prompts.

    Raises:
        UserError: see `generate`.
    """
    single = isinstance(prompts, (str, Path))
    prompts = [] if single else list(prompts)
    rows = [prompt for prompt in prompts if isinstance(prompt, dict)]
    if rows and "prompt" in rows[0]:
        raise UserError("prompts holds rows: give their prompts, as in [row['prompt'] for row in rows].")
    if single or rows:
        raise UserError("prompts is a single prompt: give a list of prompts, as in [prompt].")
    context, found = context_length(model), []
    for number, prompt in enumerate(prompts):
        check_prompt(prompt, f"prompt {number}")
        found.append(encode_prompt(tokenizer, prompt))
        if context is not None and len(found[-1]) >= context:
            raise UserError(
                f"prompt {number} has {len(found[-1])} tokens, and the model's context is {context}: shorten"
                " it, or give a model with a longer context."
            )
    return found
