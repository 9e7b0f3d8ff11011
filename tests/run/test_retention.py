"""What must not be lost: which sets are asked, what became of their items, drift with its zero."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from unisd import UserError, tasks
from unisd.cli.main import main
from unisd.evaluation.retention import kl
from unisd.run import changes
from unisd.run.options import RunOptions
from unisd.run.retention import RetentionSet, is_of_the_pocket, load_sets

POCKET, REAL = "pocket", "some/model"


def sets(asked: list[str] | None = None, task: Any = None, **options: Any) -> list[RetentionSet]:
    names = {"rows": "retention_rows", "most": "max_eval_rows", "model": "model_name_or_path"}
    given = {"rows": 5, "most": 7, "model": REAL, **options}
    found = {names.get(name, name): value for name, value in given.items()}
    return load_sets(RunOptions(retention=asked, **found), task)


def named(asked: list[str] | None = None, task: Any = None, **options: Any) -> list[tuple[str, int, int]]:
    return [(one.name, len(one.rows), len(one.free)) for one in sets(asked, task, **options)]


def test_a_real_model_is_asked_general_and_the_tasks_own() -> None:
    assert named() == [("general", 5, 2)]
    assert named(task=tasks.get("new_facts")) == [("new_facts", 5, 0), ("general", 5, 2)]
    assert named(task=tasks.get("new_facts"), rows=None)[0] == ("new_facts", 7, 0)
    assert named(rows=None, most=400) == [("general", 120, 30)]
    assert named(rows=None) == [("general", 7, 2)]
    assert named(asked=["none"]) == []
    assert named(asked=["pocket", "general"]) == [("pocket", 5, 0), ("general", 5, 2)]


def test_the_embedded_model_keeps_its_own_skills() -> None:
    assert named(model=POCKET) == [("pocket", 5, 0)]  # also on rows of one's own
    assert named(model=POCKET, task=tasks.get("pocket")) == [("pocket", 5, 0)]
    assert named(model=POCKET, task=tasks.get("pocket"), asked=["general"]) == [("general", 5, 2)]


def test_what_was_trained_from_the_embedded_model_is_asked_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"config": {"model_name_or_path": POCKET}}))
    assert named(model=str(tmp_path)) == [("pocket", 5, 0)]


def test_a_chain_of_runs_ends_at_the_embedded_model(tmp_path: Path) -> None:
    for name, base in (("one", POCKET), ("two", str(tmp_path / "one")), ("round", str(tmp_path / "round"))):
        (tmp_path / name).mkdir()
        config = {"config": {"model_name_or_path": base}}
        (tmp_path / name / "results.json").write_text(json.dumps(config))
    assert is_of_the_pocket(str(tmp_path / "two")) and is_of_the_pocket(str(tmp_path / "two/checkpoint-3"))
    assert not is_of_the_pocket(str(tmp_path / "round")) and not is_of_the_pocket(REAL)


def test_files_are_read_and_graded_as_the_runs_own_rows(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    options = {"A": "iron", "B": "wood"}
    row = {"q": "Which is a metal?", "answer": "iron", "options": options}
    file.write_text(json.dumps(row) + "\n")
    [found] = sets([str(file)], columns="prompt=q", grader="choice")
    assert found.grade is not None and found.grade(found.rows[0], "The answer is A.").correct
    file.write_text(json.dumps({**row, "answer": None}) + "\n")
    with pytest.raises(UserError, match=r"kept.jsonl, line 1: .*needs a column answer"):
        sets([str(file)], columns="prompt=q", grader="choice")


def test_a_set_of_which_nothing_would_be_measured_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    files = [tmp_path / "kept.jsonl", tmp_path / "other" / "kept.jsonl"]
    for file in files:
        file.write_text('{"prompt": "Hello."}\n')
    with pytest.raises(UserError, match="kept has no grader, and drift is measured on general"):
        sets([str(files[0]), "general"])
    with pytest.raises(UserError, match="two sets are called kept"):
        sets([str(file) for file in files])


def test_eval_asks_what_must_not_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    flags = ["--max_eval_rows", "4", "--retention", "general", "--retention_rows", "6", "--base", "pocket"]
    assert main(["eval", *flags, "--json", str(file)]) == 0
    found = json.loads(file.read_text())["tasks"]
    assert list(found) == ["pocket", "general"] and found["general"]["task_accuracy"]["n"] == 6
    assert [found["general"]["drift"][what]["change"] for what in ("reverse", "forward", "kl")] == [0, 0, 0]
    table = capsys.readouterr().out
    assert "general, drift: KL" in table and "general, perplexity" not in table


def test_rows_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    rows = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [plain] = sets([str(file)], rows=None, most=4)
    assert (plain.name, len(plain.rows), plain.grade) == ("kept", 4, None)
    assert plain.probed == plain.rows and "without a grader" in str(plain)
    [graded] = sets([str(file)], rows=3, most=4, grader="number")
    assert graded.grade is not None and len(graded.rows) == 3
    assert graded.grade(graded.rows[2], "It is 3.").correct
    assert not graded.grade(graded.rows[2], "It is 4.").correct


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["none", "general"], "none cannot be combined with others"),
        (["general", "general"], "two sets are called general"),
        (["genral"], "'genral' is neither none, general, a task"),
        (["gone.jsonl"], "'gone.jsonl' is neither none, general, a task"),
    ],
)
def test_what_cannot_be_asked_is_refused(asked: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sets(asked)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (9, 2), (3, 3), (2, 30)])
def test_items_by_mcnemars_exact_test(lost: int, gained: int) -> None:
    before = [True] * lost + [False] * gained + [True] * 4 + [False] * 5
    after = [False] * lost + [True] * gained + [True] * 4 + [False] * 5
    found = changes.items(before, after)
    assert [found[name] for name in ("kept", "lost", "gained", "neither")] == [4, lost, gained, 5]
    expected = stats.binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert found["p"] == pytest.approx(expected, abs=1e-12)


def test_kl_is_what_it_says_and_zero_for_equal_ones() -> None:
    torch.manual_seed(0)
    p, q = (torch.randn(7, 11, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl(p, q), expected)
    assert kl(p, p).eq(0).all()
    p[:, 0] = -torch.inf  # a token that p never says, and q neither
    q[:, 0] = -torch.inf
    assert kl(p, q).isfinite().all()


def detail(reverse: float, nats: float, low: float) -> dict[str, Any]:
    side = {"own_ppl": 2.0, "kl": 0.1, "tokens": 50, "delta": {"value": nats, "low": low, "high": 9.0}}
    return {"n": 3, "reverse": {**side, "ppl": reverse}, "forward": {**side, "ppl": 2.25}}


def test_drift_has_its_zero() -> None:
    found = changes.drift_of(detail(2.5, 0.2, 0.1), "general")
    assert found is not None
    assert found["reverse"] == {"before": 2.0, "after": 2.5, "change": 0.5}
    assert found["forward"] == {"before": 2.0, "after": 2.25, "change": 0.25}
    assert found["kl"] == {"before": 0.0, "after": 0.1, "change": 0.1}
    assert changes.drift_of(None, "general") is None


@pytest.mark.parametrize(
    ("items", "drift", "said"),
    [
        ((50, 1, 1, 8), (2.0, 0.0, -0.1), None),
        ((40, 12, 1, 7), (2.0, 0.0, -0.1), "12 of 52 items of general that were right are lost, 1 gained"),
        ((900, 12, 1, 87), (2.0, 0.0, -0.1), None),  # beyond chance, and too few to matter
        ((3, 3, 0, 4), (2.0, 0.0, -0.1), None),  # not beyond chance
        ((50, 1, 1, 8), (2.5, 0.2, 0.1), "lost 0.20 nats per token (perplexity 2.00 to 2.50)"),
        ((50, 1, 1, 8), (2.5, 0.2, -0.1), None),
        ((50, 1, 1, 8), (2.1, 0.02, 0.01), None),
    ],
)
def test_forgetting_is_said_where_it_is_clear(
    items: tuple[int, int, int, int], drift: tuple[float, float, float], said: str | None
) -> None:
    kept, lost, gained, neither = items
    before = [True] * (kept + lost) + [False] * (gained + neither)
    after = [True] * kept + [False] * lost + [True] * gained + [False] * neither
    found = changes.forgotten(
        [{"name": "general", "items": changes.items(before, after)}],
        changes.drift_of(detail(*drift), "general"),
    )
    assert found is None if said is None else found is not None and said in found and "keep a part" in found


@pytest.mark.long
@pytest.mark.parametrize("kind", [[], ["--use_peft", "--lora_r", "4"]])
def test_a_run_that_changes_nothing_prints_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: list[str]
) -> None:
    flags = ["--recipe", "sft", "--max_steps", "2", "--max_eval_rows", "24", "--learning_rate", "0", *kind]
    assert main(["train", *flags, "--output_dir", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["schema_version"] == 2
    assert [results["drift"][name]["change"] for name in ("reverse", "forward", "kl")] == [0.0, 0.0, 0.0]
    [kept] = results["retention"]
    assert kept["items"] == {"kept": 24, "lost": 0, "gained": 0, "neither": 0, "p": 1.0}
    assert results["acquisition"]["accuracy"]["change"] == 0 and results["alarms"] == []
    table = capsys.readouterr().out
    assert "24 / 0 / 0" in table and "+0.000" in table.split("drift: KL")[1].splitlines()[0]
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "Only forgetting was measured" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.long
def test_a_run_that_ruins_raises_the_alarm_however_short(tmp_path: Path, capsys: Any) -> None:
    flags = ["--recipe", "sft", "--max_steps", "4", "--max_eval_rows", "40", "--learning_rate", "3e-3"]
    assert main(["train", *flags, "--output_dir", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [alarm["name"] for alarm in results["alarms"]] == ["forgetting"]
    assert results["retention"][0]["items"]["lost"] > 20
    assert "alarm at step 4, forgetting" in capsys.readouterr().out
