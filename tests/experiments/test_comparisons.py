"""The commands behind `docs/results`: what is run, in which order, what a page says of it, and that
nothing is run twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import grid as store
from experiments import pocket_methods as compare
from experiments import pocket_page as comparison
from experiments import smollm2 as evidence
from experiments import smollm2_page as evidence_page
from experiments.pages import between_markers
from unisd.errors import UserError
from unisd.pocket.task import PocketTask
from unisd.tasks import get
from unisd.tasks.new_facts import NewFactsTask


def pocket_cell(plan: compare.Plan, rng: np.random.Generator) -> store.Cell:
    cell: store.Cell = {**plan.__dict__, "train_cpu_s": 1.0, "peak_mb": 100.0, "gold_ppl": 2.0}
    for name, count in (("task", 40), ("hard", 8), ("retention", 20)):
        marks = rng.random(count) < (0.3 if plan.method == "raw" else 0.5 + 100 * plan.learning_rate)
        text = "".join(str(int(m)) for m in marks)
        cell |= {f"{name}_correct": text, f"{name}_known": text, f"{name}_accuracy": float(marks.mean())}
    return cell | {"retention_ppl_forward": 1.1, "retention_ppl_reverse": 1.2, "retention_jsd": 0.01}


@pytest.mark.long
def test_the_pocket_comparison_runs_every_cell_once_and_pilots_first() -> None:
    rng, cells = np.random.default_rng(0), []
    for plan in compare.plans(cells):
        cells.append(pocket_cell(plan, rng))
    assert (
        len(cells)
        == compare.total()
        == len({json.dumps({k: c[k] for k in compare.Plan.__dataclass_fields__}) for c in cells})
    )
    assert list(compare.plans(cells)) == []
    kinds = [cell["pilot"] for cell in cells[1:]]
    assert kinds == sorted(kinds, reverse=True)
    pilot_seeds = {cell["seed"] for cell in cells if cell["pilot"]}
    assert pilot_seeds == {compare.PILOT_SEED} and not pilot_seeds & set(compare.SEEDS)
    for method in compare.methods():
        used = {cell["learning_rate"] for cell in cells if cell["method"] == method and not cell["pilot"]}
        assert used == {compare.chosen_rate(cells, method)}
    own = []
    for name in comparison.PAGES:
        text = comparison.page(cells, "figure.svg", comparison.of_page(name))
        shown = {method for method in compare.methods() if f"| {method} |" in text}
        assert shown == set(comparison.of_page(name)) and "30 % wrong" in text
        own += comparison.own_methods(name)
    assert sorted(own) == sorted(compare.methods())


def test_knowledge_is_graded_in_any_wording() -> None:
    task = PocketTask()
    for row in task.load("test", limit=40):
        assert all(compare.knows(task, row, text) for text in compare.wordings(row))
        assert not compare.knows(task, row, row["negative_context"])
    own = PocketTask(reference_style="own")
    assert all(
        compare.knows(task, row, row["completion"]) and task.grade(row, row["completion"])
        for row in own.load("test", limit=40)
    )


@pytest.mark.long
def test_pilots_and_table_share_no_rows() -> None:
    pilot, table = compare.evaluation_rows(True), compare.evaluation_rows(False)
    ids = {row["id"] for rows in table.values() for row in rows}
    assert len(table["task"]) >= 500
    assert not ids & {row["id"] for rows in pilot.values() for row in rows}


@pytest.mark.parametrize("method", compare.methods())
def test_cells_of_the_pocket_comparison_are_valid_runs(method: str) -> None:
    from unisd.run.resolve import parse

    options, config = parse(compare.arguments(compare.Plan(method, "noisy", 1, 1e-3)))
    assert config.learning_rate == 1e-3 and options.noise == 0.3 and config.max_steps == 40
    assert (options.reference_style == "own") == (method == compare.CONTROL)


@pytest.mark.long
def test_a_cell_of_the_pocket_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "OVERLAY", [*compare.OVERLAY[:1], "1", *compare.OVERLAY[2:]])
    for name in ("N_TEST", "N_HARD", "N_RETENTION", "N_DRIFT"):
        monkeypatch.setattr(compare, name, 8)
    cell = compare.run_cell(compare.Plan("sdft", "clean", 0, 1e-3))
    assert len(cell["task_correct"]) == 8 and cell["train_cpu_s"] > 0 and cell["peak_mb"] > 100
    assert cell["retention_ppl_reverse"] >= 1


@pytest.mark.long
def test_a_grafted_cell_keeps_a_part_of_the_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "OVERLAY", [*compare.OVERLAY[:1], "1", *compare.OVERLAY[2:]])
    for name in ("N_TEST", "N_HARD", "N_RETENTION", "N_DRIFT"):
        monkeypatch.setattr(compare, name, 8)
    monkeypatch.setattr(compare, "GRAFTED", (0.0,))
    cell = compare.run_cell(compare.Plan(compare.GRAFT, "clean", 0, 1e-3))
    assert cell["scale"] == 0.0 and cell["retention_jsd"] == pytest.approx(0, abs=1e-6)  # the base again


def whose(plan: int) -> store.Cell:
    return {"process": os.getpid(), "plan": plan}


def breaks(plan: int) -> store.Cell:
    raise SystemExit(plan)


@pytest.mark.long
def test_a_cell_runs_in_a_process_of_its_own() -> None:
    cells = [store.run_apart(whose, plan) for plan in (1, 2)]
    assert [cell["plan"] for cell in cells] == [1, 2]
    assert len({os.getpid(), *(cell["process"] for cell in cells)}) == 3
    with pytest.raises(UserError, match="exit code 3"):
        store.run_apart(breaks, 3)


def at_work(plan: tuple[int, str]) -> store.Cell:
    """Leaves a mark while it runs, and tells how many were at work."""
    number, folder = plan
    if number == 4:
        raise SystemExit(number)
    mark = Path(folder) / str(number)
    mark.touch()
    time.sleep(1)
    count = len(list(Path(folder).iterdir()))
    mark.unlink()
    return {"number": number, "at_work": count, "threads": torch.get_num_threads()}


@pytest.mark.long
def test_cells_run_beside_each_other_and_wait_for_what_they_need(tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()

    def plans(cells: list[store.Cell], last: int = 3) -> Iterator[tuple[int, str]]:
        done = {cell["number"] for cell in cells}
        ready = [
            number for number in range(last + 1) if number not in done and (number < 2 or {0, 1} <= done)
        ]
        yield from ((number, str(tmp_path / "marks")) for number in ready)

    file = tmp_path / "cells.jsonl"
    cells = store.carry_out(file, plans, at_work, 4, None, jobs=2)
    assert {cell["number"] for cell in cells[:2]} == {0, 1} and len(cells) == 4 and store.read(file) == cells
    assert max(cell["at_work"] for cell in cells) == 2
    assert {cell["threads"] for cell in cells} == {max(1, (os.cpu_count() or 1) // 2)}
    with pytest.raises(UserError, match="exit code 4"):  # and the one beside it is kept
        store.carry_out(file, partial(plans, last=5), at_work, 6, None, jobs=2)
    assert sorted(cell["number"] for cell in store.read(file)) == [0, 1, 2, 3, 5]


def sleeps(file: str) -> store.Cell:
    Path(file).write_text(str(os.getpid()))
    time.sleep(60)
    return {}


PARENT = """
import os
import sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
from pathlib import Path
from tests.experiments.test_comparisons import sleeps
from experiments import grid as cells
if __name__ == "__main__":
    cells.carry_out(Path(sys.argv[2]), lambda cells: [sys.argv[3]], sleeps, 1, None)
"""


@pytest.mark.long
def test_a_killed_comparison_leaves_no_cell_at_work(tmp_path: Path) -> None:
    script, file, mark = tmp_path / "parent.py", tmp_path / "cells.jsonl", tmp_path / "mark"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(script), os.pathsep.join(sys.path), str(file), str(mark)])
    while not (mark.exists() and mark.read_text()):
        assert parent.poll() is None
        time.sleep(0.1)
    with pytest.raises(UserError, match="another process runs the cells"):
        store.carry_out(file, lambda cells: [], sleeps, 1, None)
    parent.kill()
    parent.wait()
    child, end = Path(f"/proc/{mark.read_text()}"), time.monotonic() + 30
    while time.monotonic() < end and child.exists():
        time.sleep(0.05)
    assert not child.exists()
    assert store.carry_out(file, lambda cells: [], sleeps, 1, None) == []


@pytest.mark.long
def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        difficulty = rng.random(300)
        marks = (rng.random((3, 300)) < difficulty).astype(float)
        value, low, high = comparison.interval(marks, seed=trial)
        assert low <= value <= high
        covered += low <= 0.5 <= high
    assert covered >= 180


def test_a_line_cut_short_is_no_cell_and_spoils_no_other(tmp_path: Path) -> None:
    file = tmp_path / "cells.jsonl"
    store.append(file, {"a": 1})
    file.write_text(file.read_text() + '{"a": 2', encoding="utf-8")
    assert store.read(file) == [{"a": 1}]
    store.append(file, {"a": 3})
    assert store.read(file) == [{"a": 1}, {"a": 3}]


def test_what_a_person_wrote_around_the_tables_stays() -> None:
    assert between_markers("mine\nA\nold\nB\nmine too", "A", "B", "new") == "mine\nA\nnew\nB\nmine too"
    with pytest.raises(UserError, match="no lines"):
        between_markers("mine", "A", "B", "new")


def test_new_facts_are_never_asked_as_they_were_trained() -> None:
    task = get("new_facts")
    splits = {split: task.load(split) for split in ("train", "validation", "test")}
    assert [len(rows) for rows in splits.values()] == [72, 24, 48]
    prompts = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    for row in splits["train"] + splits["test"]:
        assert task.grade(row, row["completion"]) and not task.grade(row, row["negative_context"])
        assert [bool(task.grade(row, text)) for text in row["candidates"]] == [True, False, False, False]
        assert not any(row["privileged_context"] in context for context in row["auxiliary_contexts"])
    assert len(task.retention_rows()) == 60
    assert all(task.grade(row, f"It is {row['answers'][0]}.") for row in task.retention_rows())


def test_evidence_plans_run_once_and_its_page_shows_both_comparisons() -> None:
    cells: list[store.Cell] = []
    for plan in evidence.plans(cells, "new_facts", "smollm2-135m", 120, 48, ()):
        learnt = {"raw": 0, "sft": 40, "opsd-ectr": 0}.get(plan.method, 20)
        points = [
            {
                "step": step,
                "train_cpu_s": step * 1.0,
                "fit_ppl": 2.0,
                "retention_ppl_reverse": 1.0 + step / 100,
                **{
                    name: ("1" * round(learnt * step / plan.steps)).ljust(48, "0")
                    for name in ("task_correct", "knowledge_correct")
                },
                "form_right": "1" * 48,
                "general_correct": "1" * 60,
            }
            for step in (range(20, plan.steps + 1, 20) if not plan.pilot else (plan.steps,))
        ] or [{}]
        record = {name: value for name, value in plan.__dict__.items() if name != "data_files"}
        cells.append({**record, "curve": points, "peak_mb": 1000.0})
    assert len(cells) == 1 + 5 + 15
    assert not list(evidence.plans(cells, "new_facts", "smollm2-135m", 120, 48, ("elsewhere",)))
    settings = {(cell["method"], cell["alpha"], cell["learning_rate"]) for cell in cells if not cell["pilot"]}
    alpha, rate = evidence.best_pilot(cells, "new_facts", "sdft") or (None, None)
    assert {
        ("sdft", alpha, rate),
        ("unisd-star", alpha, rate),
        ("demopsd", 1.0, rate),
        ("opsd-ectr", 0.0, rate),
    } < settings
    text = evidence_page.page(cells)
    assert "| sft | 3 | 120 | 83.3" in text and "| sft | 60 | 41.7" in text and "**sdft**" in text
    # A method that learns nothing sets no mark for the others.
    assert "The best that all of these reach is 41.7 %" in text and "| opsd-ectr | 20 |" not in text
    # Time and memory are those of the device that most cells ran on.
    mixed = [{**cell, "device": "gpu"} for cell in cells]
    for cell in mixed:
        if cell["method"] == "sft" and cell["seed"]:
            cell |= {
                "device": "cpu",
                "peak_mb": 9.0,
                "curve": [{**point, "train_cpu_s": 9e9} for point in cell["curve"]],
            }
    assert evidence_page.page(mixed) == text
    # Another model has pilots of its own, and a table of its own.
    first = list(evidence.plans(cells, "new_facts", "other/model", 120, 48, ()))
    assert first and all(plan.pilot or plan.method == "raw" for plan in first)
    other = {
        **cells[-1],
        "model": "other/model",
        "curve": [{**point, "task_correct": "0" * 48} for point in cells[-1]["curve"]],
    }
    both = evidence_page.page([*cells, other])
    assert "## New facts: other/model, 120 steps, 48 rows\n\n1 of 21 cells" in both
    assert (
        both.replace(both[both.index("## New facts: other/model") : both.index("## New facts: smollm2")], "")
        == text
    )


@pytest.mark.long
def test_evidence_goes_on_from_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path))
    flags = evidence.SHARED_FLAGS
    place = flags.index("--save_steps") + 1
    monkeypatch.setattr(evidence, "SHARED_FLAGS", [*flags[:place], "1", *flags[place + 1 :]])
    monkeypatch.setattr(evidence, "EVERY", 1)
    few = NewFactsTask().retention_rows(4)
    monkeypatch.setattr(NewFactsTask, "retention_rows", lambda self, limit=None, seed=0: few)
    plan = evidence.Plan("new_facts", "sdft", 0, 0.5, 1e-3, False, "pocket", 2, 4)
    seen: list[int] = []
    examine = evidence.Examiner.__call__

    def stops(self: evidence.Examiner, model: object) -> store.Cell:
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return examine(self, model)

    monkeypatch.setattr(evidence.Examiner, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        evidence.run_cell(plan)
    cell = evidence.run_cell(plan)
    assert [point["step"] for point in cell["curve"]] == [1, 2] and len(seen) == 3
    assert len(cell["curve"][0]["task_correct"]) == 4 and cell["retention_ppl_forward"] >= 1
    assert not list((tmp_path / "evidence").iterdir())
