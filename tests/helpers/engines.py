"""Engines whose answers a test knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from unisd.rollout.engine import Completion, NoiseKey, Sampling


class ByKey:
    """Writes to each row what a function makes of its key: (seed, step, row, generation)."""

    returns_logps = False

    def __init__(self, write: Callable[[NoiseKey], list[int]]) -> None:
        self.write = write

    def sync(self) -> None: ...

    def sleep(self) -> None: ...

    def generate(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[NoiseKey] | None, sampling: Sampling
    ) -> list[Completion]:
        assert keys is not None
        return [Completion(self.write(key), truncated=False) for key in keys]
