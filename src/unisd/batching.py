"""Token sequences laid out for one forward pass: end to end in one row, or padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """Sequences laid out for one forward pass, packed in one row or right-padded."""

    input_ids: Tensor  # [B,L]; B = 1 when packed
    position_ids: Tensor  # [B,L]
    attention_mask: Tensor | None  # [B,L] when padded, None when packed
    starts: list[int]  # flat index (into B*L) of each row's first token
    bounds: Tensor | None = None  # the same on the device as int32, and the end, where packed
    # of each row the spans that it continues, where rows share their beginnings
    contexts: list[list[slice]] | None = None

    @property
    def rows(self) -> dict[str, Any]:
        """What :func:`unisd.kernels.attention.packed_sdpa` is to be told of a packed row."""
        shared = {} if self.contexts is None else {"row_contexts": self.contexts}
        return {"row_starts": self.starts, "row_bounds": self.bounds, **shared} if self.packed else {}

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward."""
        kept = {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": self.attention_mask,
        }
        return {name: value for name, value in kept.items() if value is not None}

    @property
    def packed(self) -> bool:
        """Whether the sequences lie end to end in one row."""
        return self.attention_mask is None


def sent(host: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor of the host to `device`, without waiting for what that has still to do."""
    kind = torch.device(device).type
    pinned = host.pin_memory() if kind == "cuda" else host  # from other memory the copy would wait
    return pinned.to(device, non_blocking=kind != "mps")  # which may read before it is written


def sent_together(parts: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Copy tensors `[N]` of the host to `device`, by one copy for all of a type."""
    found = dict(parts)
    if torch.device(device).type == "cpu":
        return found
    for dtype in {part.dtype for part in parts.values()}:
        alike = {name: part for name, part in parts.items() if part.dtype == dtype}
        together = sent(torch.cat(list(alike.values())), device)
        found |= zip(alike, torch.split(together, [len(part) for part in alike.values()]), strict=True)
    return found


def collate(
    sequences: Sequence[Sequence[int]], packed: bool, pad_id: int, device: torch.device | str
) -> Batch:
    """Lay token sequences out for one forward pass: end to end with restarting positions, or padded
    on the right.
    """
    lengths = [len(sequence) for sequence in sequences]
    if packed:
        flat = list(chain.from_iterable(sequences))
        positions = list(chain.from_iterable(map(range, lengths)))
        *starts, _ = ends = [0, *accumulate(lengths)]
        ids_1N, positions_1N = torch.split(sent(torch.tensor([flat, positions]), device), 1)
        bounds = sent(torch.tensor(ends, dtype=torch.int32), device)
        return Batch(ids_1N, positions_1N, None, starts, bounds)
    longest = max(lengths)
    ids_positions_mask = torch.zeros(3, len(sequences), longest, dtype=torch.long)
    ids_BL, positions_BL, mask_BL = ids_positions_mask
    ids_BL.fill_(pad_id)
    positions_BL[:] = torch.arange(longest)
    for i, sequence in enumerate(sequences):
        ids_BL[i, : lengths[i]] = torch.tensor(sequence)
        mask_BL[i, : lengths[i]] = 1
    starts = [i * longest for i in range(len(sequences))]
    ids_BL, positions_BL, mask_BL = sent(ids_positions_mask, device)
    return Batch(ids_BL, positions_BL, mask_BL, starts)


def tolerance_of(dtype: torch.dtype) -> float:
    """How far apart, relative to the largest value, two ways to compute the same may be."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether no value is further off than `tolerance` of the largest."""
    scale = b.float().abs().max().clamp_min(1e-6)
    return bool((a.float() - b.float()).abs().max() <= tolerance * scale)


def forward_batches(lengths: Sequence[int], budget: int, packed: bool) -> list[list[int]]:
    """Group sequences, longest first, so that no forward pass holds more than `budget` tokens (or a
    single sequence).
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    used = 0
    for i in order:
        cost = lengths[i] if packed or not batches else lengths[batches[-1][0]]
        if not batches or used + cost > budget:
            batches.append([])
            used = 0
            cost = lengths[i]
        batches[-1].append(i)
        used += cost
    return batches
