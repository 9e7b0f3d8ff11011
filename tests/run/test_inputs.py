"""Rows by `dataset_name`: saved datasets, folders of data files, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets
import pytest

from unisd.config import UniSDConfig
from unisd.errors import UserError
from unisd.run.inputs import hold_out_validation, load_data
from unisd.run.options import RunOptions
from unisd.run.resolve import given_by, train_parser

FIRST = [{"prompt": f"What is {i}?", "privileged_context": f"It is {i}."} for i in range(20)]
SECOND = [{"prompt": f"Who is {i}?", "privileged_context": f"She is {i}."} for i in range(20)]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def prompts(folder: Path, **options: Any) -> set[str]:
    data = load_data(RunOptions(dataset_name=str(folder), **options))
    return {row["prompt"] for row in [*data.train, *data.evaluation]}


def prompts_of(rows: list[dict[str, str]]) -> set[str]:
    return {row["prompt"] for row in rows}


def test_a_saved_dataset(tmp_path: Path) -> None:
    datasets.Dataset.from_list(FIRST).save_to_disk(tmp_path / "one")
    assert prompts(tmp_path / "one") == prompts_of(FIRST)
    with pytest.raises(UserError, match="has no configurations: unset dataset_config"):
        prompts(tmp_path / "one", dataset_config="main")


def test_a_split_of_a_saved_dataset(tmp_path: Path) -> None:
    both = {"train": datasets.Dataset.from_list(FIRST), "more": datasets.Dataset.from_list(SECOND)}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "two")
    assert prompts(tmp_path / "two") == prompts_of(FIRST)
    assert prompts(tmp_path / "two", dataset_train_split="more") == prompts_of(SECOND)
    with pytest.raises(UserError, match="no split 'test': set dataset_train_split to one of train, more"):
        prompts(tmp_path / "two", dataset_train_split="test")
    options = RunOptions(dataset_name=str(tmp_path / "two"), eval_split="more")
    options.check()
    data = load_data(options)
    assert (prompts_of(data.train), prompts_of(data.evaluation)) == (prompts_of(FIRST), prompts_of(SECOND))
    with pytest.raises(UserError, match="no split 'test': set eval_split to one of train, more"):
        prompts(tmp_path / "two", eval_split="test")


def test_files_of_a_folder_are_read_as_they_stand(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.csv").write_text("prompt,completion\na,007\nb,NA\nc,2024-05-13\nd,4\n")
    data = load_data(RunOptions(dataset_name=str(folder)))
    answers = {row["prompt"]: row["completion"] for row in [*data.train, *data.evaluation]}
    assert answers == {"a": "007", "b": "NA", "c": "2024-05-13", "d": "4"}
    (folder / "train.csv").unlink()
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": name, "completion": answer}) + "\n" for name, answer in answers.items())
    )
    data = load_data(RunOptions(dataset_name=str(folder)))
    assert {row["prompt"]: row["completion"] for row in [*data.train, *data.evaluation]} == answers


def test_files_of_a_folder_that_are_not_read_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in FIRST))
    load_data(RunOptions(dataset_name=str(tmp_path)))
    assert "not read" not in caplog.text
    (tmp_path / "more.jsonl").write_text(json.dumps(SECOND[0]) + "\n")
    (tmp_path / "b.csv").write_text("prompt,completion\na,b\n")
    load_data(RunOptions(dataset_name=str(tmp_path)))
    assert f"{tmp_path}: not read: b.csv, more.jsonl (of a folder" in caplog.text


def test_rows_to_report_on_beyond_the_limit_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        lines = (json.dumps({"prompt": f"{name} {n}", "completion": "1"}) + "\n" for n in range(6))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    files = {"train_file": str(tmp_path / "a.jsonl"), "eval_file": str(tmp_path / "b.jsonl")}
    assert len(load_data(RunOptions(**files)).evaluation) == 6 and not caplog.records
    assert len(load_data(RunOptions(**files, max_eval_rows=4)).evaluation) == 4
    told = f'{files["eval_file"]}: the first 4 of 6 rows are reported on; all of them: max_eval_rows="6".'
    assert told in caplog.text


def test_configuration_and_split_of_a_folder_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for name, rows in (("a", FIRST), ("b", SECOND)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs = "".join(
        f"- config_name: {n}\n  data_files:\n  - split: own\n    path: {n}.jsonl\n" for n in ("a", "b")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert prompts(folder, dataset_config="b", dataset_train_split="own") == prompts_of(SECOND)
    assert prompts(folder, dataset_config="a", dataset_train_split="own[:50%]") == prompts_of(FIRST[:10])
    with pytest.raises(UserError, match="cannot be loaded"):
        prompts(folder, dataset_config="c", dataset_train_split="own")


# ---------------------------------------------------------------- several sources, rows held out


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """Files of two layouts; the first problem of one is in the other, too."""
    asked = [{"question": row["prompt"].upper(), "answer": "so"} for row in [FIRST[0], *SECOND]]
    return [write(tmp_path / "a.jsonl", FIRST), write(tmp_path / "b.jsonl", asked)]


def test_several_files(two: list[str], caplog: pytest.LogCaptureFixture) -> None:
    data = load_data(RunOptions(train_file=two), seed=1)
    assert data.name == "a+b" and len(data.train) + len(data.evaluation) == 41
    assert len({row["id"] for row in [*data.train, *data.evaluation]}) == 41
    shared = [
        [row["prompt"].upper() == "WHAT IS 0?" for row in part] for part in (data.train, data.evaluation)
    ]
    assert sorted(map(sum, shared)) == [0, 2]  # one problem is on one side
    kinds = [row["privileged_context"] == "so" for row in data.train]
    assert len(set(kinds[:12])) == 2  # mixed, for max_train_rows
    (first, second) = (kinds.count(False), kinds.count(True))
    assert caplog.messages[-1] == (
        f"training rows, mixed: {first} of {two[0]} ({first} x 1), {second} of {two[1]} ({second} x 1);"
        f" {len(kinds)} in all."
    )
    again = load_data(RunOptions(train_file=two), seed=1)
    assert again.train == data.train != load_data(RunOptions(train_file=two), seed=2).train
    whole = load_data(RunOptions(train_file=two), whole=True).train
    assert [row["prompt"] for row in whole[:20]] == [row["prompt"] for row in FIRST] and len(whole) == 41


def test_weights(two: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    others = write(tmp_path / "other.jsonl", [{"prompt": "Why?", "completion": "So."}])
    options = RunOptions(train_file=two, train_weights=[2.5, 1 / 3], eval_file=others)
    options.check()
    train = load_data(options).train
    counts = Counter(row["prompt"] for row in train if row["privileged_context"] != "so")
    assert sorted(counts.values()) == [2] * 10 + [3] * 10 and len(train) == 50 + 7
    assert "50 of" in caplog.messages[-1] and "(20 x 2.5), 7 of" in caplog.messages[-1]
    assert len(load_data(RunOptions(train_file=two[:1], train_weights=[0.5], eval_file=others)).train) == 10
    with pytest.raises(UserError, match=r"a weight of 0.01 takes no row of the 20 .*a\.jsonl"):
        load_data(RunOptions(train_file=two[:1], train_weights=[0.01], eval_file=others))


def test_rows_that_count_twice_are_validated_on_once(two: list[str], tmp_path: Path) -> None:
    options = RunOptions(train_file=two, train_weights=[2, 3], validation_split=0.2)
    data = load_data(options)
    config = UniSDConfig(str(tmp_path), eval_strategy="steps", use_cpu=True, bf16=False)
    hold_out_validation(data, options, config)
    parts = [[row["id"] for row in part] for part in (data.train, data.validation, data.evaluation)]
    assert all(len(part) == len(set(part)) for part in parts[1:])
    assert not any(set(a) & set(b) for a, b in combinations(parts, 2))


def test_several_datasets(tmp_path: Path) -> None:
    for name, rows in (("a", FIRST), ("b", SECOND)):
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
    names = [str(tmp_path / "a"), str(tmp_path / "b")]
    data = load_data(RunOptions(dataset_name=names, train_weights=[1, 2], eval_split="8"))
    assert len(data.evaluation) == 8 and 32 < len(data.train) < 72


@pytest.mark.parametrize(("split", "count"), [("0.25", 5), (0.25, 5), ("7", 7), (None, 2)])
def test_how_many_rows_are_reported(tmp_path: Path, split: Any, count: int) -> None:
    options = RunOptions(train_file=write(tmp_path / "rows.jsonl", FIRST), eval_split=split)
    options.check()
    data = load_data(options)
    assert (len(data.train), len(data.evaluation)) == (20 - count, count)


def test_no_row_is_held_out_and_not_reported(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", FIRST)
    data = load_data(RunOptions(train_file=file, max_eval_rows=1))
    assert (len(data.train), len(data.evaluation)) == (19, 1)
    for split, told in (("20", "has 20 rows, and no row would be left"), ("0.5", "set --max_eval_rows 10")):
        with pytest.raises(UserError, match=f"eval_split={split}.*{told}"):
            load_data(RunOptions(train_file=file, eval_split=split, max_eval_rows=4))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"train_file": ["a", "b"], "train_weights": [1.0]},
            r"has 1 weights for 2 sources \(a, b\): give one",
        ),
        ({"train_file": "a", "train_weights": [0.0]}, "each must be a number above 0"),
        ({"train_file": ["a", "a"]}, "a is given twice: give it once, and say how often by train_weights"),
        ({"task": "pocket", "train_weights": [1.0]}, "train_weights belongs to your own rows"),
        ({"task": "pocket", "eval_split": "0.1"}, "a task has splits by name: test, validation"),
        ({"train_file": "a", "eval_split": "0.1", "eval_file": "b"}, "eval_file and eval_split exclude"),
        ({"train_file": "a", "eval_split": "test"}, "splits by name belong to dataset_name"),
        ({"train_file": "a", "eval_split": "-1"}, "must be a share between 0 and 1, or a whole number"),
        ({"train_file": "a", "eval_split": "1.5"}, "must be a share between 0 and 1, or a whole number"),
    ],
)
def test_sources_that_contradict(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        RunOptions(**given).check()


def test_they_are_given_as_flags_and_in_a_file(tmp_path: Path) -> None:
    parser = train_parser()
    flags = ["--train_file", "a", "b", "--train_weights", "2", "0.5", "--eval_split", "0.2"]
    (tmp_path / "run.yaml").write_text("train_file: [a, b]\ntrain_weights: [2, 0.5]\neval_split: 0.2\n")
    given = given_by(parser, flags)
    assert given == given_by(parser, ["--config", str(tmp_path / "run.yaml")])
    assert given == {"train_file": ["a", "b"], "train_weights": [2.0, 0.5], "eval_split": "0.2"}
    with pytest.raises(UserError, match=r"--train_file is given twice: .*\(--train_file A B gives several"):
        given_by(parser, ["--train_file", "a", "--train_file", "b"])
