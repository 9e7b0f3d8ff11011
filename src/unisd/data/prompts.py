"""Turn a row into token ids: the student's prompt, and what the teacher is shown beside it.

A row's `prompt` is a string (one user turn) or a list of chat messages that ends in a user turn.
Every view goes through the chat template exactly once. A tokenizer without a chat template takes
string prompts as plain text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from unisd.data import rendering
from unisd.data.privilege import reference_at
from unisd.data.rendering import Messages, as_messages, following_ids
from unisd.data.thoughts import MARKS, opened_mark, split_thought
from unisd.errors import UserError

logger = logging.getLogger(__name__)

Prompt = str | Messages
View = tuple[Prompt, tuple[str, ...]]  # a prompt, and texts that must be in what is rendered

TEACHER_TEMPLATE = (
    "{prompt}\n\nThis is an example of a response to this question:\n{privileged_context}\n\n"
    "Study this example, then solve the question yourself. Answer in the same format."
)
AUXILIARY_TEMPLATE = "{context}\n\n{prompt}\n\nStudy the material above, then solve the question yourself."
# A plain language model continues the text, so the question comes last, as in the student's prompt.
PLAIN_TEACHER_TEMPLATE = "Example response:\n{privileged_context}\n\n{prompt}"
PLAIN_AUXILIARY_TEMPLATE = "{context}\n\n{prompt}"
# What the teacher is told of the step's own answers: the problem, then what there is of both.
SIBLING_PART = "\n\nThis is an answer that was found correct:\n{sibling}"
FEEDBACK_PART = "\n\nAn earlier attempt failed. This was said about it:\n{feedback}"
AFTER_ROLLOUT_END = "\n\nStudy this, then solve the question yourself. Answer in the same format."


def encode_prompt(
    tokenizer: Any, prompt: Prompt, options: Mapping[str, Any] | None = None, kept: Sequence[str] = ()
) -> list[int]:
    """Encode a prompt up to where the answer begins.

    The chat template is applied once, with its generation prefix.

    Args:
        options: of the template, in place of those that the tokenizer keeps.
        kept: texts of assistant turns that must be in what is rendered.

    Raises:
        UserError: `prompt` is messages and the tokenizer has no chat template, or this refuses
            them or leaves something out.
    """
    if rendering.has_template(tokenizer):
        return rendering.encode(tokenizer, as_messages(prompt), options, kept)
    if not isinstance(prompt, str):
        raise UserError(
            "the prompt is a list of messages (as columns system and tools make it), but the tokenizer has no"
            " chat template: give prompts as plain strings, or use a model with a chat template."
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


def overlong(tokenizer: Any, rows: Sequence[Mapping[str, Any]], context: int | None) -> dict[int, int]:
    """Tokens of the prompts that leave no room for an answer in the context, by row."""
    if context is None:
        return {}
    lengths = {
        number: len(encode_prompt(tokenizer, row["prompt"]))
        for number, row in enumerate(rows)
        if len(str(row["prompt"]).encode()) + 1024 > context  # no other can be too long
    }
    return {number: length for number, length in lengths.items() if length >= context}


def encode_completion(
    tokenizer: Any, text: str, ends: Sequence[int] = (), prompt: Prompt | None = None
) -> list[int]:
    """Token ids of an answer to `prompt` as the model would write it, with its end token.

    It is what the chat template makes of an assistant turn, after the prompt. Where this does not
    begin with the prompt, it is the text itself, without a thought's mark that the prompt ends in,
    and the token with which the template closes an answer (else the tokenizer's EOS).

    Args:
        ends: the tokens that end a generation.
        prompt: None: no conversation is rendered.
    """
    closing = rendering.closing_token(tokenizer)
    end = closing if closing in ends else tokenizer.eos_token_id
    end = next(iter(ends), None) if end is None else end
    stops = {*ends, end}
    before = prompt if isinstance(prompt, str) else ""
    if prompt is not None and tokenizer.chat_template is not None:
        messages = as_messages(prompt)
        before = rendering.render(tokenizer, messages)
        written = _assistant_turn(tokenizer, messages, before, text)
        if written is not None:
            ids = following_ids(tokenizer, before, written)
            # The first one behind the answer: some templates write an end of the text after it, and
            # a short answer may be a part of what closes it.
            answer = split_thought(text).answer.strip()
            found = [match.start() for match in re.finditer(re.escape(answer), written)] if answer else []
            places = found or [len(written)]
            for place in reversed(places):
                spoken = following_ids(tokenizer, before, written[:place])
                last = next((i for i in range(len(spoken), len(ids)) if ids[i] in stops), None)
                if last is not None:
                    return ids[: last + 1]
            if stops.isdisjoint(ids):  # a template that closes no answer
                text = written[: places[-1] + len(answer)]
        else:
            _say_once(
                "A chat with an answer does not begin with its prompt, as the chat template renders it:"
                " reference answers are taken as they are, right after the prompt."
            )
            text = _after(_opened(tokenizer, messages, before), text)
    ids = following_ids(tokenizer, before, text)
    return [*ids, end] if end is not None else ids


def _opened(tokenizer: Any, messages: Messages, before: str) -> str | None:
    """The mark of a thought that the template leaves open in what it writes for the answer.

    One that a user's turn names opens none.
    """
    if opened_mark(before) is None:
        return None
    prefix = rendering.generation_prefix(tokenizer)
    with suppress(UserError):
        asked = rendering.render(tokenizer, messages, answering=False)
        prefix = before[len(asked) :] if before.startswith(asked) else prefix
    return opened_mark(prefix)


def _assistant_turn(tokenizer: Any, messages: Messages, before: str, text: str) -> str | None:
    """What the template writes for an answer, after the prompt `before`; None if it cannot be told.

    A thought is given in fields of its own, or else within the text.
    """
    parts = split_thought(text)
    turn = {"role": "assistant", "content": text}
    apart = {**turn, "content": parts.answer, "reasoning_content": parts.thought, "thinking": parts.thought}
    opened = _opened(tokenizer, messages, before)
    for form in (apart, turn) if parts.thought and parts.answer else (turn,):
        said = (parts.thought, parts.answer)
        try:
            whole = rendering.render(tokenizer, [*messages, form], answering=False, kept=said)
        except UserError:
            continue
        written = whole.removeprefix(before)
        doubled = opened is not None and written.lstrip().startswith(opened)
        if whole.startswith(before) and not doubled:
            return written
    return None


def _after(opened: str | None, text: str) -> str:
    """An answer right after a prompt that may have opened a thought with this mark."""
    if opened is None:
        return text
    closing = dict(MARKS)[opened]
    if closing in text:
        return text.lstrip().removeprefix(opened).lstrip()
    return f"\n{closing}\n\n{text}"


@cache
def _say_once(text: str) -> None:
    logger.warning("%s", text)


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
        teacher_options: of the chat template, for what the teacher reads; None: the student's.
        embedded: how many tokens the model has an embedding of, where the tokenizer knows more.

    Raises:
        UserError: if a template lacks a placeholder.
    """

    tokenizer: Any
    layout: str = "append"
    teacher_template: str | None = None
    auxiliary_template: str | None = None
    level: str = "full"
    teacher_options: Mapping[str, Any] | None = None
    embedded: int | None = None

    def __post_init__(self) -> None:
        for name, template, needed in (
            ("teacher_prompt_template", self.teacher_template, ("{prompt}", "{privileged_context}")),
            ("auxiliary_prompt_template", self.auxiliary_template, ("{context}", "{prompt}")),
        ):
            missing = [] if template is None else [marker for marker in needed if marker not in template]
            if missing:
                raise UserError(f"{name} lacks {' and '.join(missing)}: add it where that text belongs.")
        if self.teacher_options is not None:
            rendering.check_options(self.tokenizer, self.teacher_options, "teacher_chat_template_kwargs")

    @property
    def is_chat(self) -> bool:
        return rendering.has_template(self.tokenizer)

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
        view = self._view(row, level, question)
        return None if view is None else self._encode(*view)

    def lacks(self, row: dict[str, Any], level: str) -> bool:
        """Whether the row has nothing for a level other than `plain`."""
        return not (level == "full" and row.get("teacher_prompt")) and reference_at(row, level) is None

    def _view(self, row: dict[str, Any], level: str, question: bool = True) -> View | None:
        """What the teacher reads, and what of it must not get lost."""
        if level == "full" and question and row.get("teacher_prompt"):
            return row["teacher_prompt"], ()
        reference = reference_at(row, level)
        if reference is None:
            return None
        if level == "other":
            return (self.with_context(row["prompt"], reference), ()) if question else None
        build = self.with_reference if question and level != "unconditioned" else self.without_question
        return build(row["prompt"], reference), self._kept(reference)

    def _kept(self, reference: str) -> tuple[str, ...]:
        """A reference in a turn of its own; within the user's turn it is looked for anyway."""
        return (reference,) if self.layout == "turn" else ()

    def _encode(self, prompt: Prompt, kept: tuple[str, ...] = ()) -> list[int]:
        return encode_prompt(self.tokenizer, prompt, self.teacher_options, kept)

    def after_rollout(self, row: dict[str, Any], sibling: str | None, feedback: str | None) -> list[int]:
        """Ids of a teacher's prompt that tells of the step's own answers: the problem, a passed
        answer of another generation, feedback on this one, and what to do (the order of SDPO, arXiv
        2601.20802).

        A plain language model continues the text, so the problem comes last, without instructions.
        """
        parts = ((SIBLING_PART, "sibling", sibling), (FEEDBACK_PART, "feedback", feedback))
        told = "".join(fill(part, **{name: text}) for part, name, text in parts if text is not None)
        if not self.is_chat:
            return self._encode(f"{told.lstrip()}\n\n{row['prompt']}")
        return self._encode(_on_last_turn(row["prompt"], lambda text: text + told + AFTER_ROLLOUT_END))

    def check(self, row: dict[str, Any]) -> None:
        """Render a row's prompts.

        Raises:
            UserError: the chat template refuses one, or leaves something out; or the model has no
                embedding of a token.
        """
        self.check_asked(row)
        if self.embedded is not None:
            self._check_embedded(self.at_level(row, self.level) or [], self.embedded)
        if self.tokenizer.chat_template is None:
            return
        wrong = row.get("negative_context")
        views = (
            self._view(row, self.level) if self.level != "plain" else None,
            (self.with_reference(row["prompt"], wrong), self._kept(wrong)) if wrong else None,
        )
        for prompt, kept in filter(None, views):
            rendering.render(self.tokenizer, as_messages(prompt), self.teacher_options, kept=kept)

    def check_asked(self, row: dict[str, Any]) -> None:
        """The same of what the student is asked and what it could answer, all that an evaluation
        reads.
        """
        if self.embedded is not None:
            answer = self.tokenizer(str(row.get("completion") or ""), add_special_tokens=False)["input_ids"]
            self._check_embedded([*self.student(row), *answer], self.embedded)
        if self.tokenizer.chat_template is not None:
            rendering.render(self.tokenizer, as_messages(row["prompt"]))

    def _check_embedded(self, ids: Sequence[int], rows: int) -> None:
        if (highest := max(ids, default=0)) >= rows:
            raise UserError(
                f"it holds the token {self.tokenizer.convert_ids_to_tokens(highest)!r} ({highest}), but"
                f" the model's embedding has {rows} rows: take its text out, or give the model's own"
                " tokenizer."
            )

    def without_question(self, prompt: Prompt, reference: str) -> Prompt:
        """The reference alone, in the append layout's words; system turns stay."""
        template = self.teacher_template or (TEACHER_TEMPLATE if self.is_chat else PLAIN_TEACHER_TEMPLATE)
        text = fill(template, prompt="", privileged_context=reference).strip()
        if isinstance(prompt, str):
            return text
        plain, tools = rendering.apart_from_tools(prompt)
        turns = [*(turn for turn in plain if turn["role"] == "system"), {"role": "user", "content": text}]
        return turns if tools is None else [{**turns[0], "tools": tools}, *turns[1:]]

    def negative(self, row: dict[str, Any]) -> list[int]:
        wrong = row["negative_context"]
        return self._encode(self.with_reference(row["prompt"], wrong), self._kept(wrong))

    def auxiliary(self, row: dict[str, Any], most: int) -> list[list[int]]:
        contexts = (row.get("auxiliary_contexts") or [])[:most]
        return [self._encode(self.with_context(row["prompt"], context)) for context in contexts]

    def check_generation_prefix(self, row: dict[str, Any]) -> None:
        """Warn if student and teacher prompts do not end alike.

        Their answers would start from different states.
        """
        prefix = rendering.generation_prefix(self.tokenizer)
        teacher = self.tokenizer.decode(self.teacher(row))
        if not teacher.endswith(prefix) and prefix.strip() and not teacher.rstrip().endswith(prefix.rstrip()):
            logger.warning(
                "Student and teacher prompts end differently (student: %r, teacher: %r): check the chat"
                " template's thinking mode.",
                prefix,
                teacher[-len(prefix) :],
            )
