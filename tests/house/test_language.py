"""What a newcomer reads first is short: sentences, paragraphs, and the README as a whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]


def paragraphs(page: Path) -> list[str]:
    """The texts between empty lines and of list items; no code, headings, tables or pictures."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)  # where links lead
    text = re.sub(r"^[-*] ", "\n", text, flags=re.M)
    found = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return [part for part in found if part and part[0] not in "#|!<"]


def sentences(page: Path) -> list[str]:
    whole = [re.split(r"(?<=[.?!:])\s+(?=[\"*`A-Z(])", part) for part in paragraphs(page)]
    return [sentence for part in whole for sentence in part if len(sentence.split()) > 2]


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_sentences_are_short(page: Path) -> None:
    counts = [words(sentence) for sentence in sentences(page)]
    assert len(counts) > 5 and sum(counts) / len(counts) <= 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_paragraph_is_long(page: Path) -> None:
    assert not [part for part in paragraphs(page) if words(part) > 80]


def test_the_readme_is_one_screen() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 80
