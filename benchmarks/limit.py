"""The bare limit of a UniSD* step: the passes and projections that the mathematics needs, no more.

Tokens are packed (no padding), on a CPU what views begin with is read once, as ours reads it; only
the completion's positions are projected, the student's and the teacher's once; no softmax,
divergence, weight or other arithmetic is done. What it computes is no loss: it is a time and a
memory to come close to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import Example
from unisd.batching import collate, forward_batches
from unisd.kernels.attention import PACKED_SDPA
from unisd.kernels.cpu_linear import linear, matmul_nt
from unisd.kernels.lora import fused_lora, merged_lora
from unisd.memory import default_token_budget
from unisd.scoring.prefix_sharing import collate_shared, shared_batches


def states(decoder: Any, jobs: list[tuple[list[int], list[int]]], device: Any, share: bool = False) -> Tensor:
    """Return the states `[N,H]` that predict completions of (prompt, completion)s, in one pass."""
    sequences = [p + c for p, c in jobs]
    if share:
        laid = collate_shared(sequences, [len(p) - 1 for p, _ in jobs], device)
        batch, starts = laid.batch, laid.starts
    else:
        batch = collate(sequences, packed=True, pad_id=0, device=device)
        starts = batch.starts
    hidden = decoder(**batch.inputs, **batch.rows, use_cache=False).last_hidden_state[0]
    places = [(start + len(p) - 1, len(c)) for start, (p, c) in zip(starts, jobs, strict=True)]
    return torch.cat([hidden[first : first + length] for first, length in places])


def project(hidden: Tensor, head: Tensor, tokens: int) -> None:
    for start in range(0, len(hidden), tokens):
        linear(hidden[start : start + tokens], head)


def score(model: Any, rows: list[Example], chunk_tokens: int) -> None:
    """Take the passes without gradient: K + 2 views of all rows."""
    base = model.get_base_model()
    base.set_attn_implementation(PACKED_SDPA)
    decoder, head = base.get_decoder(), base.get_output_embeddings().weight
    views = [(prompt, r.completion) for r in rows for prompt in (r.teacher, r.negative, *r.auxiliary)]
    sequences, budget = [p + c for p, c in views], default_token_budget(model.device)
    share = model.device.type == "cpu"
    if share:
        batches = shared_batches(sequences, [len(p) - 1 for p, _ in views], budget)
    else:
        batches = forward_batches([len(sequence) for sequence in sequences], budget, packed=True)
    with merged_lora(model, keep=False):
        for chosen in batches:
            project(states(decoder, [views[i] for i in chosen], model.device, share), head, chunk_tokens)


def star_step(
    model: Any, teacher: Callable[[], Any], batches: list[list[Example]], chunk_tokens: int
) -> float:
    """Same contract as the plain one; returns 0."""
    base = model.get_base_model()
    decoder, head, device = base.get_decoder(), base.get_output_embeddings().weight, model.device
    with torch.no_grad(), teacher():
        score(model, [row for batch in batches for row in batch], chunk_tokens)
    for batch in batches:
        with fused_lora(model):
            hidden = states(decoder, [(row.student, row.completion) for row in batch], device)
            with torch.no_grad():
                gradient = torch.empty_like(hidden)
                for start in range(0, len(hidden), chunk_tokens):
                    part = slice(start, start + chunk_tokens)
                    gradient[part] = matmul_nt(linear(hidden[part], head), head.T)
            hidden.backward(gradient / gradient.norm())
    return 0.0
