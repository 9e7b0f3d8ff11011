"""Stores what a study has found: `runs.jsonl` and `attempts.jsonl`.

One line per finished run, and one per start and failure.

Both are append-only, whole lines are on the disk before anything relies on them, and a line that a
kill cut short is dropped. pandas and DuckDB read them as they are: `pd.read_json("runs.jsonl",
lines=True)`, `read_json_auto('runs.jsonl')`.
"""

from __future__ import annotations

import hashlib
import json
import time
from functools import cache
from pathlib import Path
from typing import IO, Any

from unisd import __version__
from unisd.files import ANSWERS, METRICS, RESULTS, append_line, is_evaluation, read_lines
from unisd.processes import lock
from unisd.run import grafting
from unisd.study.design import Run

SCHEMA_VERSION = 1
RUNS, ATTEMPTS, LOCK, FOLDERS = "runs.jsonl", "attempts.jsonl", ".lock", "runs"
DONE, FAILED = "done", "failed"
DATA = ("train_file", "eval_file", "data_files", "retention")
"""Options that name files of rows."""
Record = dict[str, Any]


class Store:
    """The records of a study's folder. One process may write at a time.

    Raises:
        UserError: another process runs this study.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder = folder
        self._lock: IO[str] | None = None
        if writes:
            busy = f"another process runs the study in {folder}: wait for it, or choose another --output_dir."
            self._lock = lock(folder / LOCK, busy)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def run_folder(self, run_id: str) -> Path:
        return self.folder / FOLDERS / run_id

    def runs(self) -> dict[str, Record]:
        """The last record of each run, by its id."""
        return {record["run"]: record for record in read_lines(self.folder / RUNS)}

    def failures(self, run_id: str) -> int:
        """How often a run has failed since it was last asked for anew."""
        events = [line["event"] for line in read_lines(self.folder / ATTEMPTS) if line["run"] == run_id]
        if "anew" in events:
            events = events[len(events) - events[::-1].index("anew") :]
        return events.count("failed")

    def last_reason(self, run_id: str) -> str:
        """Why a run has failed the last time; empty where it has not."""
        lines = [line for line in read_lines(self.folder / ATTEMPTS) if line["run"] == run_id]
        reasons = [str(line.get("reason") or "") for line in lines if line["event"] == "failed"]
        return reasons[-1] if reasons else ""

    def note(self, run_id: str, event: str, **details: Any) -> None:
        """Append to the attempts: `started`, `failed` or `anew`."""
        append_line(self.folder / ATTEMPTS, {"run": run_id, "event": event, "time": time.time(), **details})

    def finish(self, run: Run, status: str, **details: Any) -> Record:
        """Append the record of a run; from the files in its folder where it is done."""
        record: Record = {
            "schema_version": SCHEMA_VERSION,
            "unisd": __version__,
            "run": run.id,
            "status": status,
            "cell": run.cell.name,
            "task": run.task,
            "seed": run.seed,
            "factors": run.cell.levels,
            "options": run.options,
            "data": data_of(run.options),
            "finished_at": time.time(),
            **details,
        }
        if status == DONE:
            record |= found_in(self.run_folder(run.id))
        append_line(self.folder / RUNS, record)
        return record


def data_of(options: dict[str, Any]) -> dict[str, str]:
    """The local files that a run reads its rows from, with marks of what they hold."""
    named = [value for key, value in options.items() if key in DATA]
    files = [file for value in named for file in (value if isinstance(value, list) else [value])]
    return {str(file): _mark(Path(file)) for file in files if file is not None and Path(file).is_file()}


def _mark(file: Path) -> str:
    found = file.stat()
    return _digest(file.resolve(), found.st_mtime_ns, found.st_size)


@cache
def _digest(file: Path, changed_ns: int, size: int) -> str:
    """Read a file once for all runs of a study, unless it has changed."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]


def found_in(folder: Path) -> Record:
    """The results of a run's folder, with its single answers.

    And the figures that one looks for first.
    """
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    answers = json.loads((folder / ANSWERS).read_text(encoding="utf-8"))
    curves = grafting.read(folder)
    after = results["after"]

    def value(name: str) -> float | None:
        return None if after[name] is None else after[name]["value"]

    # From the metrics, so that a run which was resumed counts all of its steps.
    steps = [line for line in read_lines(folder / METRICS) if not is_evaluation(line)]
    return {
        "task_accuracy": value("task_accuracy"),
        "retention_accuracy": value("retention_accuracy"),
        "train_s": sum(line["step_time"] for line in steps),
        "resumed": bool(results["config"].get("resume_from_checkpoint")),
        "results": results,
        "answers": {
            part: {
                "ids": found["ids"],
                "before": [*map(int, found["before"])],
                "after": [*map(int, found["after"])],
            }
            for part, found in answers.items()
            if found["before"] is not None  # graded
        },
        **({"parts": curves[-1]} if curves else {}),
    }


def with_a_part(record: Record, scale: float) -> Record | None:
    """The record of a run as if a part of its change were all; None if it was not measured.

    What it took stays that of the run: a part needs no further training.
    """
    point = next((point for point in record.get("parts", ()) if point["scale"] == scale), None)
    if point is None:
        return None
    names = ("task_accuracy", "retention_accuracy")
    figures = {name: point[name] for name in (*names, "gold_ppl")}
    results = record["results"]
    answers = {
        part: {**found, "after": [*map(int, point["correct"][part])]}
        for part, found in record["answers"].items()
    }
    values = {name: None if point[name] is None else point[name]["value"] for name in names}
    after = {**results["after"], **figures, "retention_ppl": None}
    return {**record, **values, "results": {**results, "after": after}, "answers": answers}


def is_complete(folder: Path) -> bool:
    """Whether a run has finished in this folder: `results.json` is written whole, and last."""
    return (folder / RESULTS).is_file() and (folder / ANSWERS).is_file()
