"""What a chat consists of: the turns so far, the models that answer, and their text as it comes."""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from unisd.data.prompts import encode_prompt
from unisd.data.rendering import Messages, apart_from_tools, has_template
from unisd.data.thoughts import MARKS, Parts, completion_text, split_thought
from unisd.errors import UserError
from unisd.models.load import context_length
from unisd.models.tokens import eos_ids, pad_id
from unisd.rollout.engine import Sampling
from unisd.rollout.streaming import stream

logger = logging.getLogger(__name__)


@dataclass
class Conversation:
    """The turns before the next prompt."""

    system: str | None = None
    turns: Messages = field(default_factory=list)
    tools: list[Any] | None = None

    @classmethod
    def of(cls, messages: Messages) -> Conversation:
        """All that stands before the last turn of a prompt."""
        turns, tools = apart_from_tools(messages)
        system = str(turns[0]["content"]) if turns[0]["role"] == "system" else None
        return cls(system, turns[:-1] if system is None else turns[1:-1], tools)

    def prompt(self, text: str) -> Messages:
        """All turns, of which `text` is the last."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns: Messages = [*system, *self.turns, {"role": "user", "content": text}]
        return turns if self.tools is None else [{**turns[0], "tools": self.tools}, *turns[1:]]

    def without_oldest(self) -> Conversation:
        """The same without the first prompt and what follows it up to the next one."""
        starts = [i for i, turn in enumerate(self.turns) if turn["role"] == "user"]
        return Conversation(self.system, self.turns[starts[1] :] if len(starts) > 1 else [], self.tools)


class Writer:
    """Writes a text that grows, as far as it is settled.

    White space at its end may go once more is known, and a character may come in several tokens.

    live: whether it is written before it ends.
    """

    def __init__(self, live: bool) -> None:
        self.live = live
        self._written = ""

    def grow(self, text: str) -> None:
        if not self.live:
            return
        settled = text.rstrip("\ufffd").rstrip()
        if settled.startswith(self._written):
            self._write(settled)

    def end(self, text: str) -> None:
        if not text.startswith(self._written):  # what looked like text was the mark of a thought
            print()
            self._written = ""
        self._write(text)
        print(flush=True)

    def _write(self, text: str) -> None:
        print(text[len(self._written) :], end="", flush=True)
        self._written = text


@dataclass
class Speaker:
    """A model that answers, with its own tokenizer.

    bare: without the adapter that is on it, as its base.
    """

    name: str
    model: Any
    tokenizer: Any
    bare: bool = False

    @cached_property
    def context(self) -> int | None:
        return context_length(self.model)

    @cached_property
    def remembers(self) -> bool:
        """Whether its tokenizer can render more than one turn."""
        return has_template(self.tokenizer)

    def encode(self, prompt: Messages) -> list[int]:
        return encode_prompt(self.tokenizer, prompt if self.remembers else str(prompt[-1]["content"]))

    def is_full(self, prompt: Messages, wanted: int) -> bool:
        """Whether an answer has less room than `wanted`, or than half of the context."""
        if self.context is None:
            return False
        return self.context - len(self.encode(prompt)) < min(wanted, self.context // 2)

    def said(self, ids: list[int]) -> Parts:
        """The thought and the answer in what was written so far."""
        return split_thought(completion_text(self.tokenizer, ids))

    def answer(
        self, prompt: Messages, sampling: Sampling, key: Any, writer: Writer | None, stoppable: bool
    ) -> Parts:
        """Answer, by `writer` while the tokens come; Ctrl-C ends it early if `stoppable`.

        Raises:
            UserError: the prompt leaves no room for an answer.
        """
        ids = self.encode(prompt)
        room = None if self.context is None else self.context - len(ids)
        if room is not None and room < 1:
            raise UserError(
                f"the prompt has {len(ids)} tokens, and the model's context is {self.context}: shorten it."
            )
        most = min(sampling.max_new_tokens, room or sampling.max_new_tokens)
        tokens: list[int] = []

        def on_tokens(found: list[int]) -> None:
            tokens[:] = found
            if writer is not None:
                writer.grow(readable(self.said(found)))

        ends, pad = eos_ids(self.model, self.tokenizer), pad_id(self.model, self.tokenizer)
        cut = Sampling(most, sampling.temperature)
        note = None
        try:
            with self.model.disable_adapter() if self.bare else nullcontext():
                found = stream(self.model, ids, cut, eos_ids=ends, pad_id=pad, key=key, on_tokens=on_tokens)
            tokens = found.ids
            if found.truncated:
                why = "--max_new_tokens" if most == sampling.max_new_tokens else f"context {self.context}"
                note = f"the answer is cut off after {most} tokens ({why})."
        except KeyboardInterrupt:
            if not stoppable:
                raise
            note = "stopped."
        said = self.said(tokens)
        if writer is not None:
            writer.end(readable(said))
        if note is not None:
            sys.stdout.flush()
            logger.warning("%s", note)
        return said


def readable(said: Parts) -> str:
    """Thought and answer as one text, which grows with them."""
    if not said.thought:
        return said.answer
    first, last = MARKS[0]
    return f"{first}\n{said.thought}" + (f"\n{last}\n\n{said.answer}" if said.answer else "")


def fitting(conversation: Conversation, text: str, speakers: list[Speaker], wanted: int) -> Conversation:
    """The conversation without as many of its oldest prompts as leave an answer its room.

    Says how many those are.
    """
    kept, left_out = conversation, 0
    while kept.turns and any(speaker.is_full(kept.prompt(text), wanted) for speaker in speakers):
        kept, left_out = kept.without_oldest(), left_out + 1
    if left_out:
        logger.warning(
            "the context of %d tokens is full: the oldest %d prompt(s) and their answers are left out.",
            min(speaker.context for speaker in speakers if speaker.context is not None),
            left_out,
        )
    return kept
