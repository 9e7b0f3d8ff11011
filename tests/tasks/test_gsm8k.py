"""The GSM8K task: rows from local files, references, wrong references, hold-out, and clear
errors.
"""

import gzip
import json
import random
from pathlib import Path

import pytest

from tests.helpers.data import DATA, needs_data
from unisd import tasks
from unisd.errors import UserError
from unisd.tasks.graders.numbers import extract_number
from unisd.tasks.gsm8k import GSM8KTask, wrong_reference


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def problems(count: int, first: int = 0) -> list[dict[str, str]]:
    return [
        {
            "question": f"Tom has {i} pens and buys 2. How many?",
            "answer": f"Tom has {i}+2 = <<{i}+2={i + 2}>>{i + 2} pens.\n#### {i + 2}",
        }
        for i in range(first, first + count)
    ]


def test_rows_hold_every_column(tmp_path):
    task = tasks.get("gsm8k", data_files=str(write(tmp_path / "a.jsonl", problems(60))))
    rows = task.load("train", limit=5)
    assert len(rows) == 5
    for row in rows:
        assert "<<" not in row["privileged_context"] and row["completion"] == row["privileged_context"]
        assert row["prompt"].startswith("Tom has") and "####" in row["prompt"]
        assert len(row["auxiliary_contexts"]) == 3 and len(set(row["auxiliary_contexts"])) == 3
        question = row["prompt"].split("\n")[0]
        assert not any(question in context for context in row["auxiliary_contexts"])
        assert task.grade(row, row["completion"]).correct
        assert not task.grade(row, row["negative_context"]).correct
        assert not task.grade(row, "no idea").correct


def test_held_out_problems_are_disjoint_and_do_not_depend_on_order_or_seed(tmp_path):
    rows = problems(300)
    task = GSM8KTask(str(write(tmp_path / "a.jsonl.gz", rows)))
    turned = GSM8KTask(str(write(tmp_path / "b.jsonl", rows[::-1])))
    train, test = ({row["prompt"] for row in task.load(split)} for split in ("train", "test"))
    assert not train & test and len(train | test) == 300 and 10 < len(test) < 60
    assert {row["prompt"] for row in turned.load("test", seed=5)} == test
    assert task.load("validation") == task.load("test")
    # Solved examples of a test row are training problems.
    questions = {row["prompt"].split("\n")[0] for row in task.load("test")}
    assert not any(
        question in context
        for row in task.load("test")
        for context in row["auxiliary_contexts"]
        for question in questions
    )


def test_seed_and_limit(tmp_path):
    task = GSM8KTask(str(write(tmp_path / "a.jsonl", problems(100))))
    assert task.load("train", limit=7) == task.load("train")[:7]
    assert task.load("train", limit=7, seed=1) != task.load("train", limit=7)


def test_several_files_and_a_test_file(tmp_path):
    write(tmp_path / "part1.jsonl", problems(40))
    write(tmp_path / "part2.jsonl", problems(40, 100))
    write(tmp_path / "test.jsonl", problems(10, 500))
    both = GSM8KTask(str(tmp_path / "part*.jsonl"))
    assert len(both.load("train")) + len(both.load("test")) == 80
    whole = GSM8KTask([str(tmp_path / "test.jsonl")])
    assert len(whole.load("test")) == 10
    with pytest.raises(UserError, match="no rows for the split train"):
        whole.load("train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"problem": "x", "solution": "y"}\n',
            r"row 0 has no question \(str\) and answer \(str\) \(its fields: problem, solution\)",
        ),
        ('{"question": "x", "answer": "no number"}\n', "does not end with '#### number'"),
        ("[1]\n", "an object is needed"),
        ("nonsense\n", "line 1 is not JSON"),
    ],
)
def test_wrong_files_are_told_in_one_line(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        GSM8KTask(str(tmp_path / "a.jsonl")).load("train")
    assert "\n" not in str(caught.value)


def test_other_mistakes_of_the_user(tmp_path):
    with pytest.raises(UserError, match="is not a file"):
        GSM8KTask(str(tmp_path / "missing.jsonl")).load("train")
    with pytest.raises(UserError, match="no split 'dev'"):
        GSM8KTask(str(tmp_path / "missing.jsonl")).load("dev")
    with pytest.raises(UserError, match="did you mean gsm8k"):
        tasks.get("gsm8")
    with pytest.raises(UserError, match=r"unexpected keyword argument 'datafiles'.*data_files"):
        tasks.get("gsm8k", datafiles="x")
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match="cannot be read"):
        GSM8KTask(str(tmp_path / "a.jsonl.gz")).load("train")


def test_a_wrong_reference_differs_in_the_last_step_and_the_answer_only():
    reference = "He has 10 * 2 = 20.\nThen 1,000 + 20 = 1,020 left.\n#### 1,020"
    wrong = wrong_reference(reference, random.Random(0))
    first, last, answer = wrong.split("\n")
    assert first == "He has 10 * 2 = 20."
    value = answer.removeprefix("#### ")
    assert value != "1,020" and last == f"Then 1,000 + 20 = {value} left."
    assert wrong_reference(reference, random.Random(0)) == wrong


def test_a_task_from_another_package(monkeypatch):
    class Point:
        name = "mine"

        @staticmethod
        def load():
            return type("Mine", (tasks.Task,), {})

    monkeypatch.setattr(tasks, "entry_points", lambda group: [Point] if group == "unisd.tasks" else [])
    assert "mine" in tasks.names() and isinstance(tasks.get("mine"), tasks.Task)


@pytest.mark.long
@needs_data
def test_the_real_file():
    task = GSM8KTask(str(DATA / "gsm8k" / "train.jsonl.gz"))
    rows = [*task.load("train"), *task.load("test")]
    assert len({row["id"] for row in rows}) == len(rows) == 7473
    assert sum(task.grade(row, row["completion"]).correct for row in rows) == 7473
    assert sum(task.grade(row, row["negative_context"]).correct for row in rows) == 0
    assert all(extract_number(row["answer"]) for row in rows)
    assert not any("<<" in row["completion"] for row in rows)
