"""Compare texts: whole (`exact`), or as a part of the completion (`contains`)."""

from __future__ import annotations

import re
import unicodedata

from unisd.tasks.base import Grade
from unisd.tasks.graders.base import TAIL, as_text

CONTAINS_TAIL = 200_000


def _fold(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def exact(completion: str, gold: str) -> Grade:
    """Equal up to case, Unicode form and white space. The whole completion is the answer."""
    text = " ".join(as_text(completion).split())
    if len(text) > max(TAIL, 20 * len(as_text(gold))):  # no folding makes that equal
        return Grade(False, text[:TAIL])
    folded = _fold(text)
    return Grade(bool(folded) and folded == _fold(as_text(gold)), folded[:TAIL] or None)


def contains(completion: str, gold: str) -> Grade:
    """Gold occurs as whole words ("cat" is not in "category"), in the last 200,000 characters.

    An empty gold is in nothing.
    """
    text, wanted = _fold(as_text(completion)[-CONTAINS_TAIL:]), _fold(as_text(gold))
    if not wanted:
        return Grade(False, None)
    # A border is needed only where gold itself begins or ends in a letter or digit.
    before = r"(?<![^\W_])" if wanted[0].isalnum() else ""
    after = r"(?![^\W_])" if wanted[-1].isalnum() else ""
    found = re.search(before + re.escape(wanted) + after, text)
    return Grade(found is not None, wanted if found else None)
