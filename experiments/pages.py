"""Write Markdown pages whose tables are replaced while what a person wrote stays."""

from __future__ import annotations

from pathlib import Path

from unisd.errors import UserError

START, END = "<!-- table:begin -->", "<!-- table:end -->"


def between_markers(text: str, start: str, end: str, content: str) -> str:
    """Replace what stands between two marker lines of `text`.

    What a person wrote around them stays.

    Raises:
        UserError: the markers are not there.
    """
    before, found, rest = text.partition(start)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise UserError(f"the page has no lines {start} and {end}: put them where the tables belong.")
    return f"{before}{start}\n{content}\n{end}{after}"


def update(file: Path, title: str, content: str) -> None:
    """Put `content` between the markers of a page.

    A page that is not there gets a title and markers.
    """
    text = file.read_text(encoding="utf-8") if file.exists() else f"# {title}\n\n{START}\n{END}\n"
    file.write_text(between_markers(text, START, END, content), encoding="utf-8")
