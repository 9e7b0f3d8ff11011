"""The bare limit of a UniSD* step: the forward and backward passes and projections that the mathematics needs, nothing else.

Tokens are packed (no padding), only the completion's positions are projected, the student's and the primary teacher's once; no
softmax, divergence, weight or other arithmetic is done. What it computes is no loss: it is a time and a memory to come close to.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import Example
from unisd.adapters import merged_lora
from unisd.attention import FRUGAL
from unisd.memory import default_token_budget
from unisd.products import linear


def packed(sequences: list[list[int]], device: Any) -> dict[str, Any]:
    ids = torch.tensor([[token for s in sequences for token in s]], device=device)
    positions = torch.tensor([[i for s in sequences for i in range(len(s))]], device=device)
    return {"input_ids": ids, "position_ids": positions, "row_starts": [i for i, p in enumerate(positions[0].tolist()) if p == 0]}


def states(decoder: Any, jobs: list[tuple[list[int], list[int]]], device: Any) -> Tensor:
    """Final hidden states `[N,H]` that predict the completions of (prompt, completion) pairs, in one pass."""
    hidden = decoder(**packed([p + c for p, c in jobs], device), use_cache=False).last_hidden_state.flatten(0, 1)
    kept, start = [], 0
    for prompt, completion in jobs:
        kept.append(hidden[start + len(prompt) - 1 : start + len(prompt) + len(completion) - 1])
        start += len(prompt) + len(completion)
    return torch.cat(kept)


def groups(jobs: list[tuple[list[int], list[int]]], most_tokens: int) -> list[list[tuple[list[int], list[int]]]]:
    found: list[list[tuple[list[int], list[int]]]] = [[]]
    for job in sorted(jobs, key=lambda j: -len(j[0] + j[1])):
        if found[-1] and sum(len(p + c) for p, c in [*found[-1], job]) > most_tokens:
            found.append([])
        found[-1].append(job)
    return found


def project(hidden: Tensor, head: Tensor, tokens: int) -> None:
    for start in range(0, len(hidden), tokens):
        linear(hidden[start : start + tokens], head)


def score(model: Any, rows: list[Example], chunk_tokens: int) -> None:
    """The passes without gradient: K + 2 views of all rows."""
    base = model.get_base_model()
    base.set_attn_implementation(FRUGAL)
    decoder, head = base.get_decoder(), base.get_output_embeddings().weight
    views = [(prompt, row.completion) for row in rows for prompt in (row.teacher, row.negative, *row.auxiliary)]
    with merged_lora(model, keep=False):
        for group in groups(views, default_token_budget(model.device)):
            project(states(decoder, group, model.device), head, chunk_tokens)


def star_step(
    model: Any, teacher: Callable[[], AbstractContextManager[Any]], batches: list[list[Example]], chunk_tokens: int
) -> float:
    """Same contract as the plain one; returns 0."""
    base = model.get_base_model()
    decoder, head, device = base.get_decoder(), base.get_output_embeddings().weight, model.device
    with torch.no_grad(), teacher():
        score(model, [row for batch in batches for row in batch], chunk_tokens)
    for batch in batches:
        hidden = states(decoder, [(row.student, row.completion) for row in batch], device)
        with torch.no_grad():
            gradient = torch.empty_like(hidden)
            for start in range(0, len(hidden), chunk_tokens):
                part = slice(start, start + chunk_tokens)
                gradient[part] = linear(hidden[part], head) @ head
        hidden.backward(gradient / gradient.norm())
    return 0.0
