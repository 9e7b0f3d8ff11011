"""Compare free text with a reference by the words that both hold: token F1 and ROUGE-L.

Token F1 (as for SQuAD, but in any language: articles stay) looks at words in any order, ROUGE-L at
the longest common sequence of words. Both are F-measures between 0 and 1. They measure wording, not
truth: an answer that says the same in other words scores low, one that adds a "not" scores high.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from unisd.data.text import words
from unisd.data.thoughts import answer_of
from unisd.tasks.base import Grade
from unisd.tasks.graders.base import TAIL, shortened
from unisd.tasks.graders.text import Text, fold

THRESHOLD = 0.5
"""Token F1 from which an answer counts as right: the share of words that have a partner is half.

Texts on different things stay well below it, for they share little more than function words.
"""


def tokens(text: str) -> tuple[str, ...]:
    """The words of a text's first `TAIL` characters; of scripts without spaces its characters."""
    return words(fold(text[:TAIL]))


def token_f1(found: Sequence[str], gold: Sequence[str]) -> float:
    """F1 of the words that two texts share, in any order."""
    return _f1((Counter(found) & Counter(gold)).total(), found, gold)


def rouge_l(found: Sequence[str], gold: Sequence[str]) -> float:
    """F1 of the longest common sequence of words of two texts, which need not be contiguous."""
    return _f1(_longest_common(found, gold), found, gold)


def _f1(shared: int, found: Sequence[str], gold: Sequence[str]) -> float:
    return 2 * shared / max(len(found) + len(gold), 1)


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time.

    A row is one integer: bit i is 0 where the table grows at place i of `one` (Hyyrö, 2004).
    """
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    every = row = (1 << len(one)) - 1
    for word in other:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & every
    return len(one) - row.bit_count()


class Similarity(Text):
    """Words of the whole completion and of gold; of several golds the nearest counts."""

    name = "similarity"

    def grade(self, completion: str, gold: tuple[str, ...]) -> Grade:
        text = answer_of(completion)
        if not text.strip():
            return Grade(False, None, "no answer found", {"token_f1": 0.0, "rouge_l": 0.0}, score=0.0)
        found, wanted = tokens(text), [tokens(one) for one in gold]
        score = max(token_f1(found, one) for one in wanted)
        details = {"token_f1": score, "rouge_l": max(rouge_l(found, one) for one in wanted)}
        correct = score >= THRESHOLD
        far = f"token F1 {score:.2f} is below {THRESHOLD:g}"
        return Grade(
            correct,
            shortened(text, TAIL),
            "" if correct else far,
            details,
            how="whole text",
            feedback="" if correct else f"The answer has little in common with the reference: {far}.",
            score=score,
        )


similarity = Similarity()
