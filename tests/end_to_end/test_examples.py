"""What the quickstart and the examples promise is run."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from benchmarks import newcomer
from unisd.cli.main import main

ROOT = Path(__file__).parents[2]


def test_python_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "quickstart.md", "exec"), {})
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.long
@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_what_a_newcomer_types(page: str, tmp_path: Path) -> None:
    """Every command of the page, in its order and in one folder; trainings are cut short."""
    short = " --max_steps 2 --max_eval_rows 4 --max_completion_length 16"
    typed = newcomer.typed(ROOT / page)
    rows = newcomer.carry_out([one + short * one.startswith("unisd train") for one in typed], tmp_path)
    assert {row["impl"].split()[1] for row in rows} == {"train", "probe", "eval", "report", "chat"}
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.long
def test_the_page_for_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its blocks are one script."""
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/python.md", "exec"), names)
    assert "retention: pocket" in capsys.readouterr().out and (tmp_path / "out" / "config.json").is_file()


@pytest.mark.long
def test_a_weight_from_outside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["custom_weight.py", "--max_steps", "2", "--output_dir", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / "custom_weight.py"), run_name="__main__")
    assert "mean weight" in capsys.readouterr().out
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < line["weight/sure_teacher/mean"] < 1


@pytest.mark.long
def test_every_mechanism_is_active_in_the_default_run(tmp_path: Path) -> None:
    assert main(["train", "--max_steps", "3", "--max_eval_rows", "4", "--output_dir", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["agreement/range"] > 0 for line in lines)
    assert all(line["contrastive/active_share"] > 0 for line in lines)
    assert all(line["clip/share"] > 0 for line in lines)
    assert lines[-1]["teacher/weight_distance"] > 0
    assert all(line["features/distance"] > 0 for line in lines[1:])


@pytest.mark.long
def test_a_target_from_outside_the_package(tmp_path: Path) -> None:
    """The worked example of docs/field.md, with the test that it carries; short enough to be an
    afternoon's work.
    """
    path = ROOT / "examples" / "next_paper.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    example = runpy.run_path(str(path))
    example["test_arithmetic"]()
    trainer = example["main"](str(tmp_path), max_steps=1)
    assert list(map(str, trainer.plan.sources)) == ["teacher/plain"]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_a_term_from_outside_the_package(tmp_path: Path) -> None:
    path = ROOT / "examples" / "custom_term.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    example = runpy.run_path(str(path))
    example["test_squared"]()
    trainer = example["main"](str(tmp_path), max_steps=1)
    assert [term.name for term in trainer.plan.terms] == ["squared"]
    [line] = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line["term/squared/mean"] > 0 and 0 < line["term/squared/active_share"] <= 1
