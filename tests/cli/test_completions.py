"""`unisd grade`: which rows a file of completions answers, in which order of options, and that no
command writes over what it reads.
"""

import csv
import gzip
import json

import pytest

from tests.helpers.commands import without_notes
from tests.helpers.data import DATA, needs_data
from unisd import tasks
from unisd.cli.main import main
from unisd.cli.parser import refuse_inputs
from unisd.errors import UserError

SCIENCE = [
    {
        "question": f"Which is number {i}?",
        "choices": [f"item {i} {k}" for k in range(3 + i % 3)],
        "answer": i % 3,
    }
    for i in range(12)
]
COMMON = [
    {"id": f"q{i}", "question": f"Where is {i}?", "choices": [*options, "place"], "answer": answer}
    for i, (options, answer) in enumerate(
        [(["bar", "shop", "bar", "den"], "bar"), (["a", "b", "c", "d"], "c")] * 6
    )
]
MEDICAL = [
    {
        "id": f"m{i}",
        "question": f"What of {i}?",
        "opa": "x",
        "opb": f"y{i}",
        "opc": "x",
        "opd": "z",
        "cop": i % 4,
    }
    for i in range(12)
]
GRADUATE = [
    {"Record ID": f"g{i}", "Question": f"Why {i}?", "Correct Answer": f"since {i}"}
    | {f"Incorrect Answer {k}": f"no {i} {k}" for k in (1, 2, 3)}
    for i in range(12)
]
LETTERS = {
    "scienceqa": [("ABCDE"[row["answer"]], None) for row in SCIENCE],
    "cos_e": [("ABCDE"[row["choices"].index(row["answer"])], row["id"]) for row in COMMON],
    "medmcqa": [("ABCD"[row["cop"]], row["id"]) for row in MEDICAL],
    "gpqa": [("A", row["Record ID"]) for row in GRADUATE],
}


def written(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def data(tmp_path):
    rows = {"scienceqa": SCIENCE, "cos_e": COMMON, "medmcqa": MEDICAL, "gpqa": GRADUATE}
    return {
        name: written(tmp_path / f"{name}.{'csv' if name == 'gpqa' else 'jsonl'}", found)
        for name, found in rows.items()
    }


def graded(tmp_path, name, file, lines, *flags):
    """The figures of `unisd grade`."""
    completions, figures = written(tmp_path / "c.jsonl", lines), tmp_path / "f.json"
    task = ["--task", name, "--data_files", file]
    command = ["grade", *task, "--completions", completions, "--json", str(figures)]
    assert main([*command, *flags]) == 0
    return json.loads(figures.read_text())


def refused(capsys, *command):
    assert main(list(command)) == 2
    error = without_notes(capsys.readouterr().err)
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", sorted(LETTERS))
def test_a_perfect_system_is_right_in_both_orders(tmp_path, capsys, data, name):
    theirs = [{"id": key or str(i), "completion": letter} for i, (letter, key) in enumerate(LETTERS[name])]
    assert graded(tmp_path, name, data[name], theirs)["accuracy"]["value"] == 1.0
    assert "12 answers do not say in which order they saw the options" in capsys.readouterr().out
    prompts = tmp_path / "prompts.jsonl"
    assert main(["grade", "--task", name, "--data_files", data[name], "--write_prompts", str(prompts)]) == 0
    assert f"12 prompts written to {prompts}" in capsys.readouterr().out
    asked = [json.loads(line) for line in prompts.read_text().splitlines()]
    rows = {row["id"]: row for row in tasks.get(name, data_files=data[name]).load("all")}
    ours = [{**line, "completion": rows[line["id"]]["completion"]} for line in asked]
    assert all(line["order"] == "unisd" and rows[line["id"]]["prompt"] == line["prompt"] for line in asked)
    assert graded(tmp_path, name, data[name], ours)["accuracy"]["value"] == 1.0
    assert "do not say in which order" not in capsys.readouterr().out
    for kept in ("order", "option_order"):  # one of the fields is enough
        few = [{key: line[key] for key in ("id", "completion", kept)} for line in ours]
        assert graded(tmp_path, name, data[name], few)["accuracy"]["value"] == 1.0
    named = [{"prompt_id": line["id"], "completion": line["completion"]} for line in ours]
    assert graded(tmp_path, name, data[name], named)["accuracy"]["value"] == 1.0
    swapped = [{**line, "order": "unisd"} for line in theirs]
    assert graded(tmp_path, name, data[name], swapped)["accuracy"]["value"] < 1.0


def test_the_options_may_have_stood_in_any_order(tmp_path, capsys, data):
    lines = [{"id": row["Record ID"], "option_order": [3, 1, 0, 2], "completion": "C"} for row in GRADUATE]
    assert graded(tmp_path, "gpqa", data["gpqa"], lines)["accuracy"]["value"] == 1.0
    bad = written(tmp_path / "bad.jsonl", [{**lines[0], "option_order": [4]}])
    error = refused(capsys, "grade", "--task", "gpqa", "--data_files", data["gpqa"], "--completions", bad)
    assert 'row 0: the order [4] of options must be "unisd" (that of our prompts), "data"' in error
    error = refused(capsys, "grade", "--task", "gpqa", "--data_files", data["gpqa"])
    assert "give either --completions C.jsonl, to grade them, or --write_prompts P.jsonl" in error


@pytest.mark.long
@needs_data
@pytest.mark.parametrize(
    ("name", "file", "letter"),
    [
        ("scienceqa", "scienceqa/text_only.jsonl.gz", lambda row: "ABCDE"[row["answer"]]),
        ("medmcqa", "medmcqa/validation.jsonl.gz", lambda row: "ABCD"[row["answer"]]),
        ("cos_e", "commonsenseqa/dev_rand_split.jsonl.gz", lambda row: row["answerKey"]),
    ],
)
def test_a_perfect_system_is_right_on_published_rows(tmp_path, name, file, letter):
    with gzip.open(DATA / file, "rt") as lines:
        theirs = [{"completion": f"The answer is ({letter(json.loads(line))})."} for line in lines]
    assert graded(tmp_path, name, str(DATA / file), theirs)["accuracy"]["value"] == 1.0


@pytest.fixture
def numbers(tmp_path):
    return written(
        tmp_path / "rows.jsonl",
        [{"id": f"r{i}", "prompt": f"{i}+1?", "answer": str(i + 1)} for i in range(6)],
    )


@pytest.mark.parametrize("key", ["id", "task_id", "question_id", "prompt_id"])
def test_rows_are_found_by_any_of_the_usual_keys(tmp_path, capsys, numbers, key):
    lines = [{key: f"r{i}", "completion": str(i + 1)} for i in (4, 0, 2, 5, 1, 3)]
    found = graded(tmp_path, "jsonl", numbers, lines, "--grader", "number")
    assert found["accuracy"]["value"] == 1.0 and "note:" not in capsys.readouterr().out
    both = [{"id": f"run-{i}", "task_id": f"r{i}", "completion": str(i + 1)} for i in range(6)]
    assert graded(tmp_path, "jsonl", numbers, both, "--grader", "number")["accuracy"]["value"] == 1.0


def test_rows_and_lines_are_accounted_for(tmp_path, capsys, numbers):
    lines = [
        {"id": "r1", "completion": "2"},
        {"id": "r1", "completion": "3"},
        {"id": "r0", "completion": "1"},
    ]
    found = graded(tmp_path, "jsonl", numbers, lines, "--grader", "number")
    assert found["matched"] == {"rows": 6, "answered": 2, "answers": 3}
    told = capsys.readouterr().out
    assert "answers for 2 of 6 rows; the figures are for these." in told
    assert "rows have 1 to 2 answers; each row counts once, by its share." in told


def test_order_is_used_only_where_it_is_asked_for_or_nothing_else_is_there(tmp_path, capsys, numbers):
    plain = [{"completion": str(i + 1)} for i in range(6)]
    assert graded(tmp_path, "jsonl", numbers, plain, "--grader", "number")["accuracy"]["value"] == 1.0
    assert (
        "its 6 lines are taken in the order of the rows (no line has prompt_id, id, task_id or question_id)"
        in capsys.readouterr().out
    )
    named = [{"id": f"other-{i}", "completion": str(i + 1)} for i in range(6)]
    given = written(tmp_path / "n.jsonl", named)
    command = ("grade", "--task", "jsonl", "--data_files", numbers, "--grader", "number", "--completions")
    error = refused(capsys, *command, given)
    assert "row 0: id 'other-0' is not among the 6 rows (ids like 'r0'); --in_order takes lines in" in error
    found = graded(tmp_path, "jsonl", numbers, named, "--grader", "number", "--in_order")
    assert found["accuracy"]["value"] == 1.0 and "(--in_order)" in capsys.readouterr().out
    short = written(tmp_path / "s.jsonl", named[:4])
    assert "has 4 completions for 6 rows" in refused(capsys, *command, short, "--in_order")
    some = written(tmp_path / "m.jsonl", [{"id": "r0", "completion": "1"}, {"completion": "2"}])
    assert "row 1: id None is not among the 6 rows" in refused(capsys, *command, some)


def test_rows_of_one_id_share_no_answers(tmp_path, capsys):
    data = written(
        tmp_path / "d.jsonl",
        [
            {"id": key, "prompt": f"{a}+{a}?", "answer": str(2 * a)}
            for key, a in (("x", 2), ("x", 3), ("y", 1))
        ],
    )
    lines = [{"id": key, "completion": text} for key, text in (("x", "4"), ("x", "6"), ("y", "2"))]
    given = written(tmp_path / "g.jsonl", lines)
    command = ("grade", "--task", "jsonl", "--data_files", data, "--grader", "number", "--completions", given)
    error = refused(capsys, *command)
    assert "2 rows of the data have the id 'x' (rows 0 and 1): give each row its own, or --in_order" in error
    assert (
        graded(tmp_path, "jsonl", data, lines, "--grader", "number", "--in_order")["accuracy"]["value"] == 1.0
    )
    only = graded(tmp_path, "jsonl", data, lines[2:], "--grader", "number")
    assert only["accuracy"]["value"] == 1.0 and only["accuracy"]["n"] == 1


def test_no_command_writes_over_what_it_reads(tmp_path, capsys, numbers, monkeypatch):
    given = written(tmp_path / "c.jsonl", [{"id": "r0", "completion": "1"}])
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    files = ["grade", "--task", "jsonl", "--data_files"]
    grade = [*files, numbers, "--grader", "number", "--completions", given]
    commands = [
        ([*grade, "--rows", given], "--rows"),
        ([*grade, "--json", numbers], "--json"),
        ([*files, "r*.jsonl", "--completions", given, "--rows", numbers], "--rows"),
        ([*files, numbers, "--write_prompts", "rows.jsonl"], "--write_prompts"),
        (["eval", "--task", "jsonl", "--data_files", f"jsonl={numbers}", "--rows", numbers], "--rows"),
        (["probe", "--task", "jsonl", "--data_files", numbers, "--json", numbers], "--json"),
        (["prepare", "--train_file", numbers, "--output", numbers], "--output"),
    ]
    for command, flag in commands:
        error = refused(capsys, *command)
        assert f"error: {flag} " in error and "is a file that is read" in error and "choose another" in error
    error = refused(capsys, *grade, "--rows", "new.jsonl", "--json", "new.jsonl")
    assert "--json new.jsonl is written by --rows too: choose another name." in error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_report_writes_over_nothing_of_its_run(tmp_path, capsys):
    for name in ("results.json", "runs.jsonl"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("{}")
        error = refused(capsys, "report", str(folder), "--out", str(folder / name))
        assert f"--out {folder / name} is a file that is read ({folder}): choose another name." in error
        (folder / "report.html").write_text("old")
        refuse_inputs({"--out": folder / "report.html"}, [str(folder)])
    with pytest.raises(UserError, match=r"--json .* is a file that is read"):
        refuse_inputs({"--json": folder / name}, [None, 3, [str(folder / "*.jsonl")]])
    refuse_inputs({"--out": "/dev/null", "--json": "/dev/null"}, ["x"])


def test_answers_that_failed_are_no_answers(tmp_path, capsys):
    data, answers = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps({"id": i, "prompt": "?", "answer": "5"}) + "\n" for i in range(3)))
    lines = [{"id": 0, "completion": "5"}, {"id": 1, "completion": None, "failed": "HTTP 400: too long"}]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [
        "grade",
        "--task",
        "jsonl",
        "--data_files",
        str(data),
        "--grader",
        "number",
        "--completions",
        str(answers),
    ]
    out = tmp_path / "out.json"
    assert main([*command, "--json", str(out)]) == 0
    assert "1 of 2 lines hold no answer because it failed: not counted." in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["accuracy"]["value"] == 1.0 and found["accuracy"]["n"] == 1
    answers.write_text(json.dumps(lines[1]) + "\n")
    assert main(command) == 2 and "holds failed answers alone" in capsys.readouterr().err
