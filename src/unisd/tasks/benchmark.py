"""Hold what published benchmarks have in common: splits that never meet, solved examples.

Rows come from the Hub or from local files.

Local files: a row belongs to the split that its field `split` names, else to the one that its
file's name begins or ends with (`train`, `validation` or `dev`, `test`); of what is left, a tenth,
chosen by a hash of the problem, is held out for `test` and `validation`. `load("all")` gives every
row in the files' order, whatever its split.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from unisd.data.reading import load_file
from unisd.data.text import NEAR_DUPLICATE_THRESHOLD, contains, jaccard, problem_key, shingles, words
from unisd.errors import UserError, flag
from unisd.files import parsed
from unisd.tasks.base import Row, Task

logger = logging.getLogger(__name__)

Raw = dict[str, Any]
Problem = dict[str, Any]
HOLD_OUT = 10  # one problem in so many is held out
_SPLIT_WORDS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


class Benchmark(Task):
    """Subclasses set the attributes and override `problem`, `row` and `grade`.

    Args:
        data_files: a path, a glob or several of them (.jsonl, .json, .parquet, .csv, also .gz);
            None: the Hub's dataset.
        num_auxiliary_contexts: solved examples of other problems per row.
    """

    splits: tuple[str, ...] = ("train", "validation", "test", "all")
    hub: tuple[str, str | None]
    """Repository and configuration on the Hub."""
    hub_splits: ClassVar[dict[str, str]] = {"train": "train", "validation": "validation", "test": "test"}
    """Ours -> the Hub's."""
    counts: dict[str, int] = {}
    """Rows that the Hub's splits must have."""
    fields: dict[str, type]
    """Fields that a row must have, with their types."""

    def __init__(
        self, data_files: str | Path | Sequence[str | Path] | None = None, num_auxiliary_contexts: int = 3
    ) -> None:
        self.data_files = data_files
        self.num_auxiliary_contexts = num_auxiliary_contexts
        self._by_hash = False
        self.loading = ""  # the split that rows are being made for

    # -- what a benchmark says of itself -----------------------------------------------------------

    def flatten(self, raw: Raw) -> Iterator[Raw]:
        """The rows that one record of a file holds."""
        yield raw

    def problem(self, raw: Raw, where: str) -> Problem:
        """Turn a checked record into this task's own dict.

        It must have `key` (the text that identifies the problem), and `id` (str) if the dataset has
        one, else the row's number is used. `same` names problems with other keys that are held out
        together with it.

        Raises `UserError` for a record that is not such a problem; for a field of another kind, any
        error is enough.
        """
        raise NotImplementedError

    def row(self, problem: Problem, rng: random.Random) -> Row:
        """The row without its auxiliary contexts."""
        raise NotImplementedError

    def solved(self, problem: Problem) -> str:
        """The problem with its solution, as an example for others."""
        raise NotImplementedError

    # -- loading -----------------------------------------------------------------------------------

    def prepare_training(self) -> None:
        """Hold out a tenth of all rows if the files have no training rows.

        Training takes the rest.
        """
        if self.data_files is not None and not self._by_hash and not self._problems()["train"]:
            self._by_hash = True
            logger.warning(
                "%s: none of the files is for training; a tenth of their rows is held out, the rest"
                " trained on.",
                self.name,
            )

    def load(self, split: str, *, limit: int | None = None, seed: int = 0, **options: Any) -> list[Row]:
        """Load the rows of `split` in an order shuffled by `seed` (`all`: in the files' order).

        `data_files` may also be given here.

        Auxiliary contexts and the wrong reference of a row depend only on `seed` and the row, never
        on `limit`.

        Raises `UserError`: unknown split, no such file, not JSON, a record with the wrong fields,
        an empty split.
        """
        if split not in self.splits:
            raise UserError(f"{self.name} has no split {split!r}; use {', '.join(self.splits)}")
        data_files = options.pop("data_files", self.data_files)
        if options:
            raise UserError(f"{self.name}: unknown option {', '.join(options)}; it knows data_files")
        self.data_files, self.loading = data_files, split
        parts = self._problems(split)
        problems = parts["train" if split == "all" else split]
        if not problems:
            raise UserError(
                f"{self.name}: the files hold no rows for the split {split}; give more data or another split"
            )
        # Solved examples come from the training problems alone, also for test rows.
        pool = parts["train"] or problems
        order = list(range(len(problems)))
        if split != "all":
            random.Random(seed).shuffle(order)
        return [self._row(problems[i], pool, seed) for i in order[:limit]]

    def _row(self, problem: Problem, pool: list[Problem], seed: int) -> Row:
        rng = random.Random(f"{seed} {problem['seed']}")
        # a small file may hold fewer than are wanted
        drawn = [rng.choice(pool) for _ in range(20 * self.num_auxiliary_contexts)]
        row = self.row(problem, rng)
        others: list[Problem] = []
        for other in drawn:
            new = other["key"] not in {problem["key"], *(o["key"] for o in others)}
            if new and len(others) < self.num_auxiliary_contexts and self._may_be_shown(other, problem, row):
                others.append(other)
        return {"id": problem["id"], **row, "auxiliary_contexts": [self.solved(other) for other in others]}

    def _may_be_shown(self, other: Problem, problem: Problem, row: Row) -> bool:
        """Say whether a solved problem may stand in a row's context.

        It may be no near-duplicate, and must not hold the row's reference.
        """
        mine, theirs = (shingles(words(str(key["key"]))) for key in (problem, other))
        return jaccard(mine, theirs) < NEAR_DUPLICATE_THRESHOLD and not contains(
            self.solved(other), str(row.get("privileged_context") or "")
        )

    def _problems(self, split: str = "train") -> dict[str, list[Problem]]:
        """Problems by split.

        From the Hub only what `split` needs: itself and the training problems.
        """
        found: dict[str, list[Problem]] = {"train": [], "validation": [], "test": []}
        problems: list[tuple[Problem, str | None]] = []
        counts: Counter[str | None] = Counter()
        for problem, named in self._from_files() if self.data_files is not None else self._from_hub(split):
            problem["number"] = len(problems)
            # What is drawn for a problem must not depend on its place in the files.
            problem["seed"] = problem.get("id") or short_id(problem["key"])
            # The same whatever else is loaded: what `unisd eval` names, `unisd grade` must find.
            numbered = named if self.data_files is None else None
            problem.setdefault("id", f"{numbered}-{counts[numbered]}" if numbered else str(counts[None]))
            counts[numbered] += 1
            problems.append((problem, named))
        self.rows_in_files = len(problems) if self.data_files is not None else None
        if split == "all":
            return found | {"train": [problem for problem, _ in problems]}
        # Files for training alone, or (when training) for anything but training, are split here.
        whole = self._by_hash or (
            self.data_files is not None and {named for _, named in problems} <= {"train", None}
        )
        held_out = []
        first: dict[Any, str] = {}  # prompts that differ in case and white space are one problem
        for problem, named in problems:
            key = first.setdefault(problem.get("same") or problem_key(problem["key"]), problem["key"])
            if named is not None and not whole:
                found.setdefault(named, []).append(problem)
            elif int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % HOLD_OUT == 0:
                held_out.append(problem)
            else:
                found["train"].append(problem)
        # Each serves for the other where only one is there.
        found["validation"] += held_out if not found["validation"] else []
        found["test"] += held_out if not found["test"] else []
        if self.data_files is not None:
            found["validation"], found["test"] = (
                found["validation"] or found["test"],
                found["test"] or found["validation"],
            )
        return found

    def _read(self, record: Raw, where: str) -> list[tuple[Raw, Problem]]:
        """The problems of one record."""
        try:
            return [(raw, self.problem(self._checked(raw, where), where)) for raw in self.flatten(record)]
        except UserError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = (
                f"it lacks {error}"
                if isinstance(error, KeyError)
                else f"a field holds something else ({error})"
            )
            raise UserError(f"{self.name}: {where} is not a record of this task: {reason}") from None

    def _from_files(self) -> Iterator[tuple[Problem, str | None]]:
        assert self.data_files is not None
        patterns = [self.data_files] if isinstance(self.data_files, (str, Path)) else self.data_files
        for pattern in map(str, patterns):
            expanded = str(Path(pattern).expanduser())
            for path in sorted(glob.glob(expanded)) or [expanded]:  # noqa: PTH207 (Path.glob takes no absolute pattern)
                try:
                    records = self._records(path)
                except UserError as error:
                    raise UserError(f"{self.name}: {error}") from None
                by_name = _split_of(Path(path).name)
                for number, record in enumerate(records):
                    for raw, problem in self._read(record, f"{path}, row {number}"):
                        yield problem, self.split_of(raw) or by_name

    def _records(self, path: str) -> list[Raw]:
        """The records of a file."""
        return load_file(path)

    def split_of(self, raw: Raw) -> str | None:
        """The split that a record names itself."""
        return _SPLIT_WORDS.get(str(raw.get("split")))

    def _from_hub(self, split: str) -> Iterator[tuple[Problem, str | None]]:
        from datasets import load_dataset

        repository, configuration = self.hub
        wanted = (
            self.hub_splits
            if split == "all"
            else {k: v for k, v in self.hub_splits.items() if k in ("train", split)}
        )
        for ours, theirs in wanted.items():
            try:
                data = load_dataset(repository, configuration, split=theirs)
            except Exception as error:  # the hub's client raises errors of many libraries
                raise UserError(
                    f"cannot load {repository} from the Hugging Face hub ({type(error).__name__}); give local"
                    f" files with {flag('data_files')}"
                ) from error
            if ours in self.counts and len(data) != self.counts[ours]:
                raise UserError(
                    f"{repository} has {len(data)} rows in {theirs}, not {self.counts[ours]}: not the dataset"
                    " that this task knows"
                )
            for number, record in enumerate(data):
                for _, problem in self._read(dict(record), f"{repository}, {theirs} row {number}"):
                    yield problem, ours

    def _checked(self, raw: Raw, where: str) -> Raw:
        # cells of a CSV file are text
        raw = raw | {
            name: int(raw[name])
            for name, kind in self.fields.items()
            if kind is int and isinstance(raw.get(name), str) and raw[name].strip().lstrip("-").isdecimal()
        }
        missing = [
            name
            for name, kind in self.fields.items()
            if not isinstance(raw.get(name), kind) or raw.get(name) in (None, "")
        ]
        if missing:
            fields = ", ".join(map(str, raw)) or "none"
            raise UserError(
                f"{self.name}: {where} has no"
                f" {' and '.join(f'{n} ({self.fields[n].__name__})' for n in missing)} (its fields:"
                f" {fields}); a record of this task has {', '.join(self.fields)}"
            )
        return raw


def _split_of(file_name: str) -> str | None:
    words = [word for word in re.split(r"[._-]", file_name.lower()) if word]
    for word in (words[0], *words[1:]) if words else ():
        if word in _SPLIT_WORDS:
            return _SPLIT_WORDS[word]
    return None


def short_id(text: str) -> str:
    """A stable name for a problem."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def own_id(raw: Raw, field: str) -> Problem:
    """The `id` of a problem whose record has one."""
    return {"id": str(raw[field])} if raw.get(field) not in (None, "") else {}


def as_list(value: Any) -> list[Any]:
    """A list that may have been stored as JSON text."""
    if isinstance(value, str):
        value = parsed(value)
    return list(value) if isinstance(value, (list, tuple)) else []
