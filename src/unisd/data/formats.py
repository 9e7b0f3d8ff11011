"""Other layouts of rows, brought into ours: names, joined columns, conversations, tools.

| layout | how it is read |
|---|---|
| one of `LAYOUTS` | by its columns, where ours are not there; said in one line |
| other names | `--columns prompt=question,privileged_context=answer` |
| several columns | `--columns prompt=instruction+input` joins their texts by a blank line |
| a conversation as prompt | its last answer is the completion (:mod:`unisd.data.conversations`) |
| a column `system` | a system turn before the prompt |
| a column `tools` | descriptions of functions, or JSON of such: the chat template shows them |
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from unisd.data import conversations
from unisd.data.reading import describe
from unisd.errors import UserError, flag, nearest
from unisd.files import parsed

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
REFERENCES = ("privileged_context", "completion", "teacher_prompt")
"""Columns of which one has to be there: what the teacher is told."""


class Layout(NamedTuple):
    """A layout that others use: which columns hold prompt and reference."""

    name: str
    prompt: str
    reference: str | None = None
    """None: the answer that ends the conversation of `prompt`."""

    @property
    def columns(self) -> list[str]:
        return [*self.prompt.split("+"), *([self.reference] if self.reference else ())]

    @property
    def mapping(self) -> dict[str, str]:
        return {"prompt": self.prompt} | ({"privileged_context": self.reference} if self.reference else {})

    def said(self) -> str:
        """The layout in one line."""
        reference = self.reference or "the answer that ends it"
        return f"{self.name} (prompt = {self.prompt.replace('+', ' + ')}, reference = {reference})"


LAYOUTS = (
    Layout("messages", "messages"),
    Layout("ShareGPT", "conversations"),
    Layout("ShareGPT", "conversation"),
    Layout("alpaca", "instruction+input", "output"),
    Layout("alpaca", "instruction", "output"),
    Layout("dolly", "instruction+context", "response"),
    Layout("instruction/response", "instruction", "response"),
    Layout("prompt/response", "prompt", "response"),
    Layout("prompt/answer", "prompt", "answer"),
    Layout("question/answer", "question", "answer"),
    Layout("question/response", "question", "response"),
    Layout("query/response", "query", "response"),
    Layout("problem/solution", "problem", "solution"),
)
"""All that are read without `--columns`; the first whose columns are all there."""
ALSO = {"prompt": ("input",), "privileged_context": ("golden_response", "golden_answer", "reference")}
"""Further names that are never taken, but named where ours are not there."""
UNSHOWN = ("input", "context", "contexts", "passage", "document", "documents", "history", "functions")
"""Columns that other projects show to a model; here they are named where no prompt holds them."""
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
            raise UserError(
                f"columns: {text!r} is not a YAML mapping such as {{prompt: question}}."
            ) from None
    else:
        parts = _PART.findall(text)
        pairs = [(ours, theirs) for ours, _, theirs in (part.partition("=") for part in parts)]
    mapping = {}
    for ours, theirs in pairs:
        ours, theirs = ours.strip(), theirs.strip()
        if len(theirs) > 1 and theirs[0] == theirs[-1] == '"':
            theirs = theirs[1:-1]
        if not theirs or ours not in COLUMNS:
            close = nearest(ours, COLUMNS, cutoff=0.6)
            hint = f" (did you mean {close}?)" if close and ours not in COLUMNS else ""
            raise UserError(
                f"columns: {f'{ours}={theirs}' if theirs else ours!r} is not of the form ours=theirs with"
                f" ours one of {', '.join(COLUMNS)}{hint}; a name that holds a comma is put into double"
                " quotes."
            )
        if ours in mapping:
            raise UserError(f"columns: {ours} is given twice: to join columns write {ours}=a+b.")
        mapping[ours] = theirs
    return mapping


def joined(theirs: str, columns: Collection[str]) -> list[str]:
    """The columns that a mapping's right side names."""
    return [theirs] if theirs in columns else [part.strip() for part in theirs.split("+")]


def settled(
    rows: Sequence[Row],
    mapping: Mapping[str, str],
    name: str,
    needs_reference: bool = True,
    say: bool = True,
) -> dict[str, str]:
    """The mapping with what a layout says of columns that are not there.

    Args:
        needs_reference: refuse rows without one. Where it is not needed, a layout gives one all the
            same if it has the prompt that is read: a file is to be the same rows for every command.
        say: tell which layout it is.

    Raises:
        UserError: columns that are mapped and not there, or needed and neither there nor known to a
            layout: all of them.
    """
    columns = dict.fromkeys(column for row in rows for column in row)
    unknown = [
        (column, ours)
        for ours, theirs in mapping.items()
        for column in joined(theirs, columns)
        if column not in columns
    ]
    missing = _missing(rows, columns, mapping)
    layout = layout_of(columns, mapping, missing) if missing else None
    if not needs_reference and "prompt" not in missing and layout is not None:
        own = mapping.get("prompt", "prompt")  # which a reference must not replace, nor what graders read
        layout = layout if layout.prompt == own and layout.reference != "answer" else None
    needed = [ours for ours in missing if needs_reference or ours == "prompt"]
    if unknown or (needed and layout is None):
        raise _problems(columns, mapping, unknown, [] if layout else needed, name)
    if layout is None:
        return dict(mapping)
    if say:
        logger.warning("%s: read as: %s; %s says otherwise.", name, layout.said(), flag("columns"))
    return {**layout.mapping, **mapping}


def layout_of(
    columns: Collection[str], mapping: Mapping[str, str], missing: Collection[str]
) -> Layout | None:
    """The first layout whose columns are there and hold what is missing."""
    for layout in LAYOUTS:
        held = {"prompt", "privileged_context"}
        if layout.reference is None and "prompt" in mapping:
            held = set()  # another column is the prompt, so that no conversation is read
        if held.issuperset(missing) and all(column in columns for column in layout.columns):
            return layout
    return None


def _missing(rows: Sequence[Row], columns: Collection[str], mapping: Mapping[str, str]) -> list[str]:
    """Which of prompt and reference no column holds."""
    there = {*columns, *mapping}
    found = [] if "prompt" in there else ["prompt"]
    prompt = mapping.get("prompt", "prompt")
    has_reference = (
        not there.isdisjoint(REFERENCES)
        or prompt in conversations.COLUMNS
        or any(conversations.ends_in_answer(row.get(prompt)) for row in rows)
    )
    return found if has_reference else [*found, "privileged_context"]


def _problems(
    columns: Collection[str],
    mapping: Mapping[str, str],
    unknown: Sequence[tuple[str, str]],
    missing: Sequence[str],
    name: str,
) -> UserError:
    """All that is wrong with the columns of some rows, and the mapping that would fit."""
    said = [f"{column!r} (mapped to {ours!r})" for column, ours in unknown]
    said += [f"{column!r}" for column in missing]
    fits = {
        ours: "+".join(
            part if part in columns else _similar_column(part, columns, 0.6) or "NAME"
            for part in joined(theirs, columns)
        )
        for ours, theirs in mapping.items()
    }
    taken = {column for theirs in fits.values() for column in joined(theirs, columns)}
    for ours in missing:
        free = [theirs for theirs in suggested(ours, columns) if taken.isdisjoint(joined(theirs, columns))]
        fits[ours] = (free or ["NAME"])[0]
        taken.update(joined(fits[ours], columns))
    given = ",".join(f"{ours}={theirs}" for ours, theirs in fits.items())
    there = ", ".join(map(str, columns)) or "none"
    few = "no column" if len(said) == 1 else "no columns"
    which = " (NAME: the column that holds it)" if "NAME" in given else ""
    return UserError(
        f"{name} has {few} {' and '.join(said)}: its columns are {there}; pass"
        f" {flag('columns', given)}{which}."
    )


def suggested(ours: str, columns: Collection[str]) -> list[str]:
    """Which of the columns may hold ours, likeliest first: names of layouts, similar ones."""
    of_layouts = [layout.mapping[ours] for layout in LAYOUTS if ours in layout.mapping]
    names = list(dict.fromkeys([*of_layouts, *ALSO[ours]]))
    found = [theirs for theirs in names if all(part in columns for part in theirs.split("+"))]
    joint = {part for theirs in found if "+" in theirs for part in theirs.split("+")}
    found = [theirs for theirs in found if theirs not in joint]
    similar = [_similar_column(theirs, columns) for theirs in (ours, *names)]
    return list(dict.fromkeys([*found, *filter(None, similar)]))


def _similar_column(name: str, columns: Collection[str], cutoff: float = 0.8) -> str | None:
    """The column that is spelt nearly so, but for case."""
    folded = {str(column).casefold(): str(column) for column in columns}
    close = nearest(name.casefold(), folded, cutoff)
    return None if close is None else folded[close]


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
            if parts[0] in conversations.COLUMNS:
                named[ours] = conversations.of_text(named[ours], f"{where}: {parts[0]}")
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
                f"{where}: {column} is {describe(value)}, and only texts can be joined: map only {column}, or"
                " make it a text."
            )
        texts.append(str(value).strip())
    return "\n\n".join(filter(None, texts)) or None


def with_system_and_tools(row: Row, where: str) -> None:
    """Move the columns `system` and `tools` into the prompts, for the chat template."""
    system, tools = row.pop("system", None), _tools(row.pop("tools", None), where)
    if system is not None and not isinstance(system, str):
        raise UserError(
            f"{where}: system is {describe(system)}, the text of a system turn is needed: fix it, or rename"
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
                f"{where}: there is a column system, and {column} also has a system turn: keep one."
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
        tools = parsed(tools)
    if not given or (isinstance(given, str) and not given.strip()):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(
            f"{where}: tools is {describe(given)}, a list of descriptions of functions is needed: fix it, or"
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
