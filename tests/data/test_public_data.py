"""The public functions for data do what the command does with the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from unisd import UniSDConfig, UserError, build_contexts, load_rows
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
    built = build_contexts(rows, kind, num_contexts=2, seed=5)
    assert built == by_command and all(len(row["auxiliary_contexts"]) == 2 for row in built)
    assert build_contexts(built, kind) == built  # rows that have some keep them


def test_contexts_that_a_model_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path))
    rows = load_rows(THEIRS, COLUMNS)
    model, tokenizer = tiny.model(), tiny.tokenizer()
    built = build_contexts(rows, embedder="model", model=model, tokenizer=tokenizer)
    assert all(len(row["auxiliary_contexts"]) == 3 for row in built)
    for options in ({"kind": "induction"}, {"kind": "retrieval", "embedder": "model"}):
        with pytest.raises(UserError, match="give model and tokenizer"):
            build_contexts(rows, **options)
    with pytest.raises(UserError, match="agreement_contexts='nearest' is not one of"):
        build_contexts(rows, "nearest")
    assert build_contexts(rows, "columns") == rows
