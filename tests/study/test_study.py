"""Designs, the store and the runner of a study: what is run, what is kept, and what a kill may
cost.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.studies import FakeExecutor, carried_out, study, write_run
from unisd.cli import study as command
from unisd.cli.main import main
from unisd.errors import UserError
from unisd.files import append_line, read_lines
from unisd.run.inputs import load_data
from unisd.run.resolve import parse
from unisd.study import analysis, recommend, runner
from unisd.study.design import Study, cells_of, from_dict, load, runs_of
from unisd.study.executor import Finished, Job, LocalExecutor
from unisd.study.store import DONE, FAILED, Store


def test_designs_name_their_cells() -> None:
    names = [cell.name for cell in cells_of(from_dict({}))]
    assert names[0] == "reference" and len(names) == 12
    assert {"+agreement", "-agreement", "all"} <= set(names)
    assert len(runs_of(from_dict({}))) == 36
    one = from_dict({"mechanisms": ["ema"], "design": "list", "cells": [{}, {"ema": True}, {"ema": "on"}]})
    assert [cell.name for cell in cells_of(one)] == ["reference", "+ema"]


def test_the_extra_is_asked_for_before_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "statsmodels" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    assert main(["study", "--output_dir", str(tmp_path / "study")]) == 2
    assert capsys.readouterr().err.endswith('needs statsmodels: pip install "unisd[study]".\n')
    assert not (tmp_path / "study").exists()


def test_runs_differ_by_everything_that_defines_them() -> None:
    first, other = runs_of(study()), runs_of(study(base={"max_steps": 3}))
    ids = [run.id for run in first + other]
    assert len(set(ids)) == len(ids) and ids == [
        run.id for run in runs_of(study()) + runs_of(study(base={"max_steps": 3}))
    ]
    assert [run.seed for run in first] == [1] * 4 + [2] * 4, "seed by seed"
    off = next(run for run in first if run.cell.name == "reference")
    assert off.options["teacher_model_kind"] == "base" and off.options["token_clip"] is None
    two = study(tasks=["pocket", {"train_file": "rows/sums.jsonl"}])
    assert [run.task for run in runs_of(two)[::4]] == ["pocket", "sums"] * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mechanism": ["ema"]}, "unknown key 'mechanism'"),
        ({"mechanisms": ["emma"]}, "unknown mechanism 'emma'"),
        ({"design": "half"}, "unknown design 'half'"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"seeds": "1"}, "seeds must be a list"),
        ({"factors": {"learning_rate": [1e-4]}}, "two levels"),
        ({"factors": {"learning_rate": 1e-4}}, "list of values"),
        ({"base": {"seed": 3}}, "base must not set seed"),
        ({"base": {"hub_token": "hf_x"}}, "leave it out, and set HF_TOKEN"),
        ({"tasks": [{"task": "pocket", "hub_token": "hf_x"}]}, "leave it out, and set HF_TOKEN"),
        ({"design": "list", "cells": [{"emma": "on"}]}, "emma=on is not a level"),
    ],
)
def test_mistakes_are_told(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(values)


def test_options_are_checked_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["study", "--output_dir", str(tmp_path / "s")]
    file = tmp_path / "study.yaml"
    file.write_text("base: {recipe: sdft}\nmechanisms: [agreement]\n")
    assert main([*arguments, "--config", str(file)]) == 2
    assert "agreement is off in this study's recipe" in capsys.readouterr().err
    file.write_text("base: {max_stepps: 3}\n")
    assert main([*arguments, "--config", str(file)]) == 2
    assert "did you mean max_steps" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    assert main([*arguments, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("36 runs: 12 cells x 1 tasks x 3 seeds") and "model: pocket\n" in said
    assert main([*arguments, "--dry_run", "--analyse", str(tmp_path), "--max_steps", "3"]) == 2
    assert "--max_steps belongs to the runs" in capsys.readouterr().err
    assert main([*arguments, "--hub_token", "hf_secret"]) == 2 and not (tmp_path / "s").exists()
    said = capsys.readouterr().err
    assert "set HF_TOKEN, which its runs inherit" in said and "hf_secret" not in said


@pytest.mark.long
def test_the_sweep_of_rates_chooses_on_validation_rows(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).parents[2] / "examples" / "rate-sweep.yaml"
    assert main(["study", "--config", str(file), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "9 runs: 3 cells x 1 tasks x 3 seeds" in shown
    runs = runs_of(load(file))
    assert all(run.id in shown for run in runs)
    assert {str(run.options["learning_rate"]) for run in runs} == {"3e-4", "6e-4", "0.0012"}
    chosen, reported = (
        load_data(parse(["--max_eval_rows", "8", "--max_train_rows", "8", *split])[0])
        for split in (["--eval_split", "validation"], [])
    )
    for rows in ("evaluation", "kept"):
        parts = [
            data.evaluation if rows == "evaluation" else data.retention[0].rows for data in (chosen, reported)
        ]
        prompts = [{row["prompt"] for row in part} for part in parts]
        assert len(prompts[0]) == 8 and prompts[0].isdisjoint(prompts[1])
    for flags, told in (
        (["--eval_split", "train"], "would report on training rows"),
        (["--eval_split", "dev"], "dev"),
        (
            ["--eval_split", "validation", "--train_file", "rows.jsonl"],
            "splits by name belong to dataset_name",
        ),
    ):
        with pytest.raises(UserError, match=told):
            load_data(parse(flags)[0])


def test_flags_of_the_runs_are_the_studys_base() -> None:
    def asked(*arguments: str) -> Study:
        parser = command.study_parser()
        own, of_runs = command._split(parser, arguments)
        options = parser.parse(own)
        assert options is not None
        return command._study_of(options, of_runs)

    found = asked(
        "--max_steps", "3", "--seeds", "1", "--token_clip=none", "--factor", "learning_rate", "1e-4", "2e-4"
    )
    assert found.base == {"max_steps": 3, "token_clip": None} and found.seeds == [1]
    assert [factor.levels for factor in found.factors] == [
        {"0.0001": {"learning_rate": 1e-4}, "0.0002": {"learning_rate": 2e-4}}
    ]
    with pytest.raises(UserError, match="did you mean"):
        asked("--max_stepps", "3")
    with pytest.raises(UserError, match="two levels"):
        asked("--factor", "learning_rate", "1e-4")


def test_everything_runs_once_and_weights_go(tmp_path: Path) -> None:
    executor = FakeExecutor()
    complete, store = carried_out(tmp_path, study(), executor)
    assert complete and len(executor.submitted) == len(set(executor.submitted)) == 8
    assert all(record["status"] == DONE and record["attempts"] == 1 for record in store.runs().values())
    assert not list(tmp_path.rglob("*.safetensors"))
    again = FakeExecutor()
    assert carried_out(tmp_path, study(), again)[0] and not again.submitted
    assert len(read_lines(tmp_path / "runs.jsonl")) == 8


def test_a_failed_run_is_tried_once_more_and_then_recorded(tmp_path: Path) -> None:
    unlucky, hopeless = runs_of(study())[1].id, runs_of(study())[2].id
    executor = FakeExecutor(fails={unlucky: [1], hopeless: [1, -9]})
    complete, store = carried_out(tmp_path, study(), executor)
    assert complete and executor.submitted.count(unlucky) == executor.submitted.count(hopeless) == 2
    runs = store.runs()
    assert (runs[unlucky]["status"], runs[unlucky]["attempts"]) == (DONE, 2)
    assert (runs[hopeless]["status"], runs[hopeless]["reason"]) == (FAILED, "unisd: error: this is why")
    assert [
        line["returncode"] for line in read_lines(tmp_path / "attempts.jsonl") if line["event"] == "failed"
    ] == [1, 1, -9]


def test_a_run_that_an_alarm_stopped_is_not_tried_again(tmp_path: Path) -> None:
    stopped = runs_of(study())[1].id
    executor = FakeExecutor(fails={stopped: [2, 2]})
    executor.last_words = (
        "unisd: error: stopped at step 9 by the alarm 'collapse' (alarms=stop): lower the rate."
    )
    _, store = carried_out(tmp_path, study(), executor)
    assert executor.submitted.count(stopped) == 1
    assert store.runs()[stopped]["status"] == FAILED and "'collapse'" in store.runs()[stopped]["reason"]


def test_a_run_that_an_alarm_stopped_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the checkpoint that the alarm has saved it would go on as if all were well."""
    monkeypatch.setattr(runner, "_has_checkpoint", lambda folder: True)
    store, (run, other) = Store(tmp_path, writes=False), runs_of(study())[:2]
    assert runner.command_of(run, store)[-1] == "--resume_from_checkpoint"
    store.note(run.id, "failed", reason="stopped at step 9 by the alarm 'collapse' (alarms=stop): lower it.")
    assert runner.command_of(run, store)[-1] == "--overwrite_output_dir"
    store.note(other.id, "failed", reason="out of memory")
    assert runner.command_of(other, store)[-1] == "--resume_from_checkpoint"


def test_a_study_does_not_go_on_with_other_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{}")
    spec = study(base={"train_file": str(file)})
    _, store = carried_out(tmp_path / "study", spec, FakeExecutor())
    command._refuse_other_data(store.runs(), runs_of(spec))
    file.write_text("{} ")
    with pytest.raises(UserError, match=r"rows\.jsonl has changed since 8 run\(s\) of this study"):
        command._refuse_other_data(store.runs(), runs_of(spec))
    earlier = {name: {**record, "data": None} for name, record in store.runs().items()}
    command._refuse_other_data(earlier, runs_of(spec))  # of a version that kept none


def test_a_long_level_makes_a_name_that_a_folder_can_have() -> None:
    long = {"prompt": {"a": {}, "\u00e4" * 300: {"teacher_prompt_template": "{prompt} {privileged_context}"}}}
    names = [run.id for run in runs_of(study(factors=long, mechanisms=[]))]
    assert max(len(name.encode()) for name in names) < 200 and len({*names}) == len(names)


def test_a_run_that_ended_before_its_record_is_not_run_again(tmp_path: Path) -> None:
    run = runs_of(study())[0]
    write_run(Store(tmp_path, writes=False).run_folder(run.id), run.options)
    executor = FakeExecutor()
    assert (
        carried_out(tmp_path, study(), executor)[0]
        and run.id not in executor.submitted
        and len(executor.submitted) == 7
    )


def test_a_budget_ends_a_study_that_goes_on_later(tmp_path: Path) -> None:
    clock = iter(range(1000))
    complete, store = carried_out(
        tmp_path, study(budget_minutes=0.1), FakeExecutor(), clock=lambda: float(next(clock))
    )
    assert not complete and 0 < len(store.runs()) < 8
    assert carried_out(tmp_path, study(), FakeExecutor())[0]


def test_ctrl_c_costs_the_runs_in_progress_only(tmp_path: Path) -> None:
    class Interrupted(FakeExecutor):
        def wait(self) -> Finished:
            if len(self.submitted) == 5:
                raise KeyboardInterrupt
            return super().wait()

    first, second = Interrupted(), FakeExecutor()
    with pytest.raises(KeyboardInterrupt):
        carried_out(tmp_path, study(), first)
    done = set(Store(tmp_path, writes=False).runs())
    assert len(done) == 3
    assert carried_out(tmp_path, study(), second)[0] and not done & set(second.submitted)


def test_two_processes_do_not_share_a_study(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(UserError, match="another process"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


def test_a_torn_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append_line(path, {"run": "a"})
    with path.open("ab") as file:
        file.write(b'{"run": "b", "re')
    assert read_lines(path) == [{"run": "a"}]
    append_line(path, {"run": "c"})
    assert read_lines(path) == [{"run": "a"}, {"run": "c"}]


@pytest.mark.long
def test_pandas_reads_the_store_and_the_analysis_finds_the_effect(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    spec = study(seeds=[1, 2, 3])
    _, store = carried_out(tmp_path, spec, FakeExecutor())
    table = pd.read_json(tmp_path / "runs.jsonl", lines=True)
    assert len(table) == 12 and table.groupby("cell").task_accuracy.mean()["+ema"] > table.task_accuracy.min()
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(spec.source))
    assert main(["study", str(tmp_path), "--analyse", "--margin", "2"]) == 0  # what 40 problems can rule out
    found = json.loads((tmp_path / "analysis.json").read_text())["tasks"]["pocket"]
    effects = {(line["kind"], line["name"], line["outcome"]): line for line in found["effects"]}
    ema = effects["main", "ema", "task_accuracy"]
    runs = {record["run"]: record for record in store.runs().values()}
    by_hand = [
        record["task_accuracy"] * (1 if "ema" in record["cell"] or record["cell"] == "all" else -1)
        for record in runs.values()
    ]
    assert ema["value"] == pytest.approx(100 * sum(by_hand) / 6) and ema["low"] > 0
    assert effects["main", "clip", "train_s"]["value"] == pytest.approx(50.0)
    assert effects["main", "clip", "flops"]["value"] == pytest.approx(50.0)
    assert {line["name"]: line["verdict"] for line in found["verdicts"]}["ema"] == "keep"
    ends = {"+ema+clip": 1, "reference": -1}
    whole = sum(ends.get(r["cell"], 0) * r["task_accuracy"] for r in runs.values()) / 3
    shares = [effects["shapley", name, "task_accuracy"]["value"] for name in ("ema", "clip")]
    assert sum(shares) == pytest.approx(100 * whole)
    options = yaml.safe_load((tmp_path / "recommended.yaml").read_text())
    assert "teacher_model_kind" not in options and options["token_clip"] is None
    assert main(["train", "--config", str(tmp_path / "recommended.yaml"), "--dry_run"]) == 0
    text = (tmp_path / "analysis.md").read_text()
    assert "| ema | +" in text and "## " in text


@pytest.mark.long
def test_only_runs_of_the_study_as_it_is_are_analysed(tmp_path: Path) -> None:
    """A level's options or the seeds may be changed in a study's file; runs of before stay in the
    store.
    """
    factors = {"teacher": {"slow": {"learning_rate": 1e-4}, "fast": {"learning_rate": 2e-4}}}
    first = study(mechanisms=[], factors=factors)
    carried_out(tmp_path, first, FakeExecutor())
    store = Store(tmp_path, writes=False)
    changed = study(
        mechanisms=[], factors={"teacher": {**factors["teacher"], "fast": {"learning_rate": 9e-4}}}
    )
    found = analysis.analyse(changed, store)
    assert (
        found is not None
        and found["tasks"]["pocket"]["runs"] == 2
        and found["tasks"]["pocket"]["effects"] == []
    )
    assert found["notes"][-1].startswith("2 runs of the store have other settings")
    one_seed = analysis.analyse(study(mechanisms=[], factors=factors, seeds=[1]), store)
    assert (
        one_seed is not None
        and one_seed["tasks"]["pocket"]["seeds"] == [1]
        and one_seed["tasks"]["pocket"]["runs"] == 2
    )
    assert "do not include training noise" in one_seed["notes"][0]
    assert "training noise is not in the interval" in recommend.markdown(one_seed)


def test_the_study_file_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command._remember(tmp_path, study())
    written = (tmp_path / "study.yaml").read_text()

    def fails(*_: Any, **__: Any) -> str:
        raise OSError("full")

    monkeypatch.setattr(command.yaml, "safe_dump", fails)
    command._remember(tmp_path, study())  # nothing has changed, so nothing is written
    with pytest.raises(OSError, match="full"):
        command._remember(tmp_path, study(seeds=[1, 2, 3]))
    assert (tmp_path / "study.yaml").read_text() == written


@pytest.mark.long
def test_a_page_elsewhere_links_to_the_runs_and_names_what_failed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder, hopeless = tmp_path / "study", runs_of(study())[2].id
    folder.mkdir()
    command._remember(folder, study())
    carried_out(folder, study(), FakeExecutor(fails={hopeless: [1, 1]}))
    assert (
        main(["report", str(folder), "--no_run_pages", "--out", str(tmp_path / "elsewhere" / "x.html")]) == 0
    )
    page = (tmp_path / "elsewhere" / "x.html").read_text()
    done = runs_of(study())[0].id
    assert f'href="../study/runs/{done}/results.json"' in page
    assert hopeless in page and "unisd: error: this is why" in page
    found = analysis.analyse(study(), Store(folder, writes=False))
    assert found is not None and f"- {hopeless} failed: unisd: error: this is why" in recommend.markdown(
        found
    )


def test_pareto_front() -> None:
    cells = [
        {"name": name, "gain": gain, "retention_change": kept}
        for name, gain, kept in (
            ("a", 10.0, -5.0),
            ("b", 8.0, -1.0),
            ("c", 7.0, -2.0),
            ("d", 10.0, -6.0),
            ("e", None, 0.0),
        )
    ]
    assert analysis.pareto(cells) == ["a", "b"]


SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


def test_local_executor_ends_its_jobs(tmp_path: Path) -> None:
    executor = LocalExecutor(2)
    executor.submit(
        Job("short", (sys.executable, "-c", "print('words'); raise SystemExit(3)"), tmp_path / "a.log")
    )
    executor.submit(
        Job(
            "long",
            (sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"),
            tmp_path / "b.log",
        )
    )
    assert executor.wait() == Finished("short", 3) and (tmp_path / "a.log").read_text() == "words\n"
    while not (tmp_path / "b.log").read_text().endswith("\n"):
        time.sleep(0.05)
    executor.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "b.log").read_text()), 0)


def test_what_a_job_has_started_ends_with_it(tmp_path: Path) -> None:
    """A server or other ranks, also where the job itself ignores the signal."""
    executor = LocalExecutor(1)
    child = (
        "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True);"
        " time.sleep(60)"
    )
    code = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    executor.submit(Job("job", (sys.executable, "-c", code), tmp_path / "job.log"))
    while not (tmp_path / "job.log").read_text().endswith("\n"):
        time.sleep(0.05)
    executor.close()
    left, end = int((tmp_path / "job.log").read_text()), time.monotonic() + 10
    while time.monotonic() < end and Path(f"/proc/{left}").exists():
        if "Z" in Path(f"/proc/{left}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    assert not Path(f"/proc/{left}").exists()


PARENT = """
import sys, time
from pathlib import Path
from unisd.study.executor import Job, LocalExecutor
executor = LocalExecutor(1)
code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
executor.submit(Job("child", (sys.executable, "-c", code), Path(sys.argv[1])))
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="children are bound to their parent on Linux only")
def test_children_die_with_a_killed_study(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(log)])
    while not (log.exists() and log.read_text().endswith("\n")):
        assert parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    child, end = int(log.read_text()), time.monotonic() + 10
    while (
        time.monotonic() < end
        and Path(f"/proc/{child}").exists()
        and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]
    ):
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]


KILLED = """
import sys
from pathlib import Path
from unisd.study import runner
from unisd.study.design import from_dict, runs_of
from unisd.study.executor import LocalExecutor
from unisd.study.store import Store
calm, folder = map(Path, sys.argv[1:])
spec = from_dict({"mechanisms": ["ema", "clip"], "seeds": [1, 2], "design": "full"})
real = runner.command_of
def command_of(run, store):
    command = real(run, store)
    code = "import shutil, sys, time; time.sleep(0.3)"
    code += "; names = ('metrics.jsonl', 'answers.json', 'results.json')"
    code += "; [shutil.copy(f'{sys.argv[1]}/{n}', f'{sys.argv[2]}/{n}') for n in names]"
    there = command[command.index("--output_dir") + 1]
    return (sys.executable, "-c", code, str(calm / "runs" / run.id), there)
runner.command_of = command_of
store = Store(folder)
left = [run for run in runs_of(spec) if run.id not in store.runs()]
raise SystemExit(not runner.carry_out(spec, left, store, LocalExecutor(1)))
"""


@pytest.mark.long
def test_a_study_killed_at_any_moment_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """The runs are stand-ins here; `test_kills_change_nothing` has real ones."""
    carried_out(tmp_path / "calm", study(), FakeExecutor())
    rng, kills = random.Random(2), 0
    while True:
        finished = len(read_lines(tmp_path / "killed" / "runs.jsonl"))
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "calm"), str(tmp_path / "killed")]
        )
        if kills == 5:
            assert process.wait(120) == 0
            break
        # Some moment after one more run has ended: within the next one, or while it is recorded.
        while len(read_lines(tmp_path / "killed" / "runs.jsonl")) == finished:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.35))
        process.kill()
        process.wait()
        kills += 1
    calm, killed = (read_lines(tmp_path / name / "runs.jsonl") for name in ("calm", "killed"))
    assert kills >= 5 and len(killed) == len(calm) == 8, "no finished run was run again"

    def lasting(records: list[dict[str, Any]]) -> dict[str, Any]:
        return {record["run"]: [record["status"], record["answers"], record["results"]] for record in records}

    assert lasting(killed) == lasting(calm)


SMALL = """
base: {max_steps: 10, per_device_train_batch_size: 4, gradient_accumulation_steps: 1,
       max_eval_rows: 8, max_train_rows: 32}
mechanisms: [ema]
design: one-in
seeds: [1, 2]
run_s: 10
"""


def lasting(folder: Path) -> dict[str, Any]:
    """What a study found, without times and folders."""
    found = {}
    for record in read_lines(folder / "runs.jsonl"):
        results = record["results"]
        found[record["run"]] = [
            record["status"],
            record["answers"],
            results["before"],
            results["after"],
            results["steps"],
        ]
    return found


@pytest.mark.real
@pytest.mark.slow
def test_kills_change_nothing(tmp_path: Path) -> None:
    """4 runs of 10 steps on the pocket, the study killed with -9 at random moments, five times at
    least.
    """
    file = tmp_path / "study.yaml"
    file.write_text(SMALL)

    def command(folder: str) -> list[str]:
        where = ["--output_dir", str(tmp_path / folder)]
        return [sys.executable, "-m", "unisd", "study", "--config", str(file), "--jobs", "1", *where]

    start = time.perf_counter()
    subprocess.run(command("calm"), check=True)
    a_run = (time.perf_counter() - start) / 4
    rng = random.Random(5)
    kills = 0
    while kills < 40:
        process = subprocess.Popen(command("killed"))
        try:
            # The first ones soon, the later ones with time to finish a run, however slow the
            # machine is.
            process.wait(rng.uniform(0.1, 0.6) * a_run if kills < 5 else rng.uniform(1, 4) * a_run)
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert process.returncode == 0 and kills >= 5
    calm, killed = lasting(tmp_path / "calm"), lasting(tmp_path / "killed")
    assert len(calm) == 4 and killed == calm
    assert len(read_lines(tmp_path / "killed" / "runs.jsonl")) == 4, "no finished run was run again"


@pytest.mark.real
@pytest.mark.slow
def test_ray_gives_the_same_and_retries_a_killed_worker(tmp_path: Path) -> None:
    """The same 4 runs on a Ray cluster of 2 workers, one of which is killed while it runs."""
    ray = pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    file = tmp_path / "study.yaml"
    file.write_text(SMALL)
    where = ["--config", str(file), "--jobs"]
    assert main(["study", *where, "1", "--output_dir", str(tmp_path / "local")]) == 0
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        cluster = ["--executor", "ray", "--ray_address", ray.get_runtime_context().gcs_address]
        ours = ["2", "--output_dir", str(tmp_path / "ray"), *cluster]
        process = subprocess.Popen([sys.executable, "-m", "unisd", "study", *where, *ours])
        victim = None
        while victim is None and process.poll() is None:
            trains = [
                p
                for p in psutil.process_iter(["cmdline"])
                if str(tmp_path / "ray" / "runs") in " ".join(p.info["cmdline"] or [])
            ]
            victim = next(
                (p.parent() for p in trains if p.parent() is not None and p.parent().pid != process.pid), None
            )
            time.sleep(0.2)
        assert victim is not None
        victim.kill()
        assert process.wait() == 0
    finally:
        ray.shutdown()
    assert lasting(tmp_path / "ray") == lasting(tmp_path / "local")
    assert [line["event"] for line in read_lines(tmp_path / "ray" / "attempts.jsonl")].count("failed") == 1
