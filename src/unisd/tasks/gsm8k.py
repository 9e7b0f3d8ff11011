"""GSM8K: grade-school word problems (Cobbe et al., 2021; MIT licence), from local files or from the Hub.

Local files have no official split, so a tenth of the problems, chosen by a hash of the question, is held out: `test` (and
`validation`, the same rows) never meets `train`, whichever file or order the problems come in. A file whose name says
`test` is taken whole for `test`. From the Hub (`openai/gsm8k`, 7473 / 1319 rows), the official splits are used.

    unisd train --task gsm8k --data_files path/to/train.jsonl.gz
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unisd.errors import UserError
from unisd.graders import extract_number, number
from unisd.tasks.base import Grade, Row, Task

INSTRUCTION = 'Think step by step, briefly, and end with "#### <number>".'
FIELDS = ("question", "answer")
HOLD_OUT = 10  # one problem in so many is test
_NOTE = re.compile(r"<<[^<>\n]{0,500}>>")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


class GSM8KTask(Task):
    """Word problems with a solution in steps; graded by the final number.

    Args:
        data_files: a path, a glob or several of them, `.jsonl` or `.jsonl.gz`; None: the Hub's dataset.
        num_auxiliary_contexts: solved examples of other problems per row.
    """

    name = "gsm8k"
    splits = ("train", "validation", "test")
    max_new_tokens = 256

    def __init__(self, data_files: str | Sequence[str] | None = None, num_auxiliary_contexts: int = 3) -> None:
        self.data_files = data_files
        self.num_auxiliary_contexts = num_auxiliary_contexts

    def load(self, split: str, *, limit: int | None = None, seed: int = 0, **options: Any) -> list[Row]:
        """Rows of `split` in an order shuffled by `seed`; `data_files` may also be given here.

        Auxiliary contexts and the wrong reference of a row depend on `seed` and the row alone, never on `limit`.

        Raises `UserError`: unknown split, no such file, not JSON, a missing field, an answer without `#### number`.
        """
        if split not in self.splits:
            raise UserError(f"gsm8k has no split {split!r}; use {', '.join(self.splits)}")
        data_files = options.pop("data_files", self.data_files)
        if options:
            raise UserError(f"gsm8k: unknown option {', '.join(options)}; it knows data_files")
        train, held_out = _from_files(data_files) if data_files else _from_hub(split)
        # Solved examples come from the training problems alone, also for test rows.
        pool = [_problem(raw) for raw in train] or [_problem(raw) for raw in held_out]
        problems = [_problem(raw) for raw in (train if split == "train" else held_out)]
        if not problems:
            raise UserError(f"gsm8k: the files hold no rows for the split {split}; give more data or another split")
        order = list(range(len(problems)))
        random.Random(seed).shuffle(order)
        return [self._row(problems[i], pool, seed) for i in order[:limit]]

    def _row(self, problem: dict[str, str], pool: list[dict[str, str]], seed: int) -> Row:
        rng = random.Random(f"{seed} {problem['id']}")
        others: list[dict[str, str]] = []
        for _ in range(20 * self.num_auxiliary_contexts):  # a small file may hold fewer problems than are wanted
            other = rng.choice(pool)
            if len(others) < self.num_auxiliary_contexts and other["id"] not in {problem["id"], *(o["id"] for o in others)}:
                others.append(other)
        return {
            "id": problem["id"],
            "prompt": f"{problem['question']}\n\n{INSTRUCTION}",
            "privileged_context": problem["reference"],
            "completion": problem["reference"],
            "negative_context": wrong_reference(problem["reference"], rng),
            "auxiliary_contexts": [f"Problem: {o['question']}\nSolution: {o['reference']}" for o in others],
            "answer": problem["answer"],
        }

    def grade(self, row: Row, completion: str) -> Grade:
        return number(completion, f"#### {row['answer']}")


def wrong_reference(reference: str, rng: random.Random) -> str:
    """The reference with a wrong result: the final answer is changed, and so is that number in the last step.

    The earlier steps stay right, which is what a slip in the last step looks like.
    """
    steps, _, answer = reference.rpartition("####")
    old = answer.strip()
    value = int(re.sub(r"[^\d-]", "", old.split(".")[0]) or 0)
    wrong = value
    while wrong == value:
        spread = max(3, abs(value) // 4)
        wrong = value + rng.choice((-1, 1)) * rng.randint(1, spread)
        if value >= 0 and wrong < 0:
            wrong = value
    new = f"{wrong:,}" if "," in old else str(wrong)
    lines = steps.rstrip("\n").split("\n")
    # Only the last mention is the result; an operand may have the same value.
    mentions = [m for m in _NUMBER.finditer(lines[-1]) if m[0].replace(",", "") == old.replace(",", "").lstrip("-")]
    if mentions:
        start, end = mentions[-1].span()
        lines[-1] = lines[-1][:start] + new.lstrip("-") + lines[-1][end:]
    return "\n".join(lines) + f"\n#### {new}"


def _problem(raw: dict[str, Any]) -> dict[str, str]:
    reference = _NOTE.sub("", raw["answer"]).strip()
    question = raw["question"].strip()
    return {
        "id": hashlib.sha256(question.encode()).hexdigest()[:12],
        "question": question,
        "reference": reference,
        "answer": reference.rpartition("####")[2].strip(),
    }


def _from_files(data_files: str | Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(train, held out) of local files."""
    train: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    for pattern in [data_files] if isinstance(data_files, (str, Path)) else data_files:
        pattern = str(Path(pattern).expanduser())
        paths = sorted(glob.glob(pattern)) or [pattern]  # noqa: PTH207 (Path.glob takes no absolute pattern)
        for path in paths:
            whole = re.split(r"[._-]", Path(path).name)[0] in ("test", "validation")
            for raw in _read(Path(path)):
                digest = hashlib.sha256(raw["question"].strip().encode()).digest()
                held = whole or int.from_bytes(digest[:4], "big") % HOLD_OUT == 0
                (held_out if held else train).append(raw)
    return train, held_out


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"gsm8k: no such file: {path}; give data_files that exist (.jsonl or .jsonl.gz)")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as stream:
            for line_number, line in enumerate(stream, 1):
                if line.strip():
                    yield _checked(json.loads(line), f"{path}, line {line_number}")
    except (json.JSONDecodeError, UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"gsm8k: {path} is not JSON lines ({error}); give .jsonl or .jsonl.gz") from None


def _checked(raw: Any, where: str) -> dict[str, Any]:
    """`raw` if it has the fields of GSM8K."""
    if not isinstance(raw, dict):
        raise UserError(f"gsm8k: {where} is not a JSON object; each line holds question and answer")
    missing = [field for field in FIELDS if not isinstance(raw.get(field), str) or not raw[field].strip()]
    if missing:
        raise UserError(
            f"gsm8k: {where} has no text in {' and '.join(missing)} (its fields: {', '.join(map(str, raw)) or 'none'}); "
            "GSM8K rows have question and answer"
        )
    if extract_number(raw["answer"].rpartition("####")[2]) is None or "####" not in raw["answer"]:
        raise UserError(f"gsm8k: the answer of {where} does not end with '#### number'; is it another dataset?")
    return raw


def _from_hub(split: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    from datasets import load_dataset

    try:
        data = load_dataset("openai/gsm8k", "main")
    except Exception as error:  # the hub's client raises errors of many libraries
        raise UserError(
            f"cannot load openai/gsm8k from the Hugging Face hub ({type(error).__name__}); give local files with --data_files"
        ) from error
    rows = {part: [_checked(row, f"{part} row {i}") for i, row in enumerate(data[part])] for part in ("train", "test")}
    return rows["train"], rows["test"]
