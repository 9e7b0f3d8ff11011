"""The levels of the task `general`: measured part by part, marked at the floor and the ceiling."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from experiments import general_levels as levels
from experiments.grid import read
from unisd.tasks.base import Grade
from unisd.tasks.general import PARTS


def test_parts_are_measured_once_and_written(tmp_path, monkeypatch, capsys):
    asked = []

    def accuracy(model, tokenizer, rows, grade, max_new_tokens):
        asked.append(rows[0]["skill"])
        if len(asked) == 3:
            raise KeyboardInterrupt
        right = {"facts": 34, "arithmetic": 0}.get(asked[-1], 17)
        ids = [[5, 2] if i > 1 else [5, 6] for i in range(len(rows))]  # two are cut
        return {"grades": [Grade(i < right) for i in range(len(rows))], "completion_ids": ids}

    info = SimpleNamespace(parameters=135e6, dtype="torch.float32")
    monkeypatch.setattr(levels, "accuracy", accuracy)
    monkeypatch.setattr(levels, "eos_ids", lambda model, tokenizer: [2])
    monkeypatch.setattr(levels, "load_model_and_tokenizer", lambda name: (None, None, info))
    command = ["some/folder/tiny", "--folder", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        levels.main(command)
    assert [cell["part"] for cell in read(tmp_path / "general.jsonl")] == list(PARTS[:2])
    levels.main(["--folder", str(tmp_path)])
    page = (tmp_path / "general.md").read_text(encoding="utf-8")
    assert "| tiny | 135M | 100 [90, 100] ceiling | 0 [0, 10] floor | - | - | - | - | - | 6 |" in page

    levels.main(command)
    assert asked == [*PARTS[:3], *PARTS[2:]]
    page = (tmp_path / "general.md").read_text(encoding="utf-8")
    assert "| 50 [34, 66] | 50 [43, 57] | 6 |" in page
    monkeypatch.setattr(levels, "version", lambda: "other")
    levels.main(["--folder", str(tmp_path)])
    assert "tiny" not in (tmp_path / "general.md").read_text(encoding="utf-8")
    assert "Items `other`" in capsys.readouterr().out
