"""When two problems are the same: normalised words, and the overlap of their word triples."""

from __future__ import annotations

import re
from typing import Any

MAX_TEXT = 20_000
"""Most characters of a prompt or reference."""


def as_text(prompt: Any) -> str:
    """A prompt, be it text or chat messages, as text."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in prompt)


NEAR_DUPLICATE_THRESHOLD = (
    0.8  # Jaccard similarity of word triples from which two texts count as near-duplicates
)
SHORT = 5  # words below which a text is too common to give anything away
_WORD = re.compile(r"\w+")


def prompt_text(prompt: Any) -> str:
    """The text of a prompt (a string, or chat messages)."""
    return prompt if isinstance(prompt, str) else "\n".join(str(turn["content"]) for turn in prompt)


def words(text: str) -> tuple[str, ...]:
    """Words in order, without case, punctuation and spacing."""
    return tuple(_WORD.findall(text.casefold()))


def shingles(found: tuple[str, ...]) -> frozenset[tuple[str, ...]]:
    """Word triples (the whole text where it is shorter)."""
    return frozenset(found[i : i + 3] for i in range(max(1, len(found) - 2)))


def jaccard(a: frozenset[Any], b: frozenset[Any]) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0


def contains(text: str, part: str) -> bool:
    """Whether `part`, a text of some length, occurs in `text` word for word."""
    wanted = words(part)
    return len(wanted) >= SHORT and f" {' '.join(wanted)} " in f" {' '.join(words(text))} "
