"""The chats that the pocket base is trained on and checked with."""

from __future__ import annotations

from unisd.pocket.world import POCKET_AUXILIARY_TEMPLATE, POCKET_TEACHER_TEMPLATE

Message = dict[str, str]


def teacher_messages(prompt: str, reference: str, layout: str = "append") -> list[Message]:
    """The two ways to show a reference: after the problem, or as an earlier answer to it."""
    if layout == "append":
        return [user(POCKET_TEACHER_TEMPLATE.format(prompt=prompt, privileged_context=reference))]
    return [user(prompt), assistant(reference), user(prompt)]


def auxiliary_messages(prompt: str, context: str) -> list[Message]:
    return [user(POCKET_AUXILIARY_TEMPLATE.format(context=context, prompt=prompt))]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
