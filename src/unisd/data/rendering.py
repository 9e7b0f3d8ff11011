"""Render chats by a tokenizer's own template, and check that what was put in has come out.

Options of the template (`enable_thinking`, `reasoning_effort`, ...) and the date that it writes are
kept with the tokenizer and saved beside the model: whoever opens it later reads alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from unisd.data.conversations import calls_of
from unisd.data.origin import place_of
from unisd.errors import UserError

Messages = list[dict[str, Any]]

# Their names in tokenizer_config.json.
_OF_TODAY = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")
"""What a template asks the date by; it takes values from outside, but no function."""
OPTIONS, DATE = "chat_template_kwargs", "chat_template_date"
_STARTED = datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)
_QUESTION: Messages = [{"role": "user", "content": "question"}]
_TURNS: Messages = [*_QUESTION, {"role": "assistant", "content": "answer"}]


NO_TOOLS = (
    "the chat template does not show the tools of the row: give the tokenizer a chat_template that does, put"
    " the tools into the prompt's text, or remove the column tools."
)

NO_CALLS = (
    "the chat template does not show the tool calls of the row: give the tokenizer a chat_template that"
    " does, or remove the row."
)


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer can render a chat.

    Some do so by code, without a template to look at.
    """
    if tokenizer.chat_template is not None:
        return True
    try:
        return bool(tokenizer.apply_chat_template(_QUESTION, add_generation_prompt=True))
    except Exception:  # a template is a program
        return False


def set_options(tokenizer: Any, options: Mapping[str, Any] | None) -> None:
    """Render with these options from now on; None leaves the tokenizer's own.

    Raises:
        UserError: the template does not read one of them, or there is none.
    """
    if options is not None:
        check_options(tokenizer, options)
        tokenizer.init_kwargs[OPTIONS] = dict(options)


def check_options(tokenizer: Any, options: Mapping[str, Any], name: str = OPTIONS) -> None:
    """Raise `UserError` for the first option that would be ignored."""
    if not isinstance(options, Mapping):
        raise UserError(
            f"{name}={options!r} is not a mapping: give JSON such as '{{\"enable_thinking\": false}}'."
        )
    if not has_template(tokenizer):
        raise UserError(f"{name}: the tokenizer has no chat template that could read them: unset it.")
    template = tokenizer.chat_template
    for option in options:
        if template is not None and not re.search(rf"\b{re.escape(str(option))}\b", str(template)):
            raise UserError(f"{name}: the chat template does not read {option!r}: correct or remove it.")


def is_dated(tokenizer: Any) -> bool:
    """Whether the template writes the day's date."""
    return "strftime_now" in str(tokenizer.chat_template)


def fix_date(tokenizer: Any, checkpoint: str | Path | None = None) -> None:
    """Render with one date from now on: the checkpoint's, else the tokenizer's own, else today's.

    It is saved with the tokenizer, so that a run that goes on tomorrow reads the same prompts.
    """
    if not is_dated(tokenizer):
        return
    saved = Path(checkpoint or "") / "tokenizer_config.json"
    earlier = json.loads(saved.read_text(encoding="utf-8")) if checkpoint and saved.is_file() else {}
    own = tokenizer.init_kwargs.get(DATE)
    tokenizer.init_kwargs[DATE] = earlier.get(DATE) or own or _STARTED.date().isoformat()


def rendered_with(tokenizer: Any) -> dict[str, Any]:
    """What a prompt's text depends on beside template and messages."""
    kept = getattr(tokenizer, "init_kwargs", {})
    return {name: kept[name] for name in (OPTIONS, DATE) if kept.get(name)}


def _apply(tokenizer: Any, messages: Messages, options: Mapping[str, Any] | None, **how: Any) -> Any:
    kept = rendered_with(tokenizer)
    values = dict(kept.get(OPTIONS, {}) if options is None else options)
    messages, tools = apart_from_tools(messages)
    if tools:
        values["tools"] = tools
    if is_dated(tokenizer):
        day = datetime.fromisoformat(kept[DATE]) if DATE in kept else _STARTED
        template = values.get("chat_template") or tokenizer.get_chat_template(tools=tools)
        values["chat_template"] = _OF_TODAY.sub(lambda call: repr(day.strftime(call["format"])), template)
    return tokenizer.apply_chat_template(messages, **how, **values)


def render(
    tokenizer: Any,
    messages: Messages,
    options: Mapping[str, Any] | None = None,
    *,
    answering: bool = True,
    kept: Sequence[str] = (),
) -> str:
    """The text of a chat, up to where the answer begins if `answering`.

    Args:
        options: of the template; None: those kept with the tokenizer.
        kept: texts of assistant turns that must be in it, beside those of all other turns.

    Raises:
        UserError: the template refuses the turns, or leaves one of them out.
    """
    must = [str(turn["content"]) for turn in messages if turn["role"] in ("system", "developer", "user")]
    must += kept
    names = [name for tool in apart_from_tools(messages)[1] or () if (name := name_of_tool(tool))]
    in_parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
    # only some templates know developer turns, which say what system turns do
    as_system = [
        {**turn, "role": "system" if turn["role"] == "developer" else turn["role"]} for turn in messages
    ]
    refusal: Exception | None = None
    lost: str | None = None
    # templates of models that also see images take parts alone
    for form in (messages, in_parts, *([as_system] if as_system != messages else ())):
        try:
            text = str(_apply(tokenizer, form, options, tokenize=False, add_generation_prompt=answering))
        except Exception as error:  # a template is a program
            refusal = refusal or error
            continue
        if _lost(text, names) is not None:
            raise UserError(NO_TOOLS)
        if _lost(text, calls_of(messages)) is not None:
            raise UserError(NO_CALLS)
        missing = _lost(text, must)
        if missing is None and (form is not in_parts or "'type': 'text'" not in text):
            return text
        lost = lost or missing
    raise UserError(_refused(messages, refusal) if lost is None else _left_out(lost, kept))


def apart_from_tools(messages: Messages) -> tuple[Messages, list[Any] | None]:
    """The turns, and the tools that the first of them may bring; templates take them apart."""
    tools = next((turn["tools"] for turn in messages if turn.get("tools")), None)
    if tools is None:
        return messages, None
    return [{name: turn[name] for name in turn if name != "tools"} for turn in messages], tools


def name_of_tool(tool: Any) -> str:
    """What a description of a function calls it."""
    described = tool.get("function", tool) if isinstance(tool, dict) else None
    return str(described.get("name") or "") if isinstance(described, dict) else ""


def _refused(messages: Messages, error: Exception | None) -> str:
    system = any(turn["role"] == "system" for turn in messages)
    remedy = (
        "put the text of the system turn at the head of the first user turn" if system else "fix its turns"
    )
    return (
        f"the chat template refuses the prompt ({' '.join(str(error).split())}): {remedy}, or give the"
        " tokenizer another chat_template."
    )


def _left_out(text: str, kept: Sequence[str]) -> str:
    start = repr(text if len(text) <= 60 else text[:57] + "...")
    if text in kept:
        return (
            f"the chat template leaves the reference, or a part of it, out of the teacher's prompt ({start}):"
            " set teacher_prompt_layout=append, or remove the reasoning from the reference."
        )
    return (
        f"the chat template leaves a turn of the prompt out ({start}): put its text into the last user turn,"
        " or give the tokenizer another chat_template."
    )


def _lost(text: str, parts: Sequence[str]) -> str | None:
    """The first of the parts that is not in the text; templates may trim and break lines."""
    missing = [part for part in parts if part.strip() not in text]
    if not missing:
        return None
    squeezed = "".join(text.split())
    return next((part for part in missing if "".join(part.split()) not in squeezed), None)


def encode(
    tokenizer: Any, messages: Messages, options: Mapping[str, Any] | None = None, kept: Sequence[str] = ()
) -> list[int]:
    """Token ids of a chat up to where the answer begins; see `render`."""
    if tokenizer.chat_template is not None:
        text = render(tokenizer, messages, options, kept=kept)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    try:  # its marks have no text of their own
        return list(_apply(tokenizer, messages, options, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # of the kinds of its own library
        raise UserError(
            f"the tokenizer refuses the prompt ({' '.join(str(error).split())}): fix its turns."
        ) from None


def generation_prefix(tokenizer: Any) -> str:
    """What the template writes before an answer; empty where it cannot be told."""
    if tokenizer.chat_template is None:
        return ""
    try:
        closed, opened = (render(tokenizer, _QUESTION, answering=answering) for answering in (False, True))
    except UserError:  # it asks for a system turn, say
        return ""
    return opened[len(closed) :] if opened.startswith(closed) else opened[-16:]


def following_ids(tokenizer: Any, before: str, text: str) -> list[int]:
    """Token ids of `text` as they follow those of `before`.

    A text of its own would begin with a space for SentencePiece's tokenizers, which a model that
    goes on with a line does not write. Where a token would reach over the border, `text` stands at
    the beginning of a line.
    """
    for start in (before, "\n"):
        head, whole = (
            tokenizer(part, add_special_tokens=False)["input_ids"] for part in (start, start + text)
        )
        if start and list(whole[: len(head)]) == list(head):
            return list(whole[len(head) :])
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def special_tokens(tokenizer: Any) -> set[str]:
    """The texts of all tokens that are no part of ordinary text."""
    added = getattr(tokenizer, "added_tokens_decoder", None)  # of some a function
    marked = [str(token) for token in added.values() if token.special] if isinstance(added, dict) else []
    return {*tokenizer.all_special_tokens, *marked}


def closing_token(tokenizer: Any) -> int | None:
    """The token with which the template closes an answer; None where it uses none."""
    if tokenizer.chat_template is None:
        return None
    try:
        text = render(tokenizer, _TURNS, answering=False, kept=("answer",))
    except UserError:
        return None
    ids = tokenizer(text.rpartition("answer")[2], add_special_tokens=False)["input_ids"]
    marks = {*tokenizer.get_added_vocab().values(), tokenizer.eos_token_id}
    return next((int(i) for i in ids if i in marks), None)


def check_rows(tokenizer: Any, rows: Sequence[dict[str, Any]], name: str) -> None:
    """Raise `UserError` for the first row whose prompt cannot be rendered, by its number."""
    if tokenizer.chat_template is None:
        return
    for number, row in enumerate(rows):
        with naming(place_of(row, number, name)):
            render(tokenizer, as_messages(row["prompt"]))


def as_messages(prompt: str | Messages) -> Messages:
    """A prompt as chat messages; text is a user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Say of what a mistake is: `row 3 of the training data`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
