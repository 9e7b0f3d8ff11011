"""What a user reads is short and plain: pages, the help of options, and the words in both."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from unisd.options.option import declared
from unisd.options.table import UniSDOptions
from unisd.run.options import RunOptions

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [
    README,
    *sorted(
        page for folder in ("", "concepts", "howto", "tutorials") for page in (DOCS / folder).glob("*.md")
    ),
]
HELP = {
    item.name: str(item.metadata["help"]) for kind in (UniSDOptions, RunOptions) for item in declared(kind)
}

BETTER = {
    "anew": "again",
    "borne out": "confirmed",
    "is told": "sees, or reads",
    "of which the": "a sentence of its own",
    "old skills": "prior skills, or retention",
    "says of": "says about",
    "the more so": "even more",
    "with your own rights": "with your own permissions",
}
"""Phrases that a reader has to decode, each with the better word."""


def paragraphs(page: Path) -> list[str]:
    """The texts between empty lines and of list items; no code, headings, tables or pictures."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)  # where links lead
    text = re.sub(r"^([-*]|\d+\.) ", "\n", text, flags=re.M)
    found = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return [part for part in found if part and part[0] not in "#|!<"]


def sentences(text: str) -> list[str]:
    whole = re.split(r"(?<=[.?!:])\s+(?=[\"*`A-Z(])", text)
    return [sentence for sentence in whole if len(sentence.split()) > 2]


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_short(page: Path) -> None:
    counts = [words(sentence) for part in paragraphs(page) for sentence in sentences(part)]
    assert sum(counts) <= 20 * len(counts)
    assert not [part for part in paragraphs(page) if words(part) > 80]


def test_the_readme_is_one_screen() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 80 and len(paragraphs(README)) > 5


def test_the_help_of_options_is_short() -> None:
    counts = [words(part) for text in HELP.values() for part in re.split(r"(?<=[.;:?]) ", text)]
    assert len(counts) > len(HELP) > 100 and sum(counts) <= 8 * len(counts)
    assert not {name: text for name, text in HELP.items() if words(text) > 60}


def test_phrases_with_a_better_word() -> None:
    pages = sorted({*PAGES, *(DOCS / "reference").glob("*.md"), *(DOCS / "results").glob("*.md")})
    texts = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in pages} | HELP
    texts |= {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("src/unisd/recipes/*.yaml")}
    worse = re.compile(rf"\b({'|'.join(BETTER)})\b")
    found = {name: worse.findall(" ".join(text.split())) for name, text in texts.items()}
    assert not [f"{name}: {phrase!r}, better: {BETTER[phrase]}" for name in found for phrase in found[name]]
