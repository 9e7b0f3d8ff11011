"""Read the rows of a file: JSON, JSON Lines, CSV and TSV (all also .gz), and Parquet.

Text is UTF-8; UTF-16 with a byte order mark and Windows-1252 are read too, and that is said.

Cells of a CSV file are text, as they stand there (007 stays 007, NA stays NA); an empty one is
missing. What is no text, no JSON or no table is refused by its line.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import logging
import math
import re
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from unisd.data.origin import Placed
from unisd.errors import UserError, first_line

logger = logging.getLogger(__name__)

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_QUOTED = re.compile(r'"[^"]*"')
_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|(NaN|-?Infinity)')
SAID = {"utf-16": "UTF-16", "cp1252": "Windows-1252"}
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}


def load_file(path: str | Path, say: bool = True) -> list[dict[str, Any]]:
    """Rows of a .jsonl, .json, .csv, .tsv (all also .gz) or .parquet file.

    Args:
        say: tell of text that is not UTF-8.

    Raises:
        UserError: unreadable file or broken line, by its number (from 1).
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it ({', '.join(KINDS)}).")
    if not path.is_file():
        raise UserError(f"{path} is not a file: check the path.")
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    kind = suffixes[-1].lower() if suffixes else ""
    if kind not in KINDS:
        raise UserError(f"{path}: unknown kind {kind or 'of file'}: use {', '.join(KINDS)}.")
    if kind == ".parquet":
        return _parquet(path)
    read = {".json": _json, ".jsonl": _jsonl}.get(kind, _csv)
    return read(_text(path, say), path)


def _text(path: Path, say: bool) -> str:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        encoding = _encoding(content)
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: {error}: save it as UTF-8.") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        hint = ": copy it again, or name it without .gz if it is text" if path.suffix == ".gz" else ""
        raise UserError(f"{path} cannot be read: {reason}{hint}.") from None
    if say and encoding in SAID:
        logger.warning(
            "%s is not UTF-8: read as %s; if letters come out wrong, save it as UTF-8.", path, SAID[encoding]
        )
    return text


def _encoding(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        # Bytes of Windows-1252 seldom make a character of UTF-8: where many do, some are broken.
        beyond = Counter(char == "\ufffd" for char in content.decode("utf-8", "replace") if char > "\x7f")
        if beyond[True] > beyond[False]:
            return "cp1252"
    return "utf-8-sig"  # a byte order mark is what some programs begin UTF-8 with


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.ParquetFile(path).read().to_pylist()
        return rows
    except Exception as error:  # of a dozen kinds
        raise UserError(f"{path} cannot be read: {first_line(error).rstrip('.')}.") from None


# ---------------------------------------------------------------- JSON


def _json(text: str, path: Path) -> list[dict[str, Any]]:
    if not text.strip():
        return []
    value = _value(text, str(path), " (is it JSON Lines? then name it .jsonl)")
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise UserError(f"{path} must hold a list of objects.")
    for number, row in enumerate(value):
        refuse_broken_text(row, f"row {number} of {path}")
    return value


def _jsonl(text: str, path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _value(line, where, of_line=True)
        if not isinstance(row, dict):
            raise UserError(f"{where} is {describe(row)}, an object is needed.")
        refuse_broken_text(row, where)
        rows.append(Placed(row, where))
    return rows


def _value(text: str, where: str, hint: str = "", of_line: bool = False) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_number, parse_float=_finite)
    except RecursionError:
        raise UserError(f"{where} is nested too deeply: fix or remove it.") from None
    except ValueError as error:
        more = hint if "Extra data" in str(error) else ""  # the next line, behind the first value
        if isinstance(error, _NoNumberError) and "\n" in text:
            found = next((match for match in _CONSTANT.finditer(text) if match[1]), None)
            more = "" if found is None else f" (line {text.count(chr(10), 0, found.start()) + 1})"
        if isinstance(error, json.JSONDecodeError) and of_line:
            raise UserError(
                f"{where} is not JSON: {error.msg} (column {error.colno}): fix or remove the line; each holds"
                " one whole object."
            ) from None
        raise UserError(f"{where} is not JSON: {error}{more}.") from None


class _NoNumberError(ValueError):
    """A number that JSON does not have."""


def _refuse_number(text: str) -> NoReturn:
    raise _NoNumberError(f"{text} is not a JSON number; write null for a missing value")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


def refuse_broken_text(row: Any, where: str) -> None:
    """Raise `UserError` for half a character (a lone surrogate), which nobody can write."""
    name = next((name for name, value in row.items() if _is_broken(value)), None)
    if name is not None:
        raise UserError(
            f"{where}: {name!r} holds half a character (a lone surrogate such as \\ud83d): fix or remove the"
            " row."
        )


def _is_broken(value: Any) -> bool:
    if isinstance(value, str):
        if value.isascii():
            return False
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return True
        return False
    if isinstance(value, dict):
        return any(_is_broken(part) for item in value.items() for part in item)
    return isinstance(value, (list, tuple)) and any(map(_is_broken, value))


# ---------------------------------------------------------------- CSV


def _csv(text: str, path: Path) -> list[dict[str, Any]]:
    """Cells are separated by what the header is; each row has as many as the header."""
    if not text.strip():
        return []
    header = _QUOTED.sub("", text.lstrip().partition("\n")[0])
    likely = sorted(filter(header.count, SEPARATORS), key=header.count, reverse=True) or [","]
    refusal: UserError | None = None
    for separator in likely:  # names may hold other ones: then the rows have no such cells
        try:
            return _table(_records(text, separator, path), path)
        except UserError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _records(text: str, separator: str, path: Path) -> list[tuple[int, list[str]]]:
    """The line and the cells of each row that is not blank, the header first."""
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a cell may be a whole document
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    records: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for cells in reader:
            width = len(records[0][1]) if records else len(cells)
            if cells and len(cells) != width:
                raise UserError(
                    f"{path}, line {line} has {len(cells)} cells and the header {width} (separated"
                    f" by {SEPARATORS[separator]}): put text that holds the separator into double quotes."
                )
            if cells:
                records.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, line {line} is not CSV: {error}: put text with quotes in it into double quotes, and"
            " double its own."
        ) from None
    finally:
        csv.field_size_limit(limit)
    return records


def _table(records: list[tuple[int, list[str]]], path: Path) -> list[dict[str, Any]]:
    header = [name.strip() for name in records[0][1]]
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise UserError(f"{path} has two columns {twice[0]!r}: give each column its own name.")
    return [
        Placed({name: cell or None for name, cell in zip(header, cells, strict=True)}, f"{path}, line {line}")
        for line, cells in records[1:]
    ]


def describe(value: Any) -> str:
    """A value in a few words, for an error."""
    if value is None:
        return "missing"
    if value == "" or (isinstance(value, str) and not value.strip()):
        return "empty"
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"
