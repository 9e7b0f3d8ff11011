"""Build auxiliary contexts for agreement: solved examples of *other* problems, or instructions.

| kind | contexts of a row |
|---|---|
| `random` | K other problems with their solutions, drawn by (seed, row) |
| `retrieval` | the K nearest other problems with their solutions, by cosine of embeddings |
| `induction` | K general instructions, each written by the model from a few solved problems |

Inductions are checked, and tried again. Never the row itself, nor a near-duplicate of it (same
words, or word triples that overlap by 0.8; rows with a `duplicate_key`: the same key), nor a text
that holds the row's own reference. One of fewer than 5 words that several rows have is a label
(yes, B): other problems may show it, since to leave it out would tell it. What is built is kept on
disk under a key that covers data, kind, settings and model.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from unisd.console import show_progress
from unisd.data.rows import Row
from unisd.data.text import (
    NEAR_DUPLICATE_THRESHOLD,
    contains,
    jaccard,
    prompt_text,
    reference_of,
    shingles,
    words,
)
from unisd.errors import UserError
from unisd.files import write_whole

FORMAT = 3  # of the cache; a new number forgets what older versions built
KINDS = ("columns", "random", "retrieval", "induction")
EXAMPLE = "Problem: {prompt}\nSolution: {reference}"
DEMONSTRATIONS = 4  # solved problems that an instruction is written from (3-5 published)
INSTRUCTIONS = 12  # written per data set; each row gets K of them
TRIES = 4
BLOCK = 512  # rows whose similarities exist at once
NEAR = 64  # of the most similar problems, looked at before the others are sorted


@dataclass(frozen=True)
class Settings:
    """What the contexts depend on, beside rows and model.

    `embedder`: tfidf, model, or a sentence-transformers name or folder.
    """

    kind: str
    k: int = 3
    seed: int = 0
    embedder: str = "tfidf"


def needs_model(kind: str, embedder: str) -> bool:
    """Whether the student's own model writes or embeds for contexts of this kind."""
    return kind == "induction" or (kind == "retrieval" and embedder == "model")


class Embedder(Protocol):
    """Turns texts into vectors; rows of `[N,D]` need not be normalised.

    `name` goes into the cache's key.
    """

    name: str

    def __call__(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class _Problem:
    number: int
    words: tuple[str, ...]
    shingles: frozenset[tuple[str, ...]]
    key: Any
    reference: str
    solution: str  # its words
    is_label: bool
    example: str

    @classmethod
    def all_of(cls, rows: Sequence[Row]) -> list[_Problem]:
        references = [reference_of(row) for row in rows]
        solutions = [f" {' '.join(words(reference))} " for reference in references]
        counts = Counter(solutions)
        problems = []
        for number, (row, reference, solution) in enumerate(zip(rows, references, solutions, strict=True)):
            text = prompt_text(row["prompt"])
            found = words(text)
            example = EXAMPLE.format(prompt=text, reference=reference)
            is_label = counts[solution] > 1 or len(solution.strip()) < 2
            key = row.get("duplicate_key")
            problems.append(cls(number, found, shingles(found), key, reference, solution, is_label, example))
        return problems

    def is_same(self, other: _Problem) -> bool:
        """Whether `other` is this problem, or a near-duplicate of it."""
        if other.number == self.number or other.words == self.words:
            return True
        if self.key is not None:
            return bool(self.key == other.key)
        return jaccard(self.shingles, other.shingles) >= NEAR_DUPLICATE_THRESHOLD

    def allows(self, other: _Problem) -> bool:
        """Whether `other` may be shown to this problem's auxiliary teachers."""
        tells = not self.is_label and self.solution in other.solution
        return not (self.is_same(other) or tells or contains(other.example, self.reference))


def build(
    rows: Sequence[Row],
    settings: Settings,
    *,
    embedder: Embedder | None = None,
    write: Callable[[list[str], int], list[str]] | None = None,
    model_key: str = "",
    cache_dir: Path | None = None,
) -> list[Row]:
    """The rows with `auxiliary_contexts`; rows that have some already keep them.

    Rows for which fewer than K are found get those.

    Args:
        embedder: for retrieval.
        write: for induction: (prompts, try number) -> texts that the model writes.
        model_key: name and revision of the model behind `write` or a model embedder, for the cache.
        cache_dir: where to keep the result; None: nowhere.

    Raises:
        UserError: an unknown kind, or a single row (there is no other problem).
    """
    if settings.kind not in KINDS[1:]:
        raise UserError(f"agreement_contexts={settings.kind!r} is not one of {', '.join(KINDS)}.")
    missing = [i for i, row in enumerate(rows) if not row.get("auxiliary_contexts")]
    if not missing or settings.k < 1:
        return list(rows)
    if len(rows) < 2:
        raise UserError("auxiliary contexts come from other problems: give more than one row.")
    path = None if cache_dir is None else cache_dir / f"contexts-{_key(rows, settings, model_key)}.json"
    contexts = read_cache(path)
    if contexts is None:
        problems = _Problem.all_of(rows)
        if settings.kind == "random":
            contexts = [_random(problems[i], problems, settings) for i in missing]
        elif settings.kind == "retrieval":
            contexts = _retrieved(problems, missing, settings, embedder or tfidf)
        else:
            assert write is not None
            contexts = _induced(problems, missing, settings, write)
        write_cache(path, contexts)
    built = dict(zip(missing, contexts, strict=True))
    return [row | {"auxiliary_contexts": built[i]} if i in built else row for i, row in enumerate(rows)]


# ---------------------------------------------------------------- kinds


def _random(problem: _Problem, problems: Sequence[_Problem], settings: Settings) -> list[str]:
    rng = random.Random(f"{settings.seed} {problem.words}")
    chosen: dict[tuple[str, ...], str] = {}
    for _ in range(20 * settings.k):
        other = rng.choice(problems)
        if other.words not in chosen and problem.allows(other):
            chosen[other.words] = other.example
        if len(chosen) == settings.k:
            break
    return list(chosen.values())


def _retrieved(
    problems: Sequence[_Problem], missing: Sequence[int], settings: Settings, embed: Embedder
) -> list[list[str]]:
    vectors_ND = np.asarray(embed([" ".join(problem.words) for problem in problems]), dtype=np.float32)
    norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    vectors_ND = vectors_ND / np.maximum(norms_N1, 1e-12)
    found = []
    with show_progress("retrieving contexts", len(missing)) as advance:
        for first in range(0, len(missing), BLOCK):
            block = list(missing[first : first + BLOCK])
            similarity_BN = vectors_ND[block] @ vectors_ND.T
            for i, similarity_N in zip(block, similarity_BN, strict=True):
                chosen: dict[tuple[str, ...], str] = {}
                for place in _by_similarity(similarity_N):
                    other = problems[place]
                    if other.words not in chosen and problems[i].allows(other):
                        chosen[other.words] = other.example
                    if len(chosen) == settings.k:
                        break
                found.append(list(chosen.values()))
            advance(len(block))
    return found


def _by_similarity(similarity_N: np.ndarray) -> Iterator[int]:
    """Places from the most similar one on, equal ones in their order.

    The first few are nearly always enough: only they are sorted, until more are asked for.
    """
    least = np.partition(similarity_N, -min(NEAR, len(similarity_N)))[-min(NEAR, len(similarity_N))]
    for part in (np.flatnonzero(similarity_N >= least), np.flatnonzero(similarity_N < least)):
        yield from part[np.argsort(-similarity_N[part], kind="stable")].tolist()


class _TfIdf:
    """Frequencies of words, weighted by rarity: needs no model."""

    name = "tfidf"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        if not any(text.split() for text in texts):
            return np.zeros((len(texts), 1))
        sparse = TfidfVectorizer(sublinear_tf=True, analyzer=str.split).fit_transform(texts)
        if sparse.shape[0] * sparse.shape[1] <= 5e7:
            dense: np.ndarray = sparse.toarray()
            return dense
        # keeps 20,000 rows within memory
        reduced: np.ndarray = TruncatedSVD(256, random_state=0).fit_transform(sparse)
        return reduced


tfidf: Embedder = _TfIdf()


class SentenceTransformerEmbedder:
    """Any sentence-transformers model, by name or folder (extra `retrieval`)."""

    def __init__(self, name: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise UserError(
                f'embedder {name!r} needs sentence-transformers: pip install "unisd[retrieval]", or use'
                " tfidf."
            ) from None
        self.name = name
        try:
            self._model = SentenceTransformer(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"embedder={name!r} is neither tfidf, model nor a sentence-transformers model that can be"
                f" loaded: {reason}"
            ) from None

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        vectors: np.ndarray = self._model.encode(list(texts), convert_to_numpy=True, show_progress_bar=False)
        return vectors


INDUCTION = (
    "Here are some solved problems of one kind.\n\n{examples}\n\nWrite one general instruction, in one or two"
    " sentences, that tells a reader how to solve problems of this kind. Do not repeat the problems and do"
    " not solve any."
)


def _induced(
    problems: Sequence[_Problem],
    missing: Sequence[int],
    settings: Settings,
    write: Callable[[list[str], int], list[str]],
) -> list[list[str]]:
    rng = random.Random(f"{settings.seed} induction")
    count = max(INSTRUCTIONS, 2 * settings.k)
    shown = [rng.sample(range(len(problems)), min(DEMONSTRATIONS, len(problems))) for _ in range(count)]
    written: dict[int, str] = {}
    for attempt in range(TRIES):
        waiting = [i for i in range(count) if i not in written]
        if not waiting:
            break
        prompts = [
            INDUCTION.format(examples="\n\n".join(problems[n].example for n in shown[i])) for i in waiting
        ]
        for i, text in zip(waiting, write(prompts, attempt), strict=True):
            if is_instruction(text, [problems[n] for n in shown[i]]):
                written[i] = " ".join(text.split())
    contexts = []
    for i in missing:
        # Not from this problem itself or one like it, and not one that gives its answer away.
        fitting = [
            text
            for number, text in written.items()
            if not any(problems[i].is_same(problems[n]) for n in shown[number])
            and not contains(text, problems[i].reference)
        ]
        order = random.Random(f"{settings.seed} {problems[i].words}")
        contexts.append(order.sample(sorted(set(fitting)), min(settings.k, len(set(fitting)))))
    return contexts


def is_instruction(text: str, shown: Sequence[_Problem]) -> bool:
    """Some words, not too many, and no copy of what it was written from."""
    found = words(text)
    return 5 <= len(found) <= 120 and not any(
        jaccard(shingles(found), problem.shingles) >= NEAR_DUPLICATE_THRESHOLD
        or contains(text, problem.reference)
        for problem in shown
    )


# ---------------------------------------------------------------- cache


def _key(rows: Sequence[Row], settings: Settings, model_key: str) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, asdict(settings), model_key]).encode())
    for row in rows:
        parts = [
            row.get(name)
            for name in ("prompt", "privileged_context", "completion", "duplicate_key", "auxiliary_contexts")
        ]
        digest.update(json.dumps(parts, default=str).encode())
    return digest.hexdigest()[:24]


def read_cache(path: Path | None) -> Any:
    """What was built before; None where there is nothing."""
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # half a file of another program: built again
        return None


def write_cache(path: Path | None, built: Any) -> None:
    """Whole or not at all: two runs may build the same at once, and both write the same."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(built))
