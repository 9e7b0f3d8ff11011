"""Say where a row stands in what the user gave: by that it is named in every error.

Rows are held out, mixed and copied before they are looked at, so that their number there would lead
to another row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Placed(dict[str, Any]):
    """A row that knows its place: `rows.jsonl, line 7`."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where

    def __or__(self, other: Mapping[str, Any]) -> Placed:  # type: ignore[override]
        return Placed({**self, **other}, self.where)


def place_of(row: Mapping[str, Any], number: int, name: str) -> str:
    """The row's own place, else its number (from 0) in what is called `name`."""
    return getattr(row, "where", None) or f"row {number} of {name}"
