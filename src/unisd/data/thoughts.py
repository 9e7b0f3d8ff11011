"""Tell a model's thought from its answer: graders see what follows the thought.

A thought stands between marks (`<think>` ... `</think>`), of which the chat template may have
written the first already, or in a channel of its own (`<|channel|>analysis<|message|>`). An answer
whose thought has not ended says nothing yet: its text is empty.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from unisd.data.rendering import generation_prefix, special_tokens

MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),  # Gemma 4
)
_CHANNEL = re.compile(r"<\|channel\|>(\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_AFTER_MESSAGE = re.compile(r"<\|(?:end|return|call|start)\|>")


class Parts(NamedTuple):
    """What a completion consists of; both without the marks around them."""

    thought: str
    answer: str


def opened_mark(text: str) -> str | None:
    """The mark of a thought that `text`, the end of a prompt, leaves open."""
    for first, last in MARKS:
        if text.rfind(first) > text.rfind(last):
            return first
    return None


def split_thought(text: str, opened: bool = False) -> Parts:
    """Cut a completion after its thought.

    opened: whether the prompt has opened a thought that this text goes on with.
    """
    channels = list(_CHANNEL.finditer(text))
    if channels:
        last = channels[-1]
        said = _AFTER_MESSAGE.split(text[last.end() :], maxsplit=1)[0]
        if last[1] == "analysis":
            return Parts(said, "")
        thoughts = [
            _AFTER_MESSAGE.split(text[found.end() :], maxsplit=1)[0]
            for found in channels[:-1]
            if found[1] == "analysis"
        ]
        return Parts("\n".join(thoughts), said)
    for first, last_mark in MARKS:
        before, mark, answer = text.rpartition(last_mark)
        if mark and first not in answer:
            return Parts(before.strip().removeprefix(first).strip(), answer.lstrip())
        if text.lstrip().startswith(first) or (mark and first in answer):
            return Parts(text.rpartition(first)[2].strip(), "")
    return Parts(text, "") if opened else Parts("", text)


def answer_of(text: str) -> str:
    """The answer in a text that anybody wrote, without its thought; empty where this goes on."""
    return split_thought(text).answer


def completion_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a completion, in which a thought can be told from the answer.

    Where its marks would get lost, for they are special tokens or in the prompt, it stands between
    `<think>` and `</think>`.
    """
    plain: str = tokenizer.decode(ids, skip_special_tokens=True)
    marked = tokenizer.decode(ids, skip_special_tokens=False)
    opened = opened_mark(generation_prefix(tokenizer)) is not None
    parts = split_thought(marked, opened)
    if parts == ("", marked) or split_thought(plain).answer != plain:
        return plain
    thought, answer = parts
    for special in special_tokens(tokenizer):
        thought, answer = thought.replace(special, ""), answer.replace(special, "")
    first, last = MARKS[0]
    if not parts.answer:
        return f"{first}{thought}"
    return f"{first}{thought}{last}{answer}" if thought else answer
