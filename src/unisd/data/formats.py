"""Other layouts of rows, brought into ours: names, joined columns, conversations, tools.

| layout | how it is read |
|---|---|
| other names | `--columns prompt=question,privileged_context=answer` |
| several columns | `--columns prompt=instruction+input` joins their texts by a blank line |
| `messages` (role, content) | `--columns prompt=messages`; an assistant's last turn: completion |
| `conversations` (from, value) | `--columns prompt=conversations`; likewise |
| a column `system` | a system turn before the prompt |
| a column `tools` | descriptions of functions, or JSON of such: the chat template shows them |

Names are never guessed: a file without our columns is refused with the mapping that would fit.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import yaml

from unisd.data.reading import describe
from unisd.errors import UserError

logger = logging.getLogger(__name__)

Row = dict[str, Any]
COLUMNS = (
    "prompt",
    "privileged_context",
    "teacher_prompt",
    "completion",
    "auxiliary_contexts",
    "negative_context",
    "id",
    "system",
    "tools",
)
# Names that other projects use; never mapped silently, only suggested.
FOREIGN = {
    "prompt": (
        "question",
        "problem",
        "instruction",
        "query",
        "input",
        "messages",
        "conversations",
        "conversation",
    ),
    "privileged_context": (
        "golden_response",
        "golden_answer",
        "solution",
        "answer",
        "response",
        "output",
        "reference",
    ),
}
TURNS = ("messages", "conversations", "conversation")
UNSHOWN = ("input", "context", "contexts", "passage", "document", "documents", "history", "functions")
"""Columns that other projects show to a model; here they are named where no prompt holds them."""
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_PART = re.compile(r'(?:[^,"]|"[^"]*")+')


def parse_column_mapping(text: str | None) -> dict[str, str]:
    """Parse `"prompt=question,privileged_context=answer"` into a dict, ours to theirs.

    Names with commas are quoted (`prompt="question, in words"`); YAML does too (`{prompt: q}`).
    """
    if not text:
        return {}
    if text.lstrip().startswith("{"):
        try:
            pairs = [(str(ours), str(theirs)) for ours, theirs in yaml.safe_load(text).items()]
        except (yaml.YAMLError, AttributeError):
            raise UserError(f"columns: {text!r} is no YAML mapping such as {{prompt: question}}.") from None
    else:
        parts = _PART.findall(text)
        pairs = [(ours, theirs) for ours, _, theirs in (part.partition("=") for part in parts)]
    mapping = {}
    for ours, theirs in pairs:
        ours, theirs = ours.strip(), theirs.strip()
        if len(theirs) > 1 and theirs[0] == theirs[-1] == '"':
            theirs = theirs[1:-1]
        if not theirs or ours not in COLUMNS:
            raise UserError(
                f"columns: {f'{ours}={theirs}' if theirs else ours!r} is not of the form ours=theirs with"
                f" ours one of {', '.join(COLUMNS)}; a name that holds a comma is put into double quotes."
            )
        if ours in mapping:
            raise UserError(f"columns: {ours} is given twice: to join columns write {ours}=a+b.")
        mapping[ours] = theirs
    return mapping


def joined(theirs: str, columns: Collection[str]) -> list[str]:
    """The columns that a mapping's right side names."""
    return [theirs] if theirs in columns else [part.strip() for part in theirs.split("+")]


def check_mapping(mapping: Mapping[str, str], columns: Collection[str], name: str) -> None:
    """Raise `UserError` for the first column that is mapped and not there."""
    for ours, theirs in mapping.items():
        for column in joined(theirs, columns):
            if column not in columns:
                close = difflib.get_close_matches(column, list(columns), n=1)
                hint = (
                    f" Did you mean {close[0]!r}?"
                    if close
                    else f" Its columns: {', '.join(map(str, columns))}."
                )
                raise UserError(f"{name} has no column {column!r} (mapped to {ours!r}).{hint}")


def missing_column(column: str, columns: Collection[str], name: str, needs_reference: bool) -> UserError:
    """What to say of a column that is not there: which mapping would fit."""
    named = {ours: suggested(ours, columns) for ours in FOREIGN if ours not in columns}
    if not named[column]:
        hint = f"its columns are {', '.join(map(str, columns))}; name one with --columns {column}=NAME"
        return UserError(f"{name} has no column {column!r}: {hint}.")
    alone = not needs_reference or column != "prompt" or named["prompt"][0] in TURNS
    wanted = [column] if alone or "completion" in columns else list(named)
    given = ",".join(f"{ours}={named[ours][0]}" for ours in wanted if named[ours])
    which = " or ".join(map(repr, named[column]))
    return UserError(f"{name} has no column {column!r}: if it is {which}, pass --columns {given}.")


def suggested(ours: str, columns: Collection[str]) -> list[str]:
    """Which of the columns may hold ours, likeliest first; an instruction goes with its input."""
    found = [theirs for theirs in FOREIGN[ours] if theirs in columns]
    if "instruction" in found and "input" in found:
        both = "instruction+input"
        return [both if name == "instruction" else name for name in found if name != "input"]
    return found


def rename(row: Row, mapping: Mapping[str, str], columns: Collection[str], where: str) -> None:
    """Give columns our names; one of theirs may serve for two of ours, and several for one."""
    named, used = {}, set()
    for ours, theirs in mapping.items():
        parts = joined(theirs, columns)
        used.update(parts)
        if len(parts) > 1:
            named[ours] = _joined_text([(part, row.get(part)) for part in parts], where)
        elif parts[0] in row:
            named[ours] = row[parts[0]]
    for theirs in used - set(mapping):
        row.pop(theirs, None)
    row |= named


def _joined_text(parts: Iterable[tuple[str, Any]], where: str) -> str | None:
    texts = []
    for column, value in parts:
        if value is None or value == "":
            continue
        if type(value) not in (str, int, float):
            raise UserError(
                f"{where}: {column} is {describe(value)}, and only texts are joined: map {column} alone, or"
                " make it a text."
            )
        texts.append(str(value).strip())
    return "\n\n".join(filter(None, texts)) or None


def as_turns(prompt: Any, where: str) -> Any:
    """A conversation of turns with `from` and `value` as messages; anything else as it is."""
    if not (isinstance(prompt, list) and prompt and all(_is_turn(turn) for turn in prompt)):
        return prompt
    for turn in prompt:
        if str(turn["from"]).lower() not in SPEAKERS:
            raise UserError(
                f"{where}: a turn comes from {turn['from']!r}, and only {', '.join(SPEAKERS)} are known: mend"
                " or remove the row."
            )
    return [{"role": SPEAKERS[str(turn["from"]).lower()], "content": turn["value"]} for turn in prompt]


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and {"from", "value"} <= set(turn) and "role" not in turn


def with_system_and_tools(row: Row, where: str) -> None:
    """Move the columns `system` and `tools` into the prompts, for the chat template."""
    system, tools = row.pop("system", None), _tools(row.pop("tools", None), where)
    if system is not None and not isinstance(system, str):
        raise UserError(
            f"{where}: system is {describe(system)}, the text of a system turn is needed: mend it, or rename"
            " the column."
        )
    system = (system or "").strip()
    for column in ("prompt", "teacher_prompt"):
        turns = row.get(column)
        if not turns or not (system or tools) or not isinstance(turns, (str, list)):
            continue
        turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else list(turns)
        own = [turn for turn in turns if isinstance(turn, dict) and turn.get("role") == "system"]
        if system and own and own[0].get("content") != system:
            raise UserError(
                f"{where}: there is a column system, and {column} has a system turn of its own: keep one."
            )
        if system and not own:
            turns = [{"role": "system", "content": system}, *turns]
        if tools and isinstance(turns[0], dict):
            turns = [{**turns[0], "tools": tools}, *turns[1:]]
        row[column] = turns


def _tools(tools: Any, where: str) -> list[Any] | None:
    """Descriptions of functions, which may be stored as JSON."""
    given = tools
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            tools = None
    if not given or (isinstance(given, str) and not given.strip()):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(
            f"{where}: tools is {describe(given)}, a list of descriptions of functions is needed: mend it, or"
            " rename the column."
        )
    return tools or None


def _holds_something(value: Any) -> bool:
    """Whether a cell holds something, be it a text, a list or an array."""
    return value is not None and (len(value) > 0 if hasattr(value, "__len__") else bool(value))


def say_what_is_odd(rows: Sequence[Row], name: str, prompt: str = "prompt") -> None:
    """Name columns that no prompt shows and often should, and count duplicates.

    Args:
        prompt: the column that the prompt is made of.
    """
    for column in UNSHOWN:
        count = sum(_holds_something(row.get(column)) for row in rows)
        if count:
            logger.warning(
                "%s: no prompt shows the column %s (%d of %d rows have it): join it (prompt=%s+%s), or remove"
                " it.",
                name,
                column,
                count,
                len(rows),
                prompt,
                column,
            )
    counts = Counter(repr([(key, row[key]) for key in sorted(row, key=str) if key != "id"]) for row in rows)
    twice = sum(counts.values()) - len(counts)
    if twice:
        logger.warning(
            "%s: %d of %d rows are exact duplicates of others, and count as often: remove them if that is not"
            " meant.",
            name,
            twice,
            len(rows),
        )
