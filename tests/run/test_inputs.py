"""Rows by `dataset_name`: saved datasets, folders of data files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from unisd.errors import UserError
from unisd.run.inputs import load_data
from unisd.run.options import RunOptions

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
