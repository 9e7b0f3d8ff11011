"""What is held out is not trained on, however often and in whatever spelling a problem is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unisd import tasks
from unisd.config import UniSDConfig
from unisd.data.rows import hold_out
from unisd.data.text import problem_key
from unisd.run.inputs import hold_out_validation, load_data
from unisd.run.options import RunOptions


def solutions(problems: int = 40, each: int = 4) -> list[dict[str, Any]]:
    """Several solutions a problem; prompts of one differ in case and white space."""
    spellings = ["What is {} and 1?", "what is {} and 1?", " What is  {} and 1?\n", "WHAT IS {} AND 1?"]
    return [
        {
            "prompt": spellings[n % 4].format(i),
            "privileged_context": f"way {n}: {i + 1}",
            "answer": str(i + 1),
        }
        for n in range(each)
        for i in range(problems)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def apart(*parts: list[dict[str, Any]]) -> bool:
    keys = [{problem_key(row["prompt"]) for row in part} for part in parts]
    return all(keys) and not any(a & b for i, a in enumerate(keys) for b in keys[:i])


def test_spellings_of_a_problem() -> None:
    same = ["Add  1\nand 2", "add 1 and 2 ", [{"role": "user", "content": "ADD 1 and 2"}]]
    assert len({problem_key(prompt) for prompt in same}) == 1
    other = ["add 1 and 3", "add 1 + 2", [{"role": "system", "content": "x"}, *same[2]]]
    assert len({problem_key(prompt) for prompt in [same[0], *other]}) == 4


def test_rows_are_held_out_by_problem() -> None:
    for seed in range(5):
        train, held = hold_out(solutions(), seed=seed)
        assert len(train) + len(held) == 160 and apart(train, held) and len(held) == 16


def test_a_run_trains_on_none_of_what_it_reports_or_chooses_on(tmp_path: Path) -> None:
    options = RunOptions(train_file=write(tmp_path / "rows.jsonl", solutions()), validation_split=0.25)
    data = load_data(options, seed=3)
    hold_out_validation(
        data, options, UniSDConfig(str(tmp_path), eval_strategy="steps", use_cpu=True, bf16=False)
    )
    assert apart(data.train, data.evaluation, data.validation)
    assert len(data.train) + len(data.evaluation) + len(data.validation) == 160


def test_a_task_holds_out_by_problem(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", solutions(200))
    task = tasks.get("jsonl", data_files=file)
    train, test = task.load("train"), task.load("test")
    assert len(train) + len(test) == 800 and apart(train, test) and len(test) % 4 == 0
    once = tasks.get("jsonl", data_files=write(tmp_path / "once.jsonl", solutions(200, 1)))
    of_once = {row["prompt"] for row in once.load("test")}
    assert of_once == {row["prompt"] for row in test if row["prompt"].startswith("What")}


def test_conversations_are_held_out_by_problem(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = solutions(100)
    for row in rows[::2]:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    rows.append(rows[0])
    task = tasks.get("jsonl", data_files=write(tmp_path / "rows.jsonl", rows))
    train, test = task.load("train"), task.load("test")
    assert apart(train, test) and len(train) + len(test) == 401
    assert [record.getMessage().partition(": ")[2][:46] for record in caplog.records] == [
        "1 of 401 rows are exact duplicates of others, "
    ]


def test_rows_to_report_on_that_are_trained_on_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = write(tmp_path / "a.jsonl", solutions(10, 1))
    report = write(tmp_path / "b.jsonl", solutions(12, 1)[8:])
    load_data(RunOptions(train_file=train, eval_file=report))
    (record,) = caplog.records
    said = (
        f"{report}: 2 of 4 rows repeat problems of {train}, which are trained on: their results do not show"
    )
    assert record.getMessage() == f"{said} what the model does on new ones."
