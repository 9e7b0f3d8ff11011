"""What commands tell of rows that are too long, and of files that are missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unisd.cli.contamination import contamination
from unisd.cli.main import main
from unisd.run.resolve import parse

LONG = ("long " * 110).strip()
"""More tokens (bytes) than the tiny model's context of 512."""


def write(path: Path, *prompts: str) -> str:
    rows = [{"prompt": text, "answer": "a", "privileged_context": "a"} for text in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def evaluate(model: Path, file: str, figures: Path) -> int:
    flags = ["--data_files", file, "--eval_max_new_tokens", "2", "--json", str(figures)]
    return main(["eval", "--model", str(model), "--task", "jsonl", *flags])


def test_rows_over_the_context_are_left_out_and_said(
    model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "f.json"
    assert evaluate(model_dir, write(tmp_path / "a.jsonl", "a", LONG, "b", LONG + "x"), figures) == 0
    told = " ".join(capfd.readouterr().err.split())
    assert (
        "row 1 of jsonl, task has a prompt of 552 tokens, and the model's context is 512; 2 such row(s)"
        in told
    )
    assert told.endswith("of 4 are left out and not counted.")
    found = json.loads(figures.read_text())
    assert found["task_accuracy"]["n"] == 2 and found["task_overlong"] == 2
    assert evaluate(model_dir, write(tmp_path / "b.jsonl", LONG), figures) == 2
    assert "no row is left to answer; give a model with a longer context" in capfd.readouterr().err


def test_rows_to_report_on_are_refused_as_training_rows(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, report = write(tmp_path / "a.jsonl", "a", "b"), write(tmp_path / "b.jsonl", "c", LONG)
    flags = ["--recipe", "sft", "--max_completion_length", "8", "--dry_run"]
    files = ["--train_file", train, "--eval_file", report]
    assert main(["train", "--model_name_or_path", str(model_dir), *files, *flags]) == 2
    assert (
        "b.jsonl, line 2: the prompt has 552 tokens, and the model's context is 512; 1 such"
        " row(s): shorten or remove them" in capsys.readouterr().err
    )


def test_a_row_is_named_by_its_place_in_the_file(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of the second file, and after rows were held out."""
    first, second = write(tmp_path / "a.jsonl", *map(str, range(9))), tmp_path / "b.jsonl"
    write(second, *map(str, range(9, 18)))
    lines = second.read_text().splitlines()
    long = json.dumps({**json.loads(lines[6]), "prompt": "word " * 300})
    second.write_text("\n\n" + "\n".join([*lines[:6], long, *lines[7:]]) + "\n")
    command = ["train", "--model_name_or_path", str(model_dir), "--recipe", "sft", "--dry_run"]
    command += [
        "--max_completion_length",
        "8",
        "--max_prompt_length",
        "200",
        "--train_file",
        first,
        str(second),
    ]
    assert main(command) == 2
    assert f"{second}, line 9: the prompt has" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["--train_file", "--eval_file", "--data_files"])
def test_a_study_looks_for_all_files_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    there = write(tmp_path / "a.jsonl", *map(str, range(4)))
    files = {"--train_file": there} if missing != "--data_files" else {"--task": "gsm8k"}
    files[missing] = str(tmp_path / "none.jsonl")
    given = [part for item in files.items() for part in item]
    flags = ["--mechanisms", "ema", "--seeds", "1", "--dry_run"]
    assert main(["study", *given, *flags]) == 2
    assert f"{tmp_path / 'none.jsonl'} is not a file: check the path" in capsys.readouterr().err


def test_epochs_win_over_the_steps_of_a_recipe() -> None:
    _, usual = parse([])
    _, given = parse(["--num_train_epochs", "2"])
    _, both = parse(["--num_train_epochs", "2", "--max_steps", "5"])
    assert (usual.max_steps, given.max_steps, given.num_train_epochs, both.max_steps) == (60, -1, 2, 5)


def test_near_duplicates_without_spaces_are_contamination() -> None:
    asked = "小明有三个苹果,妈妈又给了他两个苹果,请问小明现在一共有多少个苹果"
    other = "法国的首都是哪一座城市,它在哪一条河边?"
    train = [{"id": "a", "prompt": f"{asked}呢?"}, {"id": "b", "prompt": other}]
    test = [
        {"id": "c", "prompt": f"{asked}?"},
        {"id": "d", "prompt": "水的化学式是什么?"},
        {"id": "e", "prompt": other},
    ]
    found = contamination(train, test)
    assert (found.near, found.exact) == ([("c", "a")], [("e", "b")])
