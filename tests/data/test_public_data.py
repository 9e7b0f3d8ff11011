"""The public functions for data do what the command does with the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

import unisd
from unisd import UniSDConfig, UserError, load_rows
from unisd import testing as tiny
from unisd.run.inputs import RunData, load_data
from unisd.run.options import RunOptions
from unisd.run.prepare import prepare

THEIRS = [
    {"question": f"How many are {i} and {2 * i} shells?", "answer": f"Together {3 * i}."} for i in range(9)
]
COLUMNS = {"prompt": "question", "completion": "answer"}


def test_rows_are_those_of_the_command(tmp_path: Path) -> None:
    file, columns = tmp_path / "rows.jsonl", "prompt=question,completion=answer"
    file.write_text("".join(json.dumps(row) + "\n" for row in THEIRS))
    rows = load_data(RunOptions(train_file=str(file), columns=columns), whole=True).train
    assert rows[3]["privileged_context"] == "Together 9." and rows[3]["id"] == "3"
    for given in (columns, COLUMNS):
        assert load_rows(file, given) == load_rows(str(file), given) == load_rows(THEIRS, given) == rows
    assert load_rows(Dataset.from_list(THEIRS), COLUMNS) == rows
    assert load_rows([{"prompt": "p"}], needs_reference=False)[0]["prompt"] == "p"
    assert [row["completion"] for row in load_rows(file)] == [row["completion"] for row in rows]
    with pytest.raises(UserError, match=r"has splits: give one of them \(train\)"):
        load_rows(DatasetDict(train=Dataset.from_list(THEIRS)), COLUMNS)


@pytest.mark.parametrize("kind", ["random", "retrieval"])
def test_contexts_are_those_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path))
    rows = load_rows(THEIRS, COLUMNS)
    options = RunOptions(agreement_contexts=kind, explicit=frozenset({"agreement_contexts"}))
    config = UniSDConfig(output_dir=str(tmp_path), use_cpu=True, seed=5, num_auxiliary_contexts=2)
    by_command = prepare(RunData("rows", rows, []), options, config, lambda: (None, None))
    built = unisd.prepare(rows, config, agreement_contexts=kind)
    assert built == by_command and all(len(row["auxiliary_contexts"]) == 2 for row in built)


def test_wrong_references_are_those_of_the_command(tmp_path: Path) -> None:
    rows, config = load_rows(THEIRS, COLUMNS), UniSDConfig(output_dir=str(tmp_path), use_cpu=True, seed=5)
    options = RunOptions(negatives="corrupt")
    by_command = prepare(RunData("rows", rows, []), options, config, lambda: (None, None))
    assert unisd.prepare(rows, config, negatives="corrupt") == by_command
    assert by_command[3]["negative_context"] != by_command[3]["privileged_context"]
    proved = unisd.prepare(rows, config, negatives="corrupt", grader=lambda row, text: row["id"] == "3")
    assert [row["id"] for row in proved if not row.get("negative_context")] == ["3"]  # proved right
    near = unisd.prepare(rows, config, negatives="corrupt", grader=lambda row, text: 0.9)
    assert all(row["negative_context"] for row in near)  # a share below 1 is no right answer


def test_wrong_references_that_a_model_writes_are_graded_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another function would find what the first one has proved under the same name."""
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path))
    rows, loaded = load_rows(THEIRS, COLUMNS)[:2], {"model": tiny.model(), "tokenizer": tiny.tokenizer()}
    monkeypatch.setattr("unisd.run.prepare.WRITTEN_TOKENS", 4)
    for right in (True, False):
        built = unisd.prepare(rows, negatives="model", grader=lambda row, text, right=right: right, **loaded)
        assert all(bool(row.get("negative_context")) != right for row in built)


def test_contexts_that_a_model_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path))
    rows = load_rows(THEIRS, COLUMNS)
    built = unisd.prepare(
        rows, agreement_contexts="retrieval", embedder="model", model=tiny.model(), tokenizer=tiny.tokenizer()
    )
    assert all(len(row["auxiliary_contexts"]) == 3 for row in built)
    for options in (
        {"agreement_contexts": "induction"},
        {"agreement_contexts": "retrieval", "embedder": "model"},
        {"negatives": "model"},
    ):
        with pytest.raises(UserError, match="are made by a model: give model"):
            unisd.prepare(rows, **options)
    with pytest.raises(UserError, match="model or its tokenizer is missing"):
        unisd.prepare(rows, negatives="model", model=tiny.model())
    with pytest.raises(UserError, match="agreement_contexts='nearest' is not one of"):
        unisd.prepare(rows, agreement_contexts="nearest")
    assert unisd.prepare(rows) == rows
