"""What `unisd grade` says of each answer, and how far it agrees with a person."""

import csv
import json

import pytest

from tests.helpers.commands import without_notes
from unisd.cli.main import main
from unisd.evaluation.grading import bootstrap, outcomes, unsettled, wilson
from unisd.tasks.graders import GRADERS

COUNT = 60


def completion(i):
    if i % 10 == 0:
        return "I don't know."
    if i % 10 == 1:
        return f"The answer is {i} or {i + 1}."
    if i % 10 == 2:
        return f"The answer is {i}."
    return f"We add. The answer is {i} + 1 = {i + 1}, not {i}."


@pytest.fixture
def grade(tmp_path, capsys):
    rows = [{"id": f"r{i}", "prompt": f"What is {i}+1?", "answer": str(i + 1)} for i in range(COUNT)]
    given = [{"id": f"r{i}", "completion": completion(i)} for i in range(COUNT)]
    for name, records in (("rows", rows), ("given", given)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = ["--data_files", str(tmp_path / "rows.jsonl"), "--completions", str(tmp_path / "given.jsonl")]

    def run(*flags, code=0):
        assert main(["grade", "--task", "jsonl", "--grader", "number", *files, *map(str, flags)]) == code
        said = capsys.readouterr()
        return without_notes(said.err) if code else said.out

    return run


def lines_of(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def fill(path, lines):
    with path.open("w", newline="", encoding="utf-8-sig") as stream:  # as a spreadsheet does
        table = csv.DictWriter(stream, list(lines[0]), delimiter=";")
        table.writeheader()
        table.writerows(lines)


def test_outcomes_are_counted_apart(grade, tmp_path):
    said = grade("--json", tmp_path / "f.json")
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["outcomes"] == {"right": 42, "wrong": 6, "unanswered": 6, "ambiguous": 6}
    assert "undecided answers" in said and "6 unanswered, 6 ambiguous" in said
    assert found["extraction_rate"]["value"] == 0.8 and "answer found" in said
    assert unsettled(outcomes([GRADERS["number"]("5", "5")])) == ""


def test_explain_says_what_was_taken_and_what_was_not(grade, tmp_path):
    said = grade("--explain", "--rows", tmp_path / "o.jsonl")
    assert "r0: unanswered\n  taken: nothing (no answer found)\n" in said
    assert "r1: ambiguous\n  taken: nothing (1 or 2 are several numbers)\n" in said
    assert "r2: wrong\n  taken: 2 (stated)\n" in said and "r3: right\n  taken: 4 (stated)\n" in said
    assert max(map(len, said.splitlines())) <= 80
    record = json.loads((tmp_path / "o.jsonl").read_text().splitlines()[1])
    assert (
        record["outcome"] == "ambiguous" and record["passed_over"][0]["why"] == "1 or 2 are several numbers"
    )


def test_an_audit_measures_agreement_with_a_person(grade, tmp_path):
    path = tmp_path / "a.csv"
    assert f"a.csv: 50 of {COUNT} answers. Write right or wrong into its column person" in grade(
        "--audit", path
    )
    lines = lines_of(path)
    assert len(lines) == 50 and list(lines[0])[-1] == "person" and not any(line["person"] for line in lines)
    assert {line["verdict"] for line in lines} == {"right", "wrong", "unanswered", "ambiguous"}
    assert lines[5]["gold"] and lines[5]["completion"].strip() and lines[5]["prompt"].startswith("What is")
    first = path.read_text()
    grade("--audit", path)  # nobody has written anything: the same sample again
    assert path.read_text() == first

    for line in lines[:40]:
        line["person"] = "right" if line["verdict"] == "right" else "wrong"
    lines[3]["person"] = "Wrong" if lines[3]["verdict"] == "right" else "Right"
    fill(path, lines)
    filled = path.read_bytes()
    said = grade("--audit", path)
    assert path.read_bytes() == filled
    agree = wilson(39, 40)
    assert f"agree on 97.5 % [{100 * agree['low']:.1f}, {100 * agree['high']:.1f}] of 40 answers" in said
    assert "(50 in the\n  file)" in said or "(50 in the file)" in said
    assert f"{lines[3]['id']}: person says {lines[3]['person'].lower()}, grader {lines[3]['verdict']}" in said
    both = [(line["verdict"] == "right", line["person"].lower() == "right") for line in lines[:40]]
    graded, person = (sum(side) / 40 for side in zip(*both, strict=True))
    chance = graded * person + (1 - graded) * (1 - person)
    assert f"kappa {(39 / 40 - chance) / (1 - chance):.2f}" in " ".join(said.split())


def test_an_audit_refuses_what_it_cannot_read(grade, tmp_path):
    path = tmp_path / "a.csv"
    grade("--audit", path)
    lines = lines_of(path)
    for change, message in (
        ({"person": "maybe"}, "row 0: person is 'maybe': write right or wrong"),
        ({"person": "right", "id": "zz"}, "id 'zz' is not among the completions"),
        ({"person": "right", "completion": "other"}, "holds another completion"),
    ):
        fill(path, [{**lines[0], **change}, *lines[1:]])
        kept = path.read_bytes()
        said = grade("--audit", path, code=2)
        assert message in said and said.count("\n") == 1 and path.read_bytes() == kept
    path.write_text("a,b\n1,2\n")
    assert "not a table of an audit" in grade("--audit", path, code=2) and path.read_text() == "a,b\n1,2\n"


def test_no_interval_has_width_0():
    for n in (1, 2, 5, 30):
        for value in (0.0, 0.5, 1.0):
            found = bootstrap([value] * n)
            assert found["value"] == value and found["high"] - found["low"] > 0.1
    few = bootstrap([0.25, 1.0])
    assert few["value"] == 0.625 and few["high"] - few["low"] > 0.5
    assert wilson(1, 1)["low"] < 0.3 and wilson(0, 2)["high"] > 0.6


def test_tables_of_a_run_say_how_many_answers_settle_nothing():
    from unisd.run.changes import change_lines

    def side(**counts):
        share = {"value": 0.5, "low": 0.1, "high": 0.9, "n": 4}
        return {
            "task_accuracy": share, "skills": None, "retention": {}, "gold_ppl": None,
            "task_outcomes": counts or None,
        }  # fmt: skip

    def lines(before, after):
        changes = {"acquisition": {"items": None}, "retention": [], "drift": None}
        return change_lines({**changes, "before": before, "after": after})

    settled = side(right=2, wrong=2, unanswered=0, ambiguous=0)
    unsettled = side(right=2, wrong=0, unanswered=1, ambiguous=1)
    line = ["task undecided answers", "1 unanswered, 1 ambiguous", "0", ""]
    assert lines(unsettled, settled)[1] == line
    assert lines(side(), settled)[1:] == []
    assert lines(settled, side())[1:] == []
    assert lines(side(), unsettled)[1] == ["task undecided answers", "-", *line[1:2], ""]
    assert len(lines(side(), settled)) == 1
