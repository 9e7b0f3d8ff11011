"""Writes an Ollama Modelfile whose template says what the model's own chat template says.

Ollama's templates are Go's. A Jinja template cannot be translated in general, but most put fixed
marks around turns: those marks are read off what the template renders, and checked on other chats.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from unisd.data.rendering import Messages, has_template, render
from unisd.errors import UserError

SYSTEM, ASKED, ANSWERED, AGAIN = "systemtext", "askedtext", "answeredtext", "againtext"
"""Texts that no template changes, to find what it puts between them."""


@dataclass(frozen=True)
class Marks:
    """What a chat template puts around the texts of a conversation."""

    begin: str  # where there is no system turn
    system: tuple[str, str] | None  # around one; None: the template takes none
    user: str  # before each
    reply: str  # between a question and its answer
    end: str  # of an answer
    answer: str  # after the last question

    def render(self, messages: Messages) -> str:
        """A conversation as these marks have it."""
        text = self.begin
        for turn in messages:
            if turn["role"] == "system" and self.system is not None:
                text = self.system[0] + turn["content"] + self.system[1]
            elif turn["role"] == "user":
                text += self.user + turn["content"]
            else:
                text += self.reply + turn["content"] + self.end
        return text + self.answer

    def without(self, bos: str) -> Marks:
        """The same without BOS at the beginning."""
        system = self.system and (self.system[0].removeprefix(bos), self.system[1])
        return replace(self, begin=self.begin.removeprefix(bos), system=system)

    @property
    def go(self) -> str:
        """The same as a template of Ollama."""
        begin = self.begin
        if self.system is not None:
            before, after = self.system
            begin = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{begin}{{{{ end }}}}"
        return (
            f'{begin}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{self.user}{{{{ .Content }}}}'
            f'{{{{ else if eq .Role "assistant" }}}}{self.reply}{{{{ .Content }}}}{self.end}'
            f"{{{{ end }}}}{{{{ end }}}}{self.answer}"
        )


def marks_of(tokenizer: Any) -> Marks | None:
    """The marks of a chat template; None where it is more than marks."""
    asked, answered = {"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}
    chat = [asked, answered, {"role": "user", "content": AGAIN}]
    system = {"role": "system", "content": SYSTEM}
    try:
        start, reply, following, answer = _between(render(tokenizer, chat), ASKED, ANSWERED, AGAIN)
        around: list[str] | None = None
        with suppress(UserError):  # some refuse system turns
            around = _between(render(tokenizer, [system, *chat]), SYSTEM, ASKED, ANSWERED, AGAIN)
        end = render(tokenizer, chat[:2], answering=False, kept=(ANSWERED,)).rpartition(ANSWERED)[2]
        user = following.removeprefix(end)
        system_turn = (around[0], around[1].removesuffix(user)) if around else None
        found = Marks(start.removesuffix(user), system_turn, user, reply, end, answer)
        chats = [[asked], chat, [*chat, answered, asked]]
        chats += [[system, *one] for one in chats] if around else []
        same = all(found.render(one) == render(tokenizer, one) for one in chats)
    except (UserError, ValueError):
        return None
    return found if same and '"""' not in found.go else None


def _between(text: str, *texts: str) -> list[str]:
    """What stands before, between and after these texts; `ValueError` if one is missing."""
    parts = []
    for one in texts:
        before, found, text = text.partition(one)
        if not found:
            raise ValueError(one)
        parts.append(before)
    return [*parts, text]


def modelfile(tokenizer: Any, file: str, ends: Sequence[int], bos: bool) -> tuple[str, bool]:
    """The text of a Modelfile for a GGUF file beside it, and whether it has a template of its own.

    Args:
        ends: ids of all tokens that end an answer.
        bos: the server puts BOS before each prompt, so that the template must not.
    """
    lines = [f"FROM ./{file}"]
    template: str | None = "{{ .Prompt }}"
    if has_template(tokenizer):
        marks = marks_of(tokenizer)
        template = None if marks is None else (marks.without(tokenizer.bos_token) if bos else marks).go
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    texts = dict.fromkeys(tokenizer.convert_ids_to_tokens(list(ends)))
    lines += [f'PARAMETER stop "{text}"' for text in texts if '"' not in text]
    return "\n".join(lines) + "\n", template is not None
