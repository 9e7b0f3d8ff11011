"""Defines an engine (prompts in, completions out), and the noise that repeats a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from unisd.tasks.base import Verdict

NoiseKey = tuple[int, int, int, int]  # seed, optimizer step, row of the dataset, generation


@dataclass(frozen=True)
class Completion:
    """Token ids that the model wrote (with the end token, if it reached one)."""

    ids: list[int]
    truncated: bool  # ran into the length limit
    # of each token as it was drawn, at the sampling temperature; None: not told
    logps: list[float] | None = None
    sampled: bool = True  # by the student; False for references and the initial model's answers
    # optimizer step of the weights that wrote it, from engines with weights of their own
    version: int | None = None
    verdict: Verdict | None = None  # of the grader; None: it was not asked, or gave none
    # of each token: whether the student wrote it; None: all. Others (a tool's result, a user's
    # turn) are read as they are, and carry no loss
    written: list[bool] | None = None


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

    returns_logps: bool  # whether completions come with the log-probabilities they were drawn with

    def sync(self) -> None:
        """Take over the student's weights (nothing to do where the engine shares them)."""

    def generate(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[NoiseKey] | None, sampling: Sampling
    ) -> list[Completion]:
        """One completion per prompt; `keys=None` means greedy.

        A completion may be a conversation of several turns, with `written` to mark who wrote each
        token; it is scored as it is, never tokenised again.
        """

    def sleep(self) -> None:
        """Release memory until the next `sync`."""


def uniform_noise(key: NoiseKey, length: int) -> np.ndarray:
    """Draw `length` uniform numbers in [0, 1) of one completion.

    By a counter-based generator, position by position.
    """
    seed, step, row, generation = key
    bits = np.random.SeedSequence([seed, step, row, generation]).generate_state(2, np.uint64)
    return np.random.Generator(np.random.Philox(key=bits)).random(length)


def seed_of(key: NoiseKey) -> int:
    """The seed (63 bits) of one request to an engine that draws by itself.

    The same row in the same step asks for the same answer.
    """
    return int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0] >> np.uint64(1))
