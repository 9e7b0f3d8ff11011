"""When two problems are the same: normalised words, and the overlap of their word triples.

In scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer) each
character counts as a word.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

MAX_TEXT = 20_000
"""Most characters of a prompt or reference."""


def as_text(prompt: Any) -> str:
    """A prompt, be it text or chat messages, as text."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in prompt)


def reference_of(row: Mapping[str, Any]) -> str:
    """What the teacher of a row is told, else the row's answer; empty where it has neither."""
    return str(row.get("privileged_context") or row.get("completion") or "")


def record_of(prompt: Any) -> dict[str, Any]:
    """A prompt as the files of a run keep it: its text, cut, and beside it the turns of a chat."""
    kept = {"prompt": as_text(prompt)[:MAX_TEXT]}
    return kept if isinstance(prompt, str) else {**kept, "messages": prompt}


NEAR_DUPLICATE_THRESHOLD = (
    0.8  # Jaccard similarity of word triples from which two texts count as near-duplicates
)
SHORT = 5  # words below which a text is too common to give anything away
_UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e50-\u0e59"  # Thai
    "\u0e81-\u0ebd\u0ec0-\u0edf"  # Lao
    "\u1000-\u1049\u1050-\u109f"  # Burmese
    "\u1780-\u17d3\u17e0-\u17e9"  # Khmer
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d"  # Japanese
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def problem_key(prompt: Any) -> tuple[tuple[str, str], ...]:
    """What makes two prompts the same problem: their turns, but for case and white space."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tuple(
        (str(turn.get("role")), " ".join(str(turn.get("content")).casefold().split())) for turn in turns
    )


def problem_mark(prompt: Any) -> str:
    """Sixteen digits that tell a problem (`problem_key`) from others, and not what it asks."""
    return hashlib.blake2b(repr(problem_key(prompt)).encode("utf-8", "replace"), digest_size=8).hexdigest()


def prompt_text(prompt: Any) -> str:
    """The text of a prompt (a string, or chat messages)."""
    return prompt if isinstance(prompt, str) else "\n".join(str(turn["content"]) for turn in prompt)


def words(text: str) -> tuple[str, ...]:
    """Words in order, without case, punctuation and spacing; of text without words its signs."""
    folded = text.casefold()
    return tuple(_WORD.findall(folded) or "".join(folded.split()))


def shingles(found: tuple[str, ...]) -> frozenset[tuple[str, ...]]:
    """Word triples (the whole text where it is shorter)."""
    return frozenset(found[i : i + 3] for i in range(max(1, len(found) - 2)))


def jaccard(a: frozenset[Any], b: frozenset[Any]) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0


def contains(text: str, part: str) -> bool:
    """Whether `part`, a text of some length, occurs in `text` word for word."""
    wanted = words(part)
    return len(wanted) >= SHORT and f" {' '.join(wanted)} " in f" {' '.join(words(text))} "
