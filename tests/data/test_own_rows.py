"""The user's own rows: what a column may hold, what graders compare with, and what `unisd prepare`
writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy
import pytest

from unisd import tasks
from unisd import testing as tiny
from unisd.cli.main import main
from unisd.data.rows import load_rows, prepare_rows
from unisd.errors import UserError
from unisd.models.load import with_adapter
from unisd.run.inputs import load_data
from unisd.run.options import RunOptions
from unisd.testing import trainer

ADD = "def add(a, b):\n    return a + b"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data_of(path: Path, *rows: dict[str, Any], **options: Any) -> Any:
    file = write(
        path / "rows.jsonl",
        [{"prompt": f"p{i}", "privileged_context": "r", **row} for i, row in enumerate(rows * 2)],
    )
    return load_data(RunOptions(train_file=file, **options))


def test_code_is_graded_by_tests(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl, line 1: grader=\"code\" needs a column tests"):
        data_of(tmp_path, {"completion": ADD}, grader="code", allow_unsafe_code_execution=True)
    data = data_of(
        tmp_path,
        {"completion": ADD, "tests": "assert add(1, 2) == 3"},
        grader="code",
        allow_unsafe_code_execution=True,
    )
    row = data.train[0]
    assert data.grade(row, ADD) and not data.grade(row, "def add(a, b):\n    return 0")


def test_code_needs_a_sandbox_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(unsafe: bool) -> None:
        raise UserError("no sandbox")

    monkeypatch.setattr("unisd.tasks.sandbox.require", refuse)
    with pytest.raises(UserError, match="no sandbox"):
        data_of(tmp_path, {"tests": "assert True"}, grader="code")


def test_an_answer_column_is_what_graders_compare_with(tmp_path: Path) -> None:
    data = data_of(tmp_path, {"completion": "It is 4, or 5.", "answer": 4}, grader="exact")
    assert data.grade(data.train[0], "4") and not data.grade(data.train[0], "It is 4, or 5.")
    data = data_of(tmp_path, {"completion": "4"}, grader="exact")
    assert data.grade(data.train[0], "4")
    with pytest.raises(UserError, match=r"rows.jsonl, line 1: .* needs a column answer, or a reference"):
        data_of(tmp_path, {"privileged_context": None, "teacher_prompt": "t"}, grader="exact")


def test_forms_of_a_completion() -> None:
    row = {"prompt": "p", "privileged_context": "r"}
    message = {"role": "assistant", "content": "a"}
    assert prepare_rows([{**row, "completion": [message]}])[0]["completion"] == "a"
    for wrong in ("", " ", [], [message, message], [{"role": "user", "content": "a"}], {"a": 1}):
        with pytest.raises(UserError, match="row 0 of the dataset: completion is"):
            prepare_rows([{**row, "completion": wrong}])


def test_numbers_are_text() -> None:
    row = prepare_rows([{"prompt": "p", "privileged_context": 4, "negative_context": 4.5, "completion": 4}])[
        0
    ]
    assert (row["privileged_context"], row["negative_context"], row["completion"]) == ("4", "4.5", "4")


def test_conversations_are_split_before_the_answer() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = prepare_rows([{"messages": turns}], {"prompt": "messages"})[0]
    assert (row["prompt"], row["completion"], row["privileged_context"]) == (turns[:1], "a", "a")
    assert (
        prepare_rows(
            [{"messages": turns, "hint": "h"}], {"prompt": "messages", "privileged_context": "hint"}
        )[0]["privileged_context"]
        == "h"
    )


def test_one_column_under_two_names() -> None:
    row = prepare_rows(
        [{"prompt": "p", "answer": "a"}], {"privileged_context": "answer", "completion": "answer"}
    )[0]
    assert row == {"prompt": "p", "privileged_context": "a", "completion": "a", "id": "0"}
    same = {"privileged_context": "privileged_context", "completion": "privileged_context"}
    assert prepare_rows([{"prompt": "p", "privileged_context": "a"}], same)[0]["completion"] == "a"


def test_references_to_train_on_are_there(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"p{i}", "teacher_prompt": "t"} for i in range(4)]
    file = write(tmp_path / "rows.jsonl", rows)
    command = [
        "train",
        "--model_name_or_path",
        str(model_dir),
        "--train_file",
        file,
        "--recipe",
        "sft",
        "--dry_run",
    ]
    command += ["--max_completion_length", "8"]
    assert main(command) == 2
    assert "has no completion, which completion_source=reference trains on" in capsys.readouterr().err


def test_prepare_writes_every_row(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(
        tmp_path / "rows.jsonl",
        [{"prompt": f"What is {i}?", "privileged_context": f"It is {i}."} for i in range(20)],
    )
    command = [
        "prepare",
        "--model_name_or_path",
        str(model_dir),
        "--train_file",
        file,
        "--negatives",
        "corrupt",
    ]
    command += ["--max_completion_length", "8", "--output"]
    assert main([*command, str(tmp_path / "out.jsonl")]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 20
    assert main([*command, str(tmp_path / "." / "rows.jsonl")]) == 2
    assert "rows.jsonl is a file that is read" in capsys.readouterr().err


def test_unknown_modules_of_an_adapter() -> None:
    from peft import LoraConfig

    with pytest.raises(UserError, match=r"lora_target_modules: .*q_porj.* Its linear modules: .*q_proj"):
        with_adapter(tiny.model(), LoraConfig(target_modules=["q_porj"], task_type="CAUSAL_LM"), 0, False)


def answers_to(tmp_path: Path, model_dir: Path, *more: str) -> list[str]:
    rows = write(tmp_path / "rows.jsonl", [{"prompt": f"{i}?", "answer": str(i)} for i in range(6)])
    flags = [
        "--model_name_or_path",
        str(model_dir),
        "--task",
        "jsonl",
        "--data_files",
        rows,
    ]
    short = [] if "--eval_max_new_tokens" in more else ["--eval_max_new_tokens", "2"]
    return ["eval", *flags, *short, *more]


def test_eval_answers_all_of_the_users_rows(
    model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "f.json"
    assert main(answers_to(tmp_path, model_dir, "--json", str(figures))) == 0
    assert json.loads(figures.read_text())["task_accuracy"]["n"] == 6
    capfd.readouterr()
    assert main(answers_to(tmp_path, model_dir, "--json", str(figures), "--max_eval_rows", "4")) == 0
    assert "jsonl: 4 of 6 rows (split all)" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rollout_batch_size", "0"], "--rollout_batch_size 0: at least 1 is needed"),
        (["--eval_max_new_tokens", "-3"], "--eval_max_new_tokens -3: at least 1 is needed"),
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--base", "pocket"], "--base pocket has another vocabulary"),
    ],
)
def test_mistakes_of_an_evaluation(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(answers_to(tmp_path, model_dir, *flags)) == 2
    assert message in capsys.readouterr().err


def test_malformed_messages_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"prompt": [{"x": 1}], "answer": "a"}])
    with pytest.raises(
        UserError, match=r"jsonl: .*row 0: prompt holds .* messages with role and content are needed"
    ):
        tasks.get("jsonl", data_files=file).load("all")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "what is it?", "image": b"png"}, "image"),
        ({"prompt": "what is it?", "images": ["a.png"]}, "images"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]},
            "image",
        ),
    ],
)
def test_rows_with_images_are_refused(row: dict[str, Any], what: str) -> None:
    said = f"row 1 of the dataset holds '{what}': all models are trained and evaluated on text only"
    with pytest.raises(UserError, match=said) as caught:
        prepare_rows([{"prompt": "a", "completion": "b", what: None}, {**row, "completion": "b"}])
    assert "remove the row, or the column if the text does not need it" in str(caught.value)
    assert prepare_rows([{"prompt": "a", "completion": "b", "image": None, "images": []}])


# ----------------------------------------------------------------------- whatever holds the rows

COLUMNS_OF_ROWS = {"prompt": ["a", "b"], "completion": ["c", "d"]}


def holders() -> dict[str, Any]:
    import pandas
    import pyarrow

    rows = [{"prompt": "a", "completion": "c"}, {"prompt": "b", "completion": "d"}]
    return {
        "columns": COLUMNS_OF_ROWS,
        "pandas": pandas.DataFrame(rows),
        "pyarrow": pyarrow.Table.from_pylist(rows),
        "datasets": datasets.Dataset.from_list(rows),
        "generator": (row for row in rows),
    }


@pytest.mark.parametrize("kind", ["columns", "pandas", "pyarrow", "datasets", "generator"])
def test_rows_from_whatever_holds_them(kind: str) -> None:
    found = load_rows(holders()[kind])
    assert [(row["prompt"], row["completion"]) for row in found] == [("a", "c"), ("b", "d")]


def test_what_a_table_does_not_hold_is_missing() -> None:
    import pandas

    table = pandas.DataFrame(
        [{"prompt": "a", "completion": "c", "negative_context": "x"}, {"prompt": "b", "completion": "d"}]
    )
    table["auxiliary_contexts"] = [numpy.array(["e", "f"]), None]
    first, second = load_rows(table)
    assert first["auxiliary_contexts"] == ["e", "f"] and second["negative_context"] is None


@pytest.mark.parametrize(
    ("dataset", "told"),
    [
        ({"train": [{"prompt": "a"}]}, r"the dataset has splits: give one of them \(train\)"),
        ({"prompt": ["a"], "completion": ["b", "c"]}, "columns of different lengths: {'prompt': 1, "),
        (["a"], r"row 0 of the dataset is 'a' \(str\), a dict of columns is needed"),
        ([], "the dataset is empty"),
    ],
)
def test_what_holds_no_rows(dataset: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_rows(dataset)


def test_a_stream() -> None:
    stream = datasets.Dataset.from_dict(COLUMNS_OF_ROWS).to_iterable_dataset().repeat(None)
    with pytest.raises(UserError, match="the dataset is a stream, which may never end: give a list"):
        load_rows(stream)
    assert len(prepare_rows(stream, of_stream=5)) == 5


def test_a_trainer_takes_them_too(tmp_path: Path) -> None:
    stream = datasets.Dataset.from_dict(COLUMNS_OF_ROWS).to_iterable_dataset().repeat(None)
    with pytest.raises(UserError, match=r"the training data is a stream.*max_steps"):
        trainer(tmp_path, train_dataset=stream)
    built = trainer(tmp_path, train_dataset=stream, max_steps=2, eval_dataset=COLUMNS_OF_ROWS)
    assert len(built.rows) == 2 * 8 and len(built.eval_dataset) == 2
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict(COLUMNS_OF_ROWS)})
    with pytest.raises(UserError, match=r"the training data has splits: give one of them \(train\)"):
        trainer(tmp_path, train_dataset=splits)
    built = trainer(tmp_path, train_dataset=COLUMNS_OF_ROWS, eval_dataset=splits)
    assert set(built.evaluate()) == {"eval_train_loss", "eval_train_runtime"}
    with pytest.raises(UserError, match="the evaluation data 'x' is a stream"):
        built.evaluate({"x": stream})
