"""Conversations of any spelling as messages, and the answer that ends one.

| given | read as |
|---|---|
| `from` and `value` (ShareGPT) | role and content; `function_call`: a call; `observation`: a tool |
| content in parts of text | one text, the parts on lines of their own |
| no content beside tool calls | an empty text |
| arguments of a call as JSON text | the object, as chat templates take it |
| a conversation stored as JSON text | the conversation |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from unisd.data.reading import describe
from unisd.errors import UserError
from unisd.files import parsed

Turn = dict[str, Any]
WRITTEN = ("assistant", "tool", "function", "ipython")
"""Roles whose turns answer, with what they read."""
COLUMNS = ("messages", "conversations", "conversation")
"""Names of columns that hold conversations, also in other projects."""
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
}


def as_messages(value: Any, where: str) -> Any:
    """A list of turns as messages with role and content; anything else as it is.

    Raises:
        UserError: a turn of an unknown speaker, or a call that cannot be read.
    """
    if not (isinstance(value, list) and value and all(isinstance(turn, Mapping) for turn in value)):
        return value
    return [_message(turn, where) for turn in value]


def of_text(value: Any, where: str) -> Any:
    """A conversation that a cell holds as JSON text.

    Raises:
        UserError: the text is no JSON list.
    """
    if not isinstance(value, str) or not value.strip():
        return value
    found = parsed(value)
    if not isinstance(found, list):
        raise UserError(f"{where} is {describe(value)}, a list of turns is needed: fix or remove the row.")
    return found


def _message(turn: Mapping[str, Any], where: str) -> Turn:
    # tables give every turn all keys that one of them has
    message = {name: value for name, value in turn.items() if value is not None or name == "content"}
    if {"from", "value"} <= set(turn) and "role" not in message:
        message = _of_speaker(message, where)
    content = message.get("content")
    if isinstance(content, list) and content and all(_is_text(part) for part in content):
        message["content"] = "\n".join(part["text"] for part in content)
    if calls := message.get("tool_calls"):
        message["content"] = message.get("content") or ""
        message["tool_calls"] = [_call(call, where) for call in calls]
    return message


def _of_speaker(turn: Turn, where: str) -> Turn:
    speaker, value = str(turn.pop("from")), turn.pop("value", None)
    role = SPEAKERS.get(speaker.lower())
    if role is None:
        raise UserError(
            f"{where}: a turn comes from {speaker!r}, and only {', '.join(SPEAKERS)} are known: fix or"
            " remove the row."
        )
    if speaker.lower() == "function_call":
        call = {"type": "function", "function": _object(value, where)}
        return {**turn, "role": role, "content": "", "tool_calls": [call]}
    return {**turn, "role": role, "content": value}


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _call(call: Any, where: str) -> Any:
    if not isinstance(call, Mapping):
        raise UserError(f"{where}: a tool call is {describe(call)}: fix or remove the row.")
    if isinstance(function := call.get("function"), Mapping):
        return {**call, "function": _call(function, where)}
    return {**call, "arguments": _object(call.get("arguments") or {}, where)}


def _object(value: Any, where: str) -> Any:
    found = parsed(value) if isinstance(value, str) else value
    if not isinstance(found, Mapping):
        raise UserError(
            f"{where}: a tool call holds {describe(value)}, a JSON object is needed: fix or remove the row."
        )
    return dict(found)


# ---------------------------------------------------------------- the answer


def ends_in_answer(value: Any) -> bool:
    """Whether these are turns, of either spelling, and the last is an assistant's."""
    last = value[-1] if isinstance(value, (list, tuple)) and len(value) else None
    if not isinstance(last, Mapping):
        return False
    return SPEAKERS.get(str(last.get("role") or last.get("from")).lower()) == "assistant"


def answer_of(turns: Any) -> str | None:
    """What the assistant says in the last of some messages: its text, and its calls as JSON."""
    last = turns[-1] if isinstance(turns, list) and turns else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return None
    if not isinstance(last.get("content"), str):
        return None
    calls = [call.get("function", call) for call in last.get("tool_calls") or ()]
    written = [
        json.dumps({"name": call.get("name"), "arguments": call.get("arguments")}, ensure_ascii=False)
        for call in calls
    ]
    return "\n".join(filter(None, [last["content"], *written]))


def before_answer(turns: Sequence[Turn]) -> int:
    """How many turns belong to the prompt: up to the last that no assistant and no tool wrote."""
    asked = [place for place, turn in enumerate(turns) if turn.get("role") not in WRITTEN]
    return asked[-1] + 1 if asked and asked[-1] < len(turns) - 1 else len(turns) - 1


def calls_of(turns: Sequence[Turn]) -> list[str]:
    """The names of the functions that some turns call."""
    calls = [call for turn in turns for call in turn.get("tool_calls") or ()]
    return [str(call.get("function", call).get("name") or "") for call in calls]
