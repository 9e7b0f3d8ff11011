"""What the command line sets, and what every case returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from benchmarks.measure import Samples

Rows = list[dict[str, Any]]
Ratios = dict[str, float]
Function = Callable[[], float]
T = TypeVar("T")

EXTRAS = ("sdft trl topk_logits", "star equal limit")
"""Left out on a CPU unless named: `loss` and `step` together are to end within 12 minutes on two
cores.
"""


@dataclass(frozen=True)
class Options:
    """What the command line sets."""

    shape: str = "qwen2.5-0.5b"
    layers: int | None = None
    device: torch.device = torch.device("cpu")
    repetitions: int = 3
    seconds: float = 200.0
    tokens: int = 512
    prompt: int = 64
    completion: int = 128
    batch: int = 2
    accumulation: int = 2
    impls: tuple[str, ...] | None = None
    full: bool = False
    token_budget: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def chosen(self, functions: dict[str, T]) -> dict[str, T]:
        """Those that were asked for; without a word, all but the slow extras on a CPU."""
        extras = () if self.full or self.device.type != "cpu" else EXTRAS
        return {
            name: f
            for name, f in functions.items()
            if (name in self.impls if self.impls else name not in extras)
        }


def ratio(samples: dict[str, Samples], name: str, one: str, other: str, what: str, out: Ratios) -> None:
    """Put the quotient of two implementations into `out`, where both were measured."""
    if one in samples and other in samples:
        key = "extra_memory_mb" if what == "extra_memory" else "time_s"
        out[name] = samples[one].row(one)[key] / max(samples[other].row(other)[key], 1e-9)
