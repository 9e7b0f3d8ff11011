"""The benchmark tasks: real rows where the data is at hand, made ones where it is not; splits,
references, graders, refusals.
"""

from __future__ import annotations

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.data import DATA, needs_data
from unisd import tasks
from unisd.cli.contamination import contamination
from unisd.errors import UserError
from unisd.processes import cores
from unisd.tasks import sandbox
from unisd.tasks.code import fenced, mutants
from unisd.tasks.graders.programs import read_program

# task, files, options, rows by split
REAL = [
    (
        "scienceqa",
        "scienceqa/text_only.jsonl.gz",
        {},
        {"train": 6508, "validation": 2144, "test": 2224, "all": 10876},
    ),
    (
        "scienceqa",
        "scienceqa/text_only_full_fields_sample.jsonl.gz",
        {},
        {"train": 520, "validation": 180, "test": 194},
    ),
    ("cos_e", "cose/csqa_cose_v1.11_*.jsonl.gz", {}, {"train": 9741, "validation": 1221, "test": 1221}),
    ("cos_e", "commonsenseqa/*.jsonl.gz", {"short": True}, {"train": 9741, "test": 1221, "all": 10962}),
    ("medmcqa", "medmcqa/validation.jsonl.gz", {}, {"validation": 4183, "test": 4183, "all": 4183}),
    ("toolalpaca", "toolalpaca/eval_simulated.json.gz", {}, {"all": 100}),
    ("gsm8k", "gsm8k/train.jsonl.gz", {}, {"all": 7473}),
]


@pytest.mark.long
@needs_data
@pytest.mark.parametrize(("name", "files", "options", "counts"), REAL)
def test_counts_gold_is_right_and_the_wrong_reference_is_wrong(name, files, options, counts):
    task = tasks.get(name, data_files=str(DATA / files), num_auxiliary_contexts=0, **options)
    for split, count in counts.items():
        rows = task.load(split)
        assert len(rows) == count
        assert len({row["id"] for row in rows}) == count or split == "all"
        assert all(task.grade(row, row["completion"]).correct for row in rows)
        wrong = [row for row in rows if row.get("negative_context")]
        assert not any(task.grade(row, row["negative_context"]).correct for row in wrong)
        assert len(wrong) >= 0.9 * count
    with_contexts = tasks.get(name, data_files=str(DATA / files), **options).load("all", limit=20)
    assert all(len(set(row["auxiliary_contexts"])) == 3 for row in with_contexts)


@needs_data
def test_mbpp_counts_and_splits():
    for file, version, counts in (
        ("mbpp.jsonl", "full", {"prompt": 10, "test": 500, "validation": 90, "all": 974}),
        ("sanitized-mbpp.json", "sanitized", {"prompt": 7, "test": 257, "validation": 43, "all": 427}),
    ):
        task = tasks.get("mbpp", data_files=str(DATA / "mbpp" / file), version=version)
        assert {split: len(task.load(split)) for split in counts} == counts
    ids = {int(row["id"]) for row in task.load("test")}
    assert min(ids) >= 11 and max(ids) <= 510


@pytest.mark.sandbox
@needs_data
@pytest.mark.parametrize(
    ("file", "count"),
    [pytest.param("mbpp.jsonl", 974, marks=pytest.mark.slow), ("sanitized-mbpp.json", 427)],
)
def test_mbpp_references_pass_and_wrong_bodies_do_not(file, count):
    rows = tasks.get("mbpp", data_files=str(DATA / "mbpp" / file)).load("all")

    def verdicts_of(programs):
        with ThreadPoolExecutor(cores()) as pool:  # one needs six seconds on an idle core
            return list(pool.map(lambda program: sandbox.run_program(*program, timeout_s=30.0), programs))

    verdicts = verdicts_of(
        [(row["completion"].removeprefix("```python\n").removesuffix("\n```"), row["tests"]) for row in rows]
    )
    assert [
        (row["id"], v.reason) for row, v in zip(rows, verdicts, strict=True) if not v.passed
    ] == [] and len(rows) == count
    sentinel = "class Sentinel: pass\n"
    bodies = [(sentinel + _emptied(row["completion"]), row["tests"]) for row in rows[:200]]
    assert sum(verdict.passed for verdict in verdicts_of(bodies)) == 0


@pytest.mark.long
@needs_data
def test_mbpp_references_are_found_in_what_surrounds_them():
    for row in tasks.get("mbpp", data_files=str(DATA / "mbpp" / "mbpp.jsonl")).load("all"):
        code = row["completion"].removeprefix("```python\n").removesuffix("\n```")
        for text in (f"Sure:\n{row['completion']}\nIt works.", f"{code}\n", f"```\n{code}"):
            chosen = read_program(text, row["tests"]).chosen
            assert chosen.text == code.rstrip(), (row["id"], chosen)


@pytest.mark.sandbox
@needs_data
def test_references_pass_whole_and_as_the_rest_of_a_stub(tmp_path):
    """Problems of MBPP in HumanEval's form."""
    import ast

    made = []
    for row in tasks.get("mbpp", data_files=str(DATA / "mbpp" / "mbpp.jsonl")).load("all", limit=80):
        code = row["completion"].removeprefix("```python\n").removesuffix("\n```")
        tree = ast.parse(code)
        last = tree.body[-1]
        name = row["tests"].partition("(")[0].removeprefix("assert ")
        if not isinstance(last, ast.FunctionDef) or last.name != name or last.body[0].lineno == last.lineno:
            continue
        lines = code.split("\n")
        body = "\n".join(lines[last.body[0].lineno - 1 :])
        indent = " " * last.body[0].col_offset
        if "\t" in body:
            continue
        checks = "\n".join(f"    {line}" for line in row["tests"].split("\n"))
        made.append(
            {
                "task_id": f"T/{len(made)}",
                "prompt": "\n".join(lines[: last.body[0].lineno - 1]) + f'\n{indent}"""Do it."""\n',
                "canonical_solution": body + "\n",
                "test": f"def check(candidate):\n{checks.replace(name + '(', 'candidate(')}\n",
                "entry_point": name,
            }
        )
    assert len(made) >= 12
    task = tasks.get("humaneval", data_files=write(tmp_path / "h.jsonl", made[:12]))
    bodies = {raw["task_id"]: raw["canonical_solution"] for raw in made}
    for row in task.load("test"):
        body = bodies[row["id"]]
        for text in (row["completion"], body, f"{body}\n\ndef helper(x):\n    return x\n", fenced(body)):
            grade = task.grade(row, text)
            assert grade.correct, (text, grade)
        assert not task.grade(row, "    return object()").correct


def _emptied(reference: str) -> str:
    import ast

    tree = ast.parse(reference.removeprefix("```python\n").removesuffix("\n```"))
    names = [node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return "\n".join(f"def {name}(*args, **kwargs): return Sentinel()" for name in names)


@pytest.mark.sandbox
@needs_data
def test_wrong_programs_fail_their_tests():
    task = tasks.get("mbpp", data_files=str(DATA / "mbpp" / "mbpp.jsonl"))
    rows = task.load("train", limit=12)
    wrong = [row for row in rows if row.get("negative_context")]
    assert len(wrong) >= 8
    assert not any(task.grade(row, row["negative_context"]).correct for row in wrong)
    assert all(task.grade(row, f"Here it is:\n{row['completion']}\nDone.").correct for row in rows[:3])


def test_mutants_change_one_place():
    code = "def f(a, b):\n    # keep me\n    if a < b and a:\n        return a + 2\n    return b\n"
    found = list(mutants(code))
    assert "def f(a, b):\n    # keep me\n    if a <= b and a:\n        return a + 2\n    return b\n" in found
    assert (
        code.replace(" and ", " or ") in found
        and code.replace("+", "-") in found
        and code.replace("2", "3") in found
    )
    assert all(mutant != code for mutant in found)
    assert list(mutants("not python")) == []


@needs_data
@pytest.mark.long
def test_options_are_shuffled_row_by_row_and_never_change():
    task = tasks.get(
        "scienceqa", data_files=str(DATA / "scienceqa" / "text_only_full_fields_sample.jsonl.gz")
    )
    rows = task.load("train", seed=1)
    assert {row["id"]: row["prompt"] for row in rows} == {
        row["id"]: row["prompt"] for row in task.load("train", seed=2)
    }
    letters = [row["answer"] for row in rows if len(row["options"]) == 2]
    assert 0.3 < letters.count("A") / len(letters) < 0.7
    natural = tasks.get(
        "scienceqa",
        data_files=str(DATA / "scienceqa" / "text_only_full_fields_sample.jsonl.gz"),
        subject="language science",
    )
    assert {row["skill"] for row in natural.load("all")} == {"language science"}
    lecture = tasks.get("scienceqa", data_files=task.data_files, lecture=True).load("all")
    assert sum(len(row["prompt"]) for row in lecture) > 2 * sum(
        len(row["prompt"]) for row in task.load("all")
    )


@needs_data
def test_no_split_meets_another():
    for name, files, options, _ in REAL[1:2] + REAL[4:6]:
        task = tasks.get(name, data_files=str(DATA / files), num_auxiliary_contexts=0, **options)
        task.prepare_training()
        train, test = ({row["prompt"] for row in task.load(split)} for split in ("train", "test"))
        assert train and test and len(train & test) <= 0.02 * len(test), name


def write(path: Path, rows: list[dict]) -> str:
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as stream:
        stream.write(
            json.dumps(rows) if ".json" in path.suffixes else "".join(json.dumps(row) + "\n" for row in rows)
        )
    return str(path)


def test_gpqa_and_humaneval_are_for_evaluation_only(tmp_path):
    from unisd.cli.main import main

    rows = [
        {
            "Question": f"Which {i}?",
            "Correct Answer": "yes",
            "Incorrect Answer 1": "no",
            "Incorrect Answer 2": "maybe",
            "Incorrect Answer 3": "never",
            "Record ID": f"r{i}",
            "High-level domain": "Physics",
        }
        for i in range(4)
    ]
    file = write(tmp_path / "gpqa.jsonl", rows)
    task = tasks.get("gpqa", data_files=file)
    assert (
        len(task.load("test")) == 4
        and task.grade(task.load("test")[0], task.load("test")[0]["completion"]).correct
    )
    with pytest.raises(UserError, match="no split 'train'"):
        task.load("train")
    for name in ("gpqa", "humaneval"):
        assert (
            main(["train", "--task", name, "--data_files", file, "--output_dir", str(tmp_path / "out")]) == 2
        )
    with pytest.raises(UserError, match="no subset 'tiny'"):
        tasks.get("gpqa", subset="tiny")


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef double(xs: List[int]) -> List[int]:\n    """Twice each."""\n',
    "canonical_solution": "    return [2 * x for x in xs]\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n",
    "entry_point": "double",
}


@pytest.mark.sandbox
def test_humaneval_takes_a_whole_function_or_a_body(tmp_path):
    task = tasks.get("humaneval", data_files=write(tmp_path / "h.jsonl", [HUMANEVAL]))
    row = task.load("test")[0]
    for right in (
        row["completion"],
        "    return [2 * x for x in xs]",
        "Sure:\n```python\ndef double(xs: List[int]) -> List[int]:\n    return [x + x for x in xs]\n```",
    ):
        assert task.grade(row, right).correct
    for wrong in (
        "    return xs",
        "I can't.",
        "",
        "```python\ndef double(xs): return xs\n```",
        "import sys; sys.exit(0)",
    ):
        assert not task.grade(row, wrong).correct


def test_toolalpaca_training_instances_and_fields(tmp_path):
    record = {
        "Name": "Shop",
        "Instructions": [],
        "Function_Description": {"find": "Find.\nParameters: {}\nOutput: things", "components": ""},
        "Instances": [
            {"input": "Find a pen", "intermediate_steps": [[["find", '{"q": "pen"}', "log"], "result"]]},
            {"input": "Never solved", "intermediate_steps": []},
        ],
    }
    task = tasks.get(
        "toolalpaca", data_files=write(tmp_path / "train_data.json", [record]), short_prompt=True
    )
    (row,) = task.load("all")
    assert row["completion"] == 'Action: find\nAction Input: {"q": "pen"}' and "Output:" not in row["prompt"]
    with pytest.raises(UserError, match="row 0 has no instruction"):
        tasks.get("toolalpaca", data_files=write(tmp_path / "bad.json", [{"Name": "x"}])).load("all")
    with pytest.raises(UserError, match="needs data_files="):
        tasks.get("toolalpaca")


def test_jsonl_task(tmp_path):
    rows = [{"prompt": f"{i}+1?", "answer": str(i + 1), "note": "kept"} for i in range(40)]
    task = tasks.get("jsonl", data_files=write(tmp_path / "r.jsonl", rows), grader="number")
    row = task.load("all")[0]
    assert (
        task.grade(row, "The answer is 1.").correct
        and not task.grade(row, "2").correct
        and row["note"] == "kept"
    )
    assert len(task.load("train")) + len(task.load("test")) == 40
    with pytest.raises(UserError, match="did you mean 'number'"):
        tasks.get("jsonl", data_files="x", grader="nummber")
    with pytest.raises(UserError, match="row 0 has no reply"):
        tasks.get("jsonl", data_files=task.data_files, answer_column="reply").load("all")


def test_gold_of_own_rows_is_read_when_they_are_loaded(tmp_path):
    rows = [
        {"prompt": f"{i}+1?", "answer": answer} for i, answer in enumerate([1, "2", ["3", "three"], "4,5,6"])
    ]
    file = write(tmp_path / "r.jsonl", rows)
    with pytest.raises(UserError, match=r"r\.jsonl, row 3: gold '4,5,6' is not a number: give one number"):
        tasks.get("jsonl", data_files=file, grader="number").load("all")
    task = tasks.get("jsonl", data_files=write(tmp_path / "r.jsonl", rows[:3]), grader="number")
    first, _, third = task.load("all")
    assert task.grade(third, "It is three.").correct and task.grade(third, "3").correct
    assert task.grade(first, "1").correct and third["privileged_context"] == "3"


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("scienceqa", {"question": "x"}),
        ("cos_e", {"id": "1", "question": "x", "choices": ["a", "b"], "answer": "c"}),
        ("medmcqa", {"question": "x", "choices": ["A. a"], "answer": 0}),
        ("mbpp", {"task_id": 1, "code": "x"}),
        ("gpqa", {"Question": "x"}),
        ("humaneval", {"task_id": "x"}),
        (
            "cos_e",
            {
                "id": "1",
                "question": {
                    "stem": "s",
                    "choices": [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}],
                },
            },
        ),
        ("cos_e", {"id": "1", "question": "s", "choices": [1, 2], "answer": "1"}),
        ("medmcqa", {"question": "s", "opa": "a", "opb": "b", "opc": "c", "opd": "d"}),
        ("medmcqa", {"question": "s", "opa": "a", "opb": "b", "opc": "c", "opd": None, "cop": 0}),
        ("scienceqa", {"question": "s", "choices": ["a", "b"], "answer": 0, "hint": 3}),
        ("mbpp", {"task_id": 1, "code": "x", "test_list": ["assert 1"], "text": "t", "test_setup_code": 5}),
        (
            "toolalpaca",
            {
                "Name": "t",
                "Function_Description": {"f": "x"},
                "Instructions": ["i"],
                "Golden_Answers": ["oops"],
            },
        ),
        (
            "gpqa",
            {"Question": "q", "Correct Answer": "a", "Incorrect Answer 1": "b", "Incorrect Answer 2": "c"},
        ),
    ],
)
def test_wrong_fields_are_named_with_their_row(tmp_path, name, row):
    with pytest.raises(UserError, match="row 0"):
        tasks.get(name, data_files=write(tmp_path / "a.jsonl", [row])).load("all")


def test_contamination_finds_exact_and_near_copies():
    train = [
        {"id": i, "prompt": f"How many pens has child number {i} in the big red box?\nAnswer briefly."}
        for i in range(20)
    ]
    long = (
        "A farmer walks to the market with twelve sheep and four goats and sells half of all his animals"
        " before noon on day"
    )
    train.append({"id": "long", "prompt": f"{long} one.\nAnswer briefly."})
    test = [
        {"id": "a", "prompt": "how many pens has child number 3 in the big red box\nAnswer briefly."},
        {"id": "b", "prompt": f"{long} two.\nAnswer briefly."},
        {"id": "c", "prompt": "What is the colour of the sky over the sea?\nAnswer briefly."},
    ]
    report = contamination(train, test)
    assert report.exact == [("a", "3")] and report.near == [("b", "long")] and report.test == 3
    same_id = [{**row, "id": "same"} for row in reversed(train)]  # several solutions of a problem, for one
    report = contamination(same_id, test)
    assert report.exact == [("a", "same")] and report.near == [("b", "same")]


@pytest.mark.long
@needs_data
@pytest.mark.parametrize(
    ("name", "files", "options"),
    [(n, f, o) for n, f, o, c in REAL if "scienceqa" in n or n in ("cos_e", "gsm8k")],
)
def test_contamination_of_real_tasks_is_low(name, files, options, record_property):
    task = tasks.get(name, data_files=str(DATA / files), num_auxiliary_contexts=0, **options)
    report = contamination(task.load("train"), task.load("test"))
    record_property("exact", len(report.exact))
    record_property("near", len(report.near))
    assert len(report.exact) <= 0.05 * report.test


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("gsm8k", {"question": "q{}", "answer": "#### 1"}),
        ("scienceqa", {"question": "q{}", "choices": ["a", "b"], "answer": 0}),
        ("medmcqa", {"question": "q{}", "choices": ["a", "b"], "answer": 0}),
        ("jsonl", {"prompt": "the same", "answer": "1"}),
    ],
)
def test_rows_without_an_id_are_numbered(tmp_path, name, record):
    records = [
        {key: value.format(i) if isinstance(value, str) else value for key, value in record.items()}
        for i in range(30)
    ]
    task = tasks.get(name, data_files=write(tmp_path / "rows.jsonl", records))
    assert [row["id"] for row in task.load("all")] == [str(i) for i in range(30)]
    if name != "jsonl":  # a split keeps the numbers, and what was drawn does not depend on them
        turned = tasks.get(name, data_files=write(tmp_path / "turned.jsonl", records[::-1])).load(
            "train", seed=1
        )
        negatives = {row["prompt"]: (row["negative_context"], str(29 - int(row["id"]))) for row in turned}
        assert negatives == {
            row["prompt"]: (row["negative_context"], row["id"]) for row in task.load("train", seed=1)
        }
