"""Which families a test goes through: some always, a third in `.ci/run`, all on demand."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from tests.families.zoo import names

BREADTH = (
    "qwen2.5", "qwen3-moe", "qwen3.5-vision", "llama4", "gemma3-vision", "gemma4", "gpt-oss", "phi3-longrope",
    "deepseek-v3", "lfm2", "granite-hybrid", "falcon-h1",
)  # fmt: skip
"""A third, in which every kind of layer, head and file occurs."""


def cells(always: Collection[str] = (), of: Collection[str] | None = None) -> Any:
    """The parameter `family`: those of `always` in every run of the tests, the rest by marker."""
    found = []
    for name in names() if of is None else of:
        marks = [pytest.mark.breadth] if name in (*BREADTH, *always) else []
        found.append(pytest.param(name, marks=marks if name in always else [*marks, pytest.mark.families]))
    return pytest.mark.parametrize("family", found)
