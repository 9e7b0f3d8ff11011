"""The column contract of training rows, its checks, and reading the user's own files.

| column | meaning |
|---|---|
| `prompt` | the problem: a string, or chat messages (required) |
| `privileged_context` | the reference solution, for the teacher only; default: `completion` |
| `teacher_prompt` | a whole teacher prompt, instead of the template |
| `completion` | the reference as an answer: a string, an assistant message, or several turns |
| `auxiliary_contexts` | solved examples of *other* problems, or instructions (for agreement) |
| `negative_context` | a plausible wrong reference (for contrast) |
| `id` | the row's name in reports |

An assistant turn that ends the messages of `prompt` is split off as the completion. A completion
defaults to `privileged_context`, which is required unless `teacher_prompt` is there. Other columns
are kept: a grader may need them.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unisd.data import conversations, formats
from unisd.data.conversations import answer_of, before_answer
from unisd.data.formats import parse_column_mapping
from unisd.data.origin import Placed, place_of
from unisd.data.reading import describe, load_file, refuse_broken_text
from unisd.data.text import problem_key
from unisd.data.trajectories import TURNS, is_trajectory
from unisd.errors import UserError, nearest

Row = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# What only models for images, films and sound read.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def load_rows(
    source: Any,
    columns: str | Mapping[str, str] | None = None,
    *,
    needs_reference: bool = True,
    name: str | None = None,
) -> list[Row]:
    """Read and check your own rows, as `unisd train --train_file FILE --columns COLUMNS` does.

    Args:
        source: a file (.jsonl, .json, both also .gz; .csv, .parquet), or the rows themselves: a
            `datasets.Dataset`, a table (pandas, polars, pyarrow), a dict of columns or any
            iterable of dicts.
        columns: our column names to yours, as a dict or as `"prompt=question,completion=answer"`;
            common layouts need none (`unisd.data.formats.LAYOUTS`).
        needs_reference: refuse rows without a reference (`privileged_context`, `completion` or
            `teacher_prompt`).
        name: what to call the rows in errors; default: the file.

    Returns:
        One plain dict per row, with `prompt`, `privileged_context`, `completion`, `id`, and all
        other columns as they are.

    Raises:
        UserError: an unreadable or empty file, a missing column (with candidates), or the first
            row that breaks the contract, by its number.
    """
    if name is None:
        name = str(source) if isinstance(source, (str, Path)) else "the dataset"
    rows = _plain(load_file(source) if isinstance(source, (str, Path)) else source, name, None)
    mapping = parse_column_mapping(columns) if isinstance(columns, str) else dict(columns or {})
    if rows:
        mapping = formats.settled(rows, mapping, name, needs_reference)
    prepared = prepare_rows(rows, mapping, name, needs_reference)
    formats.say_what_is_odd(prepared, name, mapping.get("prompt", "prompt"))
    return prepared


def prepare_rows(
    dataset: Any,
    mapping: dict[str, str] | None = None,
    name: str = "the dataset",
    needs_reference: bool = True,
    of_stream: int | None = None,
) -> list[Row]:
    """Check every row against the contract and return plain dicts.

    Args:
        dataset: rows, as :func:`load_rows` takes them.
        mapping: our column names to the dataset's.
        name: what to call it in errors.
        needs_reference: refuse rows without a reference.
        of_stream: rows to take of a dataset that may never end; None: it is refused.

    Raises:
        UserError: a dataset with splits, a stream, no rows, missing column (with candidates), or
            the first bad row by its number (from 0).
    """
    rows = _plain(dataset, name, of_stream)
    if not rows:
        raise UserError(f"{name} is empty: give at least one row.")
    found = formats.settled(rows, mapping or {}, name, needs_reference)
    rows = in_our_form(rows, found, name)
    for number, row in enumerate(rows):
        _check_row(row, place_of(row, number, name), needs_reference, found.get("privileged_context"))
        if row.get("id") is None:
            row["id"] = str(number)
    return rows


def in_our_form(rows: Sequence[Row], mapping: Mapping[str, str], name: str) -> list[Row]:
    """Rows of any layout (see :mod:`unisd.data.formats`) in ours, not yet checked."""
    columns = dict.fromkeys(column for row in rows for column in row)
    found = []
    for number, given in enumerate(rows):
        where = place_of(given, number, name)
        row: Row = Placed({name: None if _is_nan(value) else value for name, value in given.items()}, where)
        refuse_broken_text(row, where)
        formats.rename(row, mapping, columns, where)
        row |= {
            column: conversations.as_messages(row[column], where)
            for column in ("prompt", "teacher_prompt", "completion")
            if column in row
        }
        _as_text(row, where)
        formats.with_system_and_tools(row, where)
        found.append(row)
    return found


def _is_nan(value: Any) -> bool:
    """Whether a cell of a table is missing: tables of numbers have no other sign for it."""
    return isinstance(value, float) and math.isnan(value)


def _plain(dataset: Any, name: str, of_stream: int | None) -> list[Row]:
    """The rows of whatever holds them, as dicts of their own."""
    if isinstance(dataset, Mapping) and dataset:
        if not holds_columns(dataset):
            raise UserError(f"{name} has splits: give one of them ({', '.join(map(str, dataset))}).")
        lengths = {column: len(values) for column, values in dataset.items()}
        if len({*lengths.values()}) > 1:
            raise UserError(f"{name} has columns of different lengths: {lengths}: give one value per row.")
        return [dict(zip(dataset, values, strict=True)) for values in zip(*dataset.values(), strict=True)]
    if hasattr(dataset, "iterrows"):  # pandas: what is missing is NaN there, and lists are arrays
        records = dataset.astype(object).where(dataset.notna(), None).to_dict("records")
        return [{str(key): _of_numpy(value) for key, value in row.items()} for row in records]
    for convert in ("to_dicts", "to_pylist"):  # polars, pyarrow
        dataset = getattr(dataset, convert, lambda found=dataset: found)()
    if any(kind.__name__ == "IterableDataset" for kind in type(dataset).__mro__):
        if of_stream is None:
            raise UserError(
                f"{name} is a stream, which may never end: give a list of some of its rows, or (of training"
                " rows) max_steps."
            )
        dataset = itertools.islice(dataset, of_stream)
    elif isinstance(dataset, Iterator) and of_stream is not None:  # it may never end
        dataset = itertools.islice(dataset, of_stream)
    rows = list(dataset)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(f"row {number} of {name} is {describe(row)}, a dict of columns is needed.")
    return [row if isinstance(row, Placed) else dict(row) for row in rows]


def holds_columns(dataset: Mapping[str, Any]) -> bool:
    """Whether a mapping is a table by columns; else its values are datasets."""
    lists = [value for value in dataset.values() if isinstance(value, (list, tuple))]
    of_rows = bool(lists) and all(len(value) and isinstance(value[0], Mapping) for value in lists)
    return len(lists) == len(dataset) > 0 and not of_rows


def _of_numpy(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _as_text(row: Row, where: str) -> None:
    """Reduce forms that mean the same to one.

    A number becomes its text, one assistant message its content, and a conversation its prompt and
    the answer that ends it.
    """
    for column in ("privileged_context", "completion", "negative_context"):
        if type(row.get(column)) in (int, float):
            if math.isinf(row[column]):
                raise UserError(f"{where}: {column} is infinite: fix or remove the row.")
            row[column] = str(row[column])
    prompt: Any = row.get("prompt")
    if row.get("completion") is None and answer_of(prompt) is not None and len(prompt) > 1:
        place = before_answer(prompt)
        row["prompt"], row["completion"] = prompt[:place], prompt[place:]
    completion = row.get("completion")
    content = answer_of(completion)
    if is_trajectory(completion) and content:
        row[TURNS], row["completion"] = completion, content
    elif isinstance(completion, list) and len(completion) == 1 and content is not None:
        row["completion"] = content
    completion = row.get("completion")
    if completion is not None and (not isinstance(completion, str) or not completion.strip()):
        raise UserError(
            f"{where}: completion is {describe(completion)}; a non-empty text, one assistant message or turns"
            " that begin and end with an assistant's are needed: fix or remove the row."
        )


def _check_row(row: Row, where: str, needs_reference: bool, called: str | None = None) -> None:
    """Raise `UserError` for what breaks the contract.

    called: the user's column that the reference is read from, where it has another name.
    """
    _refuse_images(row, where)
    check_prompt(row.get("prompt"), where)
    if row.get("privileged_context") is None and isinstance(row.get("completion"), str):
        row["privileged_context"] = row["completion"]
    teacher_prompt = row.get("teacher_prompt")
    if teacher_prompt:
        check_prompt(teacher_prompt, where, "teacher_prompt")
    elif needs_reference:
        reference = row.get("privileged_context")
        if not isinstance(reference, str) or not reference.strip():
            column = called or "privileged_context"
            raise UserError(
                f"{where}: {column} is {describe(reference)}, a non-empty string is needed{_or_answer(row)}:"
                " fix or remove the row."
            )
    if row.get("completion") is None:
        row["completion"] = row.get("privileged_context")
    contexts = row.get("auxiliary_contexts")
    if contexts is not None and not (
        isinstance(contexts, (list, tuple)) and all(isinstance(c, str) for c in contexts)
    ):
        raise UserError(f"{where}: auxiliary_contexts is {describe(contexts)}, a list of strings is needed.")
    negative = row.get("negative_context")
    if negative is not None and not isinstance(negative, str):
        raise UserError(f"{where}: negative_context is {describe(negative)}, a string is needed.")


def _or_answer(row: Row) -> str:
    """What would do as well in a row of messages."""
    return (
        ", or a conversation that ends in the assistant's answer" if isinstance(row["prompt"], list) else ""
    )


def _refuse_images(row: Row, where: str) -> None:
    """Raise `UserError` for a row that is not text alone: what it shows would be ignored."""
    prompt = row.get("prompt")
    turns = [turn for turn in prompt if isinstance(turn, dict)] if isinstance(prompt, list) else []
    parts = [part for turn in turns if isinstance(turn.get("content"), list) for part in turn["content"]]
    kinds = {str(part.get("type")) for part in parts if isinstance(part, dict)} - {"text"}
    found = sorted(kinds) or [column for column in MEDIA if row.get(column) is not None]
    found = [name for name in found if not (isinstance(row.get(name), (str, list)) and not row[name])]
    if found:
        raise UserError(
            f"{where} holds {found[0]!r}: all models are trained and evaluated on text only, also those"
            " for images: remove the row, or the column if the text does not need it."
        )


def check_prompt(prompt: Any, where: str, column: str = "prompt") -> None:
    """Raise `UserError` unless this is text, or messages that end in a user turn."""
    if isinstance(prompt, str) and prompt.strip():
        return
    if isinstance(prompt, list) and prompt:
        for turn in prompt:
            if (
                not isinstance(turn, dict)
                or not isinstance(turn.get("role"), str)
                or not isinstance(turn.get("content"), str)
            ):
                raise UserError(
                    f"{where}: {column} holds {describe(turn)}, messages with role and content are needed."
                )
        roles = [turn["role"] for turn in prompt]
        for role in roles:
            if role not in ROLES and (close := nearest(role, ROLES)):
                raise UserError(f"{where}: {column} has the role {role!r}: did you mean {close!r}?")
        if roles[-1] != "user":
            raise UserError(
                f"{where}: {column} ends in a {roles[-1]!r} turn, a user turn must come last: fix or remove"
                " the row."
            )
        return
    raise UserError(
        f"{where}: {column} is {describe(prompt)}, a non-empty string or a list of messages is needed:"
        " fix or remove the row."
    )


def hold_out(
    rows: Sequence[Row], share: float = 0.1, seed: int = 0, count: int | None = None
) -> tuple[list[Row], list[Row]]:
    """Split into (train, held out) by a seeded shuffle; rows of one problem stay together.

    Each gets at least one problem where there are two or more; a single one is not held out.

    Args:
        count: how many rows to hold out at least, in place of `share`.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    wanted = min(max(1, round(share * len(rows)) if count is None else count), len(rows) - 1)
    problems = [problem_key(row["prompt"]) for row in rows]
    sizes, held, taken = Counter(problems), set[Any](), 0
    for i in order:
        if taken >= wanted or len(held) == len(sizes) - 1:
            break
        if problems[i] not in held:
            held.add(problems[i])
            taken += sizes[problems[i]]
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row, problem in zip(rows, problems, strict=True):
        parts[problem in held].append(row)
    return parts
