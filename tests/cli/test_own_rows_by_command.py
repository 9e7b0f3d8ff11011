"""The user's own rows in every command, read as `unisd train` reads them, under the same names."""

from __future__ import annotations

import csv
import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from unisd import testing as tiny
from unisd.cli import eval as cli_eval
from unisd.cli import probe
from unisd.cli.main import COMMANDS, main
from unisd.cli.sources import tasks_of
from unisd.data.rows import hold_out, load_rows
from unisd.data.text import problem_mark

SHORT = ["--eval_max_new_tokens", "2"]


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unisd.cli.eval.load_any", lambda *_: (tiny.model(), tiny.tokenizer()))


def plain(path: Path, count: int = 4, **more: Any) -> str:
    rows = [{"prompt": f"{n}+1?", "completion": str(n + 1), **more} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def table(path: Path) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["question", "gold"], *((f"{n}+1?", str(n + 1)) for n in range(4))])
    return str(path)


def conversations(path: Path) -> str:
    rows = [
        {"conversations": [{"from": "human", "value": f"{n}+1?"}, {"from": "gpt", "value": str(n + 1)}]}
        for n in range(4)
    ]
    path.write_text(json.dumps(rows))
    return str(path)


def messages(path: Path) -> str:
    turns = [
        [{"role": "user", "content": f"{n}+1?"}, {"role": "assistant", "content": str(n + 1)}]
        for n in range(4)
    ]
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    return str(path)


LAYOUTS = {
    "csv": (table, ["--columns", "prompt=question,completion=gold"]),
    "json": (conversations, ["--columns", "prompt=conversations"]),
    "jsonl": (messages, ["--columns", "prompt=messages"]),
}


def answered(tmp_path: Path, *flags: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `unisd eval` writes: the figures, and all answers."""
    figures, rows = tmp_path / "f.json", tmp_path / "r.jsonl"
    assert main(["eval", *flags, *SHORT, "--json", str(figures), "--rows", str(rows)]) == 0
    return json.loads(figures.read_text()), [json.loads(line) for line in rows.read_text().splitlines()]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_file_in_any_layout_is_answered_and_graded(tmp_path: Path, kind: str) -> None:
    make, columns = LAYOUTS[kind]
    file = make(tmp_path / f"mine.{kind}")
    figures, rows = answered(tmp_path, "--eval_file", file, *columns, "--grader", "number")
    assert figures["task"] == "mine" and figures["task_accuracy"]["n"] == 4 and figures["gold_ppl"] > 1
    assert [row["id"] for row in rows] == ["0", "1", "2", "3"] and not any(row["correct"] for row in rows)

    given = [{"id": str(n), "completion": f"It is {n + 1}."} for n in range(3)]
    completions = tmp_path / "theirs.jsonl"
    completions.write_text("".join(json.dumps(row) + "\n" for row in given))
    asked = ["--eval_file", file, *columns, "--grader", "number", "--json", str(tmp_path / "g.json")]
    assert main(["grade", *asked, "--completions", str(completions)]) == 0
    graded = json.loads((tmp_path / "g.json").read_text())
    assert graded["task"] == "mine" and graded["accuracy"]["value"] == 1.0
    assert graded["matched"] == {"rows": 4, "answered": 3, "answers": 3}


@pytest.mark.parametrize("reference", ["response", "answer"])
def test_a_layout_is_read_also_where_no_reference_is_needed(tmp_path: Path, reference: str) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n}+1?", reference: str(n + 1)} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for grader in ([], ["--grader", "number"]) if reference == "response" else (["--grader", "number"],):
        figures, _ = answered(tmp_path, "--eval_file", str(file), *grader)
        assert bool(figures["task_accuracy"]) == bool(grader)
        assert (figures["gold_ppl"] is None) == (reference == "answer")  # which graders read


def test_of_a_training_file_the_rows_that_a_run_holds_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = plain(tmp_path / "rows.jsonl", 40)
    held = {seed: [row["id"] for row in hold_out(load_rows(file), seed=seed)[1]] for seed in (7, 42)}
    assert held[7] != held[42] and len(held[7]) == 4

    def ids(*flags: str) -> list[str]:
        return [row["id"] for row in answered(tmp_path, "--train_file", file, *flags)[1]]

    assert ids("--seed", "7") == held[7]
    assert "rows: the 4 of 40 rows that `unisd train` holds out with seed 7 (--split all" in " ".join(
        capfd.readouterr().err.split()
    )
    assert ids() == held[42]
    assert ids("--split", "all", "--max_eval_rows", "5") == ["0", "1", "2", "3", "4"]
    run = tmp_path / "run"  # whose own seed says which rows it has not seen
    run.mkdir()
    (run / "results.json").write_text(json.dumps({"seed": 7}))
    assert ids("--model", str(run), "--retention", "none") == held[7]
    config = {"train_file": [str(file)], "eval_split": "2", "max_completion_length": 5}
    (run / "results.json").write_text(json.dumps({"seed": 7, "config": config}))
    for given, rows in (
        ({}, 2),
        ({"train_file": [f"{tmp_path}/run/../{Path(file).name}"]}, 2),  # the same file
        ({"eval_split": "3"}, 3),
        ({"eval_file": plain(tmp_path / "o.jsonl", 5)}, 5),
    ):
        flags = {"model_name_or_path": str(run), "train_file": [str(file)], "seed": None, **given}
        [asked] = tasks_of(Namespace(**flags), ()).values()
        assert len(asked.load("test")) == rows and asked.max_new_tokens == 5
    assert ids("--eval_file", plain(tmp_path / "other.jsonl", 2)) == ["0", "1"]


def test_rows_that_a_run_was_trained_on_are_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = plain(tmp_path / "rows.jsonl", 6)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    marks = [problem_mark(row["prompt"].upper()) for row in load_rows(file)[:4]]
    (tmp_path / "run" / "trained_on.json").write_text(json.dumps({"problems": marks}))
    (tmp_path / "run" / "results.json").write_text(json.dumps({"seed": 7}))

    def said(model: Path, *flags: str) -> str:
        asked = ["--model", str(model), "--retention", "none", "--eval_file", file, *flags]
        assert len(answered(tmp_path, *asked)[1]) == 6
        return " ".join(capfd.readouterr().err.split())

    for model in (tmp_path / "run", checkpoint):
        assert f"rows: 4 of 6 rows are problems that {model} was trained on" in said(model)
        assert "trained on" not in said(model, "--split", "all")


def test_rows_without_a_grader_have_likelihoods_and_their_answers_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = plain(tmp_path / "rows.jsonl", 2)
    figures, rows = answered(tmp_path, "--eval_file", file, "--base", "tiny")
    assert figures["gold_ppl"] > 1 and figures["task_accuracy"] is None
    assert figures["retention_ppl"]["forward"] == pytest.approx(figures["retention_ppl"]["reverse"])
    assert [set(row) for row in rows] == [{"task", "part", "id", "completion"}] * 2
    monkeypatch.setattr(cli_eval._Evaluation, "answers", None)  # nobody would look at them
    assert main(["eval", "--eval_file", file]) == 0


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--task", "gsm8k"], "eval_file belongs to your own rows"),
        (["--data_files", "x"], "data_files belongs to a task"),
        (["--split", "train"], "--eval_file has no training rows: give --train_file"),
        (["--split", "validation"], "no split 'validation'; there are train, test, all"),
        (["--grader", "nubmer"], "unknown grader 'nubmer': did you mean 'number'?"),
        ([], "rows: there is no --grader, and its rows have no reference"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a"}) + "\n")
    assert main(["eval", "--eval_file", str(file), *flags]) == 2
    assert told in capsys.readouterr().err


def test_grading_needs_one_task_or_a_grader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = plain(tmp_path / "rows.jsonl")
    assert main(["grade", "--eval_file", file, "--completions", file]) == 2
    assert "rows has no grader: give --grader" in capsys.readouterr().err


def test_contamination_of_own_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, other = plain(tmp_path / "a.jsonl", 5), plain(tmp_path / "b.jsonl", 2)
    assert main(["contamination", "--train_file", train, "--eval_file", other]) == 0
    assert "exact: test 1 = train 1" in capsys.readouterr().out


def test_a_study_reads_own_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, report = table(tmp_path / "train.csv"), table(tmp_path / "report.csv")
    files = ["--train_file", train, "--eval_file", report, "--columns", "prompt=question,completion=gold"]
    flags = ["--mechanisms", "ema", "--seeds", "1", "--design", "one-in", "--dry_run"]
    assert main(["study", *files, "--grader", "number", *flags]) == 0
    assert "train-reference-s1-" in capsys.readouterr().out
    (tmp_path / "report.csv").write_text("question,gold\na,many\n")
    assert main(["study", *files, "--grader", "number", *flags]) == 2
    assert "report.csv, line 2: gold 'many' is not a number" in capsys.readouterr().err
    (tmp_path / "data").mkdir()
    table(tmp_path / "data" / "train.csv")
    dataset = ["--dataset_name", str(tmp_path / "data"), "--columns", "prompt=qestion"]
    assert main(["study", *dataset, *flags]) == 2
    assert "pass --columns prompt=question" in capsys.readouterr().err


# -- one vocabulary --------------------------------------------------------------------------------


def test_commands_share_the_names_of_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = cli_eval._parser()
    assert parser.parse(["--model", "m"]) == parser.parse(["--model_name_or_path", "m"])
    seen = []

    def probed(options: Any, config: Any, *sizes: int) -> tuple[dict[str, Any], None]:
        seen.append(sizes)
        return {}, None

    monkeypatch.setattr("unisd.cli.probe.probe", probed)
    asked = ["--max_train_rows", "3", "--eval_max_new_tokens", "4", "--rollout_batch_size", "5"]
    probe.probe_command(["--model", "m", *asked])
    assert seen == [(3, 4, 5)]
    assert main(["eval", "--model", "m", "--model_name_or_path", "m"]) == 2
    assert "--model and --model_name_or_path set the same option" in capsys.readouterr().err
    assert main(["eval", "--max_new_tokens", "4"]) == 2
    assert "unknown flag --max_new_tokens: did you mean --eval_max_new_tokens?" in capsys.readouterr().err


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("train", "recipes")])
def test_help_has_a_line_an_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    shown = re.findall(r"^  (--[\w-]+)", text, re.M)
    assert len(shown) == len({*shown}) and not any("-" in name[2:] for name in shown)
    headings = re.findall(r"^(\w[\w ]+):$", text, re.M)
    order = ["model", "data", "what is measured", "what is built", "output"]
    known = [name for name in headings if name in order]
    assert known == sorted(known, key=order.index)
