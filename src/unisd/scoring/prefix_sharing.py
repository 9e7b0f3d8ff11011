"""Sequences that begin alike, laid out in one row with each beginning once.

The views of a step begin alike in many ways: all chats with their system turn, right and wrong
reference with the problem, the generations of a prompt with all of it. In a causal model a
beginning has the same states under each of its continuations, so it is read once for all that lie
in one forward pass: rows of a tree, each of which attends to the rows that it continues
(:func:`unisd.kernels.attention.packed_sdpa`) and counts its positions on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unisd.backbone import Backbone
from unisd.batching import Batch, close, tolerance_of
from unisd.kernels.attention import continues_rows

MIN_SHARED_TOKENS = 16
"""Tokens of a beginning that becomes a row of its own: below, its attention costs more than it
saves.
"""


@dataclass
class SharedBatch:
    """Sequences laid out for one forward pass."""

    batch: Batch
    starts: list[int]
    """By sequence: its token t, from the first of its own row, lies at `starts[i] + t` of the flat
    row.
    """
    read: list[int]
    """By sequence: tokens that are read for it, of what is shared for the first only."""


def _order(sequences: Sequence[Sequence[int]], shareable: Sequence[int]) -> tuple[list[int], list[int]]:
    """The sequences with those that begin alike side by side, and how many tokens each shares with
    the one before (the first: none).

    In that order all of a run share the least that two neighbours share.
    """
    order = sorted(range(len(sequences)), key=lambda i: (list(sequences[i]), i))
    alike = [0] * len(order)
    for at in range(1, len(order)):
        one, other = (sequences[i][: shareable[i]] for i in (order[at - 1], order[at]))
        pairs = enumerate(zip(one, other, strict=False))
        alike[at] = next((t for t, (a, b) in pairs if a != b), min(len(one), len(other)))
    return order, alike


def shared_batches(
    sequences: Sequence[Sequence[int]], shareable: Sequence[int], budget: int
) -> list[list[int]]:
    """Groups of sequences for one forward pass each, none of which reads more than `budget` tokens
    (or a single sequence).

    shareable: how many of a sequence's first tokens may be read together with others'.
    """
    groups: list[list[int]] = []
    used = 0
    for i, shared in zip(*_order(sequences, shareable), strict=True):
        saved = max(0, shared - MIN_SHARED_TOKENS + 1)  # what `collate_shared` saves, or a little less
        if not groups or used + len(sequences[i]) - saved > budget:
            groups.append([])
            used = saved = 0
        groups[-1].append(i)
        used += len(sequences[i]) - saved
    return groups


def collate_shared(
    sequences: Sequence[Sequence[int]], shareable: Sequence[int], device: torch.device | str
) -> SharedBatch:
    """Lay all sequences out in one row, with beginnings of `MIN_SHARED_TOKENS` tokens or more that
    several share once.
    """
    order, alike = _order(sequences, shareable)
    ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    contexts: list[list[slice]] = []
    starts, read = [0] * len(order), [0] * len(order)

    def add(i: int, first: int, last: int, before: list[slice]) -> slice:
        rows.append(len(ids))
        contexts.append(before)
        positions.extend(range(first, last))
        ids.extend(sequences[i][first:last])
        read[i] += last - first
        return slice(rows[-1], len(ids))

    def grow(first: int, last: int, depth: int, before: list[slice]) -> None:
        """The sequences `order[first:last]`, whose first `depth` tokens are those of the rows
        `before`.
        """
        i = min(order[first:last])  # who comes first pays for what is shared
        if last == first + 1:
            starts[i] = len(ids) - depth
            add(i, depth, len(sequences[i]), before)
            return
        common = min(alike[first + 1 : last])
        if common - depth >= MIN_SHARED_TOKENS:
            before, depth = [*before, add(i, depth, common, before)], common
        for at in range(first + 1, last + 1):
            if at == last or alike[at] - depth < MIN_SHARED_TOKENS:
                grow(first, at, depth, before)
                first = at

    grow(0, len(order), 0, [])
    batch = Batch(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        None,
        rows,
        contexts=contexts,
    )
    return SharedBatch(batch, starts, read)


@torch.no_grad()
def can_share(backbone: Backbone) -> bool:
    """Whether the model reads a shared beginning as it reads separate rows: where attention can
    continue rows and all layers attend to all of the past, and checked on the model itself.
    """
    model = backbone.causal_lm
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or (
        ["full_attention"] if not getattr(config, "sliding_window", None) else []
    )
    device = backbone.head_module.weight.device
    if not continues_rows(device) or not backbone.tells_rows or set(kinds) != {"full_attention"}:
        return False
    generator = torch.Generator().manual_seed(2)
    trunk, branch, *ends = (
        torch.randint(config.vocab_size, (n,), generator=generator).tolist()
        for n in (MIN_SHARED_TOKENS + 3, MIN_SHARED_TOKENS, 4, 7, 5, 3)
    )
    sequences = [trunk + ends[0], trunk + branch + ends[1], trunk + branch + ends[2], ends[3]]
    shareable = [len(sequence) - 2 for sequence in sequences]
    was_training = model.training
    model.eval()
    try:
        laid = collate_shared(sequences, shareable, device)
        together = backbone.hidden_states(laid.batch).final
        assert together is not None
        apart = collate_shared(sequences, [0] * len(sequences), device)
        alone = backbone.hidden_states(apart.batch).final
        assert alone is not None
        for sequence, start, own, shared in zip(
            sequences, laid.starts, apart.starts, (len(trunk), *[len(trunk + branch)] * 2, 0), strict=True
        ):
            if not close(
                together[0, start + shared : start + len(sequence)],
                alone[0, own + shared : own + len(sequence)],
                tolerance_of(alone.dtype),
            ):
                return False
        return True
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):  # a model that cannot be told
        return False
    finally:
        model.train(was_training)
