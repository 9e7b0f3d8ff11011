"""Which auxiliary contexts a run uses: by what a recipe says, a task brings and the user says."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from unisd import tasks
from unisd.cli.main import main
from unisd.errors import UserError
from unisd.run.inputs import RunData, load_data
from unisd.run.prepare import prepare
from unisd.run.resolve import parse

Contexts = list[list[str]]


def contexts(rows: list[dict[str, Any]]) -> Contexts:
    return [row.get("auxiliary_contexts") or [] for row in rows]


def prepared(*flags: str, recipe: str = "unisd-star") -> tuple[RunData, Contexts, Contexts]:
    """The data, and the contexts that its rows bring and those that they train with."""
    options, config = parse(["--recipe", recipe, "--model_name_or_path", "some/model", *flags])
    data = load_data(options, config.seed)
    brought = contexts(data.train)
    return data, brought, contexts(prepare(data, options, config, lambda: (None, None)))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def gsm8k(tmp_path: Path) -> list[str]:
    """Problems about three things: the nearest to each are those about the same."""
    things = ["pens on the desk", "miles by train", "euros for bread"]
    records = [
        {
            "question": f"Tom has {100 + i} {things[i % 3]} and then {500 + i} more. How many?",
            "answer": f"He has {100 + i}+{500 + i} = {600 + 2 * i} in all.\n#### {600 + 2 * i}",
        }
        for i in range(30)
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return ["--task", "gsm8k", "--data_files", str(file)]


def write_own(path: Path, count: int = 12, **more: Any) -> list[str]:
    rows = [
        {"prompt": f"What is {i} plus {i}?", "privileged_context": f"It is {2 * i}.", **more}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--train_file", str(path)]


def test_a_recipe_that_says_retrieval_retrieves_on_a_task_that_brings_random_ones(gsm8k: list[str]) -> None:
    data, brought, used = prepared(*gsm8k)
    assert all(brought) and used != brought
    thing = re.compile("pens|miles|euros")
    for row, shown in zip(data.train, used, strict=True):
        about = {found[0] for text in shown if (found := thing.search(text))}
        assert about == set(thing.findall(row["prompt"]))
    assert data.contexts == (
        "auxiliary contexts: retrieval by tfidf, as recipe unisd-star says, in the place of those of task"
        f" gsm8k (random), {len(used)} of {len(used)} rows"
    )


def test_an_option_wins_over_recipe_and_task(gsm8k: list[str]) -> None:
    data, brought, used = prepared(*gsm8k, "--agreement_contexts", "columns")
    assert used == brought and data.contexts == "auxiliary contexts: those of task gsm8k (random)"
    data, brought, used = prepared(*gsm8k, "--agreement_contexts", "random")
    assert used != brought and "random, as agreement_contexts says, in the place of" in data.contexts
    # the words of the task's own template are gone: all are built anew
    assert all(text.startswith("Problem: ") for shown in used for text in shown)


def test_contexts_of_ones_own_rows_stay_unless_the_option_is_given(tmp_path: Path) -> None:
    flags = write_own(tmp_path / "own.jsonl", auxiliary_contexts=["mine", "too"])
    data, brought, used = prepared(*flags)
    assert used == brought == [["mine", "too"]] * len(used)
    assert data.contexts == (
        "auxiliary contexts: the rows' own column auxiliary_contexts; --agreement_contexts retrieval builds"
        " others"
    )
    data, _, used = prepared(*flags, "--agreement_contexts", "retrieval")
    assert all("mine" not in shown and len(shown) == 3 for shown in used)
    assert data.contexts == (
        "auxiliary contexts: retrieval by tfidf, as agreement_contexts says, in the place of the rows' own"
        f" column auxiliary_contexts, {len(used)} of {len(used)} rows"
    )
    jsonl = ["--task", "jsonl", "--data_files", str(tmp_path / "j.jsonl")]
    write_own(tmp_path / "j.jsonl", 40, auxiliary_contexts=["mine", "too"], answer="4")
    assert prepared(*jsonl)[2][0] == ["mine", "too"]


@pytest.mark.parametrize(("recipe", "kind"), [("other-solution", "random"), ("op2sd", "retrieval by tfidf")])
def test_which_other_problem_a_teacher_is_told_is_the_recipes_to_say(recipe: str, kind: str) -> None:
    data, brought, used = prepared("--task", "pocket", recipe=recipe)
    assert all(brought) and all(
        shown and shown[0] not in had for shown, had in zip(used, brought, strict=True)
    )
    assert data.contexts.startswith(f"auxiliary contexts: {kind}, as recipe {recipe} says, in the place of")
    data, brought, used = prepared("--task", "pocket", "--agreement_contexts", "columns", recipe=recipe)
    assert used == brought


def test_rows_without_contexts_get_those_of_the_recipe(tmp_path: Path) -> None:
    data, _, used = prepared(*write_own(tmp_path / "own.jsonl"))
    assert all(len(shown) == 3 for shown in used)
    assert data.contexts == "auxiliary contexts: retrieval by tfidf, as recipe unisd-star says"
    # a weight that looks at contexts asks for them as agreement does
    assert all(prepared(*write_own(tmp_path / "own.jsonl"), recipe="unisd-corroborate")[2])
    assert not any(prepared(*write_own(tmp_path / "own.jsonl"), recipe="unisd-match")[2])


def test_tasks_say_how_they_choose_contexts() -> None:
    files = {"toolalpaca": {"data_files": "train_data.json"}}
    own = {name: tasks.get(name, **files.get(name, {})).contexts for name in tasks.names() if name != "jsonl"}
    assert own.pop("pocket") == "retrieval" and set(own.values()) == {"random"}
    data, brought, used = prepared("--task", "pocket", "--max_train_rows", "8")
    assert used == brought and data.contexts.startswith(
        "auxiliary contexts: those of task pocket (retrieval)"
    )
    data, brought, used = prepared("--task", "new_facts")
    assert used != brought and "in the place of those of task new_facts (random)" in data.contexts


def test_an_embedder_that_is_not_installed_is_one_line(
    gsm8k: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(
        UserError, match=r'needs sentence-transformers: pip install "unisd\[retrieval\]", or use'
    ):
        prepared(*gsm8k, "--embedder", "minilm")


def test_wrong_references_that_rows_bring_stay_and_that_is_said(tmp_path: Path, caplog: Any) -> None:
    flags = write_own(tmp_path / "own.jsonl", negative_context="It is 999.")
    with caplog.at_level(logging.WARNING, logger="unisd"):
        prepared(*flags, "--negatives", "corrupt")
    assert "negatives=corrupt is for rows without a wrong reference" in caplog.text
    assert "rows keep the one that they bring" in caplog.text


def test_prepare_and_the_start_of_a_run_say_which(
    model_dir: Path, gsm8k: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model_name_or_path", str(model_dir)]
    length = ["--max_completion_length", "64"]
    assert main(["prepare", *model, *gsm8k, *length]) == 0
    line = "auxiliary contexts: those of task gsm8k (random); --agreement_contexts retrieval builds others\n"
    assert line in capsys.readouterr().out
    sizes = [*length, "--output_dir", str(tmp_path / "run")]
    own = write_own(tmp_path / "own.jsonl")
    assert main(["train", "--dry_run", *model, *own, *sizes]) == 0
    assert "auxiliary contexts: retrieval by tfidf, as recipe unisd-star says" in capsys.readouterr().out
    assert main(["train", "--dry_run", *model, *own, *sizes, "--recipe", "sft"]) == 0
    assert "auxiliary contexts" not in capsys.readouterr().out
