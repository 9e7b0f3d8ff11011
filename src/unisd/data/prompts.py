"""Turn a row into token ids: the student's prompt, and what the teacher is shown beside it.

A row's `prompt` is a string (one user turn) or a list of chat messages that ends in a user turn.
Every view goes through the chat template exactly once. A tokenizer without a chat template takes
string prompts as plain text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from unisd.data.privilege import reference_at
from unisd.errors import UserError

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
Prompt = str | Messages

TEACHER_TEMPLATE = (
    "{prompt}\n\nThis is an example of a response to this question:\n{privileged_context}\n\n"
    "Study this example, then solve the question yourself. Answer in the same format."
)
AUXILIARY_TEMPLATE = "{context}\n\n{prompt}\n\nStudy the material above, then solve the question yourself."
# A plain language model continues the text, so the question comes last, as in the student's prompt.
PLAIN_TEACHER_TEMPLATE = "Example response:\n{privileged_context}\n\n{prompt}"
PLAIN_AUXILIARY_TEMPLATE = "{context}\n\n{prompt}"


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Encode a prompt up to where the answer begins.

    The chat template is applied once, with its generation prefix.

    Raises:
        UserError: if `prompt` is messages and the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise UserError(
                "the prompt is a list of messages, but the tokenizer has no chat template: give prompts as"
                " plain strings, or use a model with a chat template."
            )
        ids: list[int] = tokenizer(prompt)["input_ids"]
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        # A tokenizer that should begin with BOS may have lost that in conversion; without it Gemma
        # writes nonsense.
        if (
            bos is not None
            and bos != eos
            and ids[:1] != [bos]
            and getattr(tokenizer, "add_bos_token", None) is not False
        ):
            ids = [bos, *ids]
        # Some tokenizers close every text with an end token; the answer must follow the prompt
        # instead.
        return ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_completion(tokenizer: Any, text: str, ends: Sequence[int] = ()) -> list[int]:
    """Token ids of an answer as the model would write it: the text and the end token.

    That is the one of `ends` (the tokens that end a generation) with which the chat template closes
    an answer: it need not be the tokenizer's EOS. That one stands in where there is no template, or
    it closes with another.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    end = tokenizer.eos_token_id
    if tokenizer.chat_template is not None and len(ends) > 1:
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        closing = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")[2]
        end = next((i for i in tokenizer(closing, add_special_tokens=False)["input_ids"] if i in ends), end)
    return [*ids, end] if end is not None else ids


def _on_last_turn(prompt: Prompt, change: Callable[[str], str]) -> Prompt:
    """Apply `change` to a string prompt, or to the text of the last user turn."""
    if isinstance(prompt, str):
        return change(prompt)
    return [*prompt[:-1], {**prompt[-1], "content": change(str(prompt[-1]["content"]))}]


def fill(template: str, **values: str) -> str:
    """Fill placeholders in one pass.

    Prompts may hold braces, and one value may contain another's placeholder.
    """
    pieces = [template]
    for name, value in values.items():
        marker = "{" + name + "}"
        filled: list[str] = []
        for i, piece in enumerate(pieces):
            if i % 2:  # already a value
                filled.append(piece)
                continue
            head, *rest = piece.split(marker)
            filled.append(head)
            for tail in rest:
                filled += [value, tail]
        pieces = filled
    return "".join(pieces)


@dataclass(frozen=True)
class PromptBuilder:
    """Builds every view's prompt of a row.

    Args:
        tokenizer: with or without chat template.
        layout: `append` (one user turn, by `teacher_template`) or `turn` (problem, reference as the
            answer, problem again).
        teacher_template: with `{prompt}` and `{privileged_context}`; None: built in.
        auxiliary_template: with `{context}` and `{prompt}`; None: built in.
        level: how much of the reference the teacher sees (:mod:`unisd.data.privilege`).

    Raises:
        UserError: if a template lacks a placeholder.
    """

    tokenizer: Any
    layout: str = "append"
    teacher_template: str | None = None
    auxiliary_template: str | None = None
    level: str = "full"

    def __post_init__(self) -> None:
        for name, template, needed in (
            ("teacher_prompt_template", self.teacher_template, ("{prompt}", "{privileged_context}")),
            ("auxiliary_prompt_template", self.auxiliary_template, ("{context}", "{prompt}")),
        ):
            missing = [] if template is None else [marker for marker in needed if marker not in template]
            if missing:
                raise UserError(f"{name} lacks {' and '.join(missing)}: add it where that text belongs.")

    @property
    def is_chat(self) -> bool:
        return self.tokenizer.chat_template is not None

    def with_reference(self, prompt: Prompt, reference: str) -> Prompt:
        """The teacher's prompt: the problem and the reference, in the chosen layout."""
        if self.layout == "turn":
            if isinstance(prompt, str) and not self.is_chat:
                return f"{prompt}\n{reference}\n\n{prompt}"
            turns: Messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return [*turns, {"role": "assistant", "content": reference}, turns[-1]]
        template = self.teacher_template or (TEACHER_TEMPLATE if self.is_chat else PLAIN_TEACHER_TEMPLATE)
        return _on_last_turn(prompt, lambda text: fill(template, prompt=text, privileged_context=reference))

    def with_context(self, prompt: Prompt, context: str) -> Prompt:
        """Put a solved example of another problem (or an instruction) before the problem."""
        template = self.auxiliary_template or (
            AUXILIARY_TEMPLATE if self.is_chat else PLAIN_AUXILIARY_TEMPLATE
        )
        return _on_last_turn(prompt, lambda text: fill(template, context=context, prompt=text))

    def student(self, row: dict[str, Any]) -> list[int]:
        return encode_prompt(self.tokenizer, row["prompt"])

    def teacher(self, row: dict[str, Any]) -> list[int]:
        """Ids of the teacher's prompt at the builder's level.

        Raises:
            UserError: the row has nothing at this level (the trainer refuses such rows by number).
        """
        ids = self.at_level(row, self.level)
        if ids is None:
            raise UserError(
                f"row {row.get('id')} has nothing for teacher_context={self.level}: use teacher_context=full."
            )
        return ids

    def at_level(self, row: dict[str, Any], level: str, question: bool = True) -> list[int] | None:
        """Ids of a teacher's prompt at a level of privilege; None where the row has nothing for it.

        At level `full` the row's own `teacher_prompt` wins over the template. `question=False`
        leaves the problem out.
        """
        if level == "plain":
            return self.student(row) if question else None
        if level == "full" and question and row.get("teacher_prompt"):
            return encode_prompt(self.tokenizer, row["teacher_prompt"])
        reference = reference_at(row, level)
        if reference is None:
            return None
        build = self.with_reference if question and level != "unconditioned" else self.without_question
        return encode_prompt(self.tokenizer, build(row["prompt"], reference))

    def without_question(self, prompt: Prompt, reference: str) -> Prompt:
        """The reference alone, in the append layout's words; system turns stay."""
        template = self.teacher_template or (TEACHER_TEMPLATE if self.is_chat else PLAIN_TEACHER_TEMPLATE)
        text = fill(template, prompt="", privileged_context=reference).strip()
        if isinstance(prompt, str):
            return text
        return [*(turn for turn in prompt if turn["role"] == "system"), {"role": "user", "content": text}]

    def negative(self, row: dict[str, Any]) -> list[int]:
        return encode_prompt(self.tokenizer, self.with_reference(row["prompt"], row["negative_context"]))

    def auxiliary(self, row: dict[str, Any], most: int) -> list[list[int]]:
        contexts = (row.get("auxiliary_contexts") or [])[:most]
        return [
            encode_prompt(self.tokenizer, self.with_context(row["prompt"], context)) for context in contexts
        ]

    def check_generation_prefix(self, row: dict[str, Any]) -> None:
        """Warn if student and teacher prompts do not end alike.

        Their answers would start from different states.
        """
        if not self.is_chat:
            return
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        render = self.tokenizer.apply_chat_template
        closed = render(messages, tokenize=False, add_generation_prompt=False)
        opened = render(messages, tokenize=False, add_generation_prompt=True)
        prefix = opened[len(closed) :] if opened.startswith(closed) else opened[-16:]
        teacher = self.tokenizer.decode(self.teacher(row))
        if not teacher.endswith(prefix) and prefix.strip() and not teacher.rstrip().endswith(prefix.rstrip()):
            logger.warning(
                "Student and teacher prompts end differently (student: %r, teacher: %r): check the chat"
                " template's thinking mode.",
                prefix,
                teacher[-len(prefix) :],
            )
