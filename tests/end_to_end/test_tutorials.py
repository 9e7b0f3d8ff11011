"""The tutorials are run as they stand: from a file to a model that answers, a study, Python."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "tutorials"
UNISD = f"{shlex.quote(sys.executable)} -m unisd"


def blocks(name: str, language: str) -> list[str]:
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def carry_out(name: str, folder: Path) -> dict[str, str]:
    """What each command of a page prints, notes included, by its name, in their order."""
    texts, start = {}, time.monotonic()
    for command in blocks(name, "bash"):
        line = re.sub(r"\bunisd (?=\w)", f"{UNISD} ", command.replace("\\\n", " "))
        run = subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True, timeout=900)
        print(f"{time.monotonic() - start:.0f} s: {command}\n{run.stdout}\n{run.stderr}")
        assert run.returncode == 0, command
        texts[re.findall(r"unisd (\w+)", command)[0]] = run.stdout + run.stderr
    return texts


@pytest.mark.real
def test_from_a_file_to_a_model_that_answers(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "tickets.jsonl", tmp_path / "examples")
    texts = carry_out("own-data", tmp_path)
    assert list(texts) == ["probe", "train", "eval", "report", "chat"]
    assert "read as: messages" in texts["train"] and "recipe: sdft" in (tmp_path / "run.yaml").read_text()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["before"]["task_accuracy"]["n"] == 8 and results["drift"]["kl"]["change"] > 0
    assert [one["name"] for one in results["retention"]] == ["general"]
    right = f"{100 * results['after']['task_accuracy']['value']:.1f} %"
    assert "drift" in texts["train"] and right in texts["train"] and right in texts["eval"]
    assert (tmp_path / "out" / "report.html").is_file() and texts["chat"].partition("note:")[0].strip()


def test_the_rows_of_the_tutorial_are_what_it_says() -> None:
    rows = [json.loads(line) for line in (ROOT / "examples" / "tickets.jsonl").read_text().splitlines()]
    assert len(rows) == 60 and len(blocks("own-data", "bash")) <= 6
    assert all([turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"] for row in rows)
    assert all(row["messages"][2]["content"].endswith("\n" + row["answer"]) for row in rows)
    assert len({row["messages"][1]["content"] for row in rows}) == 60


@pytest.mark.slow
def test_a_first_study(tmp_path: Path) -> None:
    texts = carry_out("mechanisms", tmp_path)
    assert "agreement" in texts["study"] and "clip" in texts["study"]
    assert (tmp_path / "study" / "report.html").is_file()


@pytest.mark.long
@pytest.mark.parametrize("name", ["own-method", "engine-with-tools", "from-trl"])
def test_python_of_a_tutorial(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in blocks(name, "python"):
        exec(compile(block, f"{name}.md", "exec"), scope)


def test_notebooks_are_those_of_their_pages() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "notebooks.py"))
    for name in made["NAMES"]:
        page = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
        assert (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8") == made["notebook"](page), (
            "write it anew: python docs/notebooks.py"
        )
        cells = json.loads(made["notebook"](page))["cells"]
        code = ["".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code"]
        assert code == blocks(name, "python")
