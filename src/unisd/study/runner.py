"""Carries a study out: each run that the store lacks is a process with a folder of its own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from unisd.errors import UserError
from unisd.run.options import RunOptions, as_list, number_of
from unisd.run.resolve import resolve, train_parser
from unisd.study.design import Cell, Options, Run, Study
from unisd.study.executor import Executor, Job
from unisd.study.store import DONE, FAILED, Record, Store, is_complete

if TYPE_CHECKING:
    from unisd.config import UniSDConfig

CONFIG, LOG = "run.yaml", "run.log"
CACHE = "before"
CALIBRATION_STEPS, CALIBRATION_ROWS = 2, 16
OF_THE_ROWS = (
    *("task", "task_options", "data_files", "train_file", "train_weights", "eval_file", "eval_split"),
    *("columns", "grader"),
)
STOPPED = "(alarms=stop)"  # in the last words of a run that an alarm ended
WEIGHTS = ("*.safetensors", "*.bin", "checkpoint-*")


def resolved(options: Options, where: str) -> tuple[RunOptions, UniSDConfig]:
    """What `unisd train` makes of a run's options; errors call them `where`."""
    parser = train_parser("unisd study")
    return resolve(parser, parser.from_dict(options, where))


def check_runs(runs: Sequence[Run], study: Study) -> None:
    """Resolve the options of every cell as `unisd train` will, before anything runs.

    Raises:
        UserError: options that `unisd train` refuses, or a mechanism that is off in the recipe and
            cannot be studied.
    """
    seen: set[str] = set()
    read: set[str] = set()
    for run in runs:
        text = json.dumps({**run.options, "seed": 0}, sort_keys=True, default=str)
        if text not in seen:
            seen.add(text)
            try:
                options, config = resolved(run.options, f"cell {run.cell.name}")
                _check_rows(options, config.uses_reference, read)
            except UserError as error:
                raise UserError(f"cell {run.cell.name}: {error}") from None
    by_levels = {tuple(run.cell.levels.items()): run for run in runs if run.cell.levels}
    for factor in study.factors:
        example = next(
            (run for run in by_levels.values() if run.cell.levels[factor.name] != factor.baseline), None
        )
        if factor.is_mechanism and example is not None:
            _, with_it = resolved(example.options, "on")
            _, without = resolved({**example.options, **factor.levels[factor.baseline]}, "off")
            if all(
                getattr(with_it, name) == getattr(without, name) for name in factor.levels[factor.baseline]
            ):
                raise UserError(
                    f"mechanism {factor.name} is off in this study's recipe: choose one that has it (recipe:"
                    " unisd-star), or give its options in base."
                )


def _check_rows(options: RunOptions, needs_reference: bool, read: set[str]) -> None:
    """Read the rows of a run from the files that it names, each setting of them once."""
    datasets = as_list(options.dataset_name)
    if options.retention is not None:
        asked = (options.retention, options.retention_rows, options.grader, options.columns, options.task)
        if (text := json.dumps(["retention", asked], default=str)) not in read:
            from unisd.run.inputs import get_task
            from unisd.run.retention import load_sets

            read.add(text)
            load_sets(options, get_task(options) if options.task else None)
    local = bool(datasets) and all(Path(name).exists() for name in datasets)
    if options.train_file is None and options.data_files is None and not local:
        return  # a hub's, or a task that needs none
    named = [*OF_THE_ROWS, *(name for name in vars(options) if name.startswith("dataset_"))]
    data = {name: getattr(options, name) for name in named}
    data["needs_reference"] = needs_reference
    text = json.dumps(data, sort_keys=True, default=str)
    if text not in read:
        from unisd.run.inputs import load_data

        read.add(text)
        load_data(options, needs_reference=needs_reference)


def command_of(run: Run, store: Store) -> tuple[str, ...]:
    """Write the run's configuration file, and return the command that trains it.

    An interrupted run goes on from its checkpoint; one that an alarm has stopped would go on past
    the alarm, and begins anew.
    """
    folder = store.run_folder(run.id)
    folder.mkdir(parents=True, exist_ok=True)
    config = folder.parent / f"{run.id}.yaml"  # beside the folder: a run starts in an empty one
    config.write_text(yaml.safe_dump(run.options, sort_keys=True), encoding="utf-8")
    goes_on = _has_checkpoint(folder) and STOPPED not in store.last_reason(run.id)
    again = "--resume_from_checkpoint" if goes_on else "--overwrite_output_dir"
    where = (
        "--config",
        str(config),
        "--output_dir",
        str(folder),
        "--before_cache",
        str(store.folder / CACHE),
    )
    return (sys.executable, "-m", "unisd", "train", *where, again)


def _has_checkpoint(folder: Path) -> bool:
    if not any(folder.glob("checkpoint-*")):
        return False
    from unisd.training.checkpoints import last_complete_checkpoint

    return last_complete_checkpoint(folder) is not None


def carry_out(
    study: Study,
    runs: Sequence[Run],
    store: Store,
    executor: Executor,
    say: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Run these runs, none of which is in the store; False when the budget ended before all were.

    A failed run is tried `study.retries` more times, then recorded as failed. May be stopped at any
    moment, also by `kill -9`: what had finished is never run again.
    """
    attempts = _Attempts(study, len(runs), store, executor, say, clock)
    waiting, started = list(runs), clock()
    budget = None if study.budget_minutes is None else 60 * study.budget_minutes
    while waiting or attempts.running:
        while (
            waiting
            and len(attempts.running) < executor.slots
            and (budget is None or clock() - started < budget)
        ):
            attempts.start(waiting.pop(0))
        if not attempts.running:
            break
        if (again := attempts.wait()) is not None:
            waiting.insert(0, again)
    return not waiting


@dataclass
class _Attempts:
    """Starts runs, waits for them, and records in the store how each ended."""

    study: Study
    total: int
    store: Store
    executor: Executor
    say: Callable[[str], None]
    clock: Callable[[], float]
    done: int = 0
    running: dict[str, tuple[Run, float]] = field(default_factory=dict)
    """By name, each with the time at which it began."""

    def start(self, run: Run) -> None:
        if is_complete(self.store.run_folder(run.id)):  # killed between its end and its record
            self._record(run, DONE)
            return
        self.running[run.id] = run, self.clock()
        self.store.note(run.id, "started")
        self.executor.submit(Job(run.id, command_of(run, self.store), self._log(run)))

    def wait(self) -> Run | None:
        """Wait until a run has ended; returns it if it failed and is to be tried again."""
        finished = self.executor.wait()
        run, begun = self.running.pop(finished.name)
        if finished.returncode == 0 and is_complete(self.store.run_folder(run.id)):
            self._record(run, DONE)
            return None
        reason = _last_words(self._log(run))
        seconds = self.clock() - begun
        self.store.note(run.id, "failed", returncode=finished.returncode, seconds=seconds, reason=reason)
        # What an alarm has stopped goes wrong again: it is seeded.
        if self.store.failures(run.id) <= self.study.retries and STOPPED not in reason:
            self.say(f"failed, once more: {run.id} ({reason})")
            return run
        self._record(run, FAILED, reason=reason, returncode=finished.returncode)
        return None

    def _record(self, run: Run, status: str, **details: Any) -> None:
        self.done += 1
        attempts = self.store.failures(run.id) + (status == DONE)
        finished = self.store.finish(run, status, attempts=attempts, **details)
        if status == DONE and not self.study.keep_models:
            remove_weights(self.store.run_folder(run.id))
        self.say(f"{self.done}/{self.total}  {_told(finished)}")

    def _log(self, run: Run) -> Path:
        return self.store.run_folder(run.id).parent / f"{run.id}.log"


def remove_weights(folder: Path) -> None:
    """Delete the model of a finished run, unless a study is asked to keep its models."""
    import shutil

    for pattern in WEIGHTS:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _told(record: Record) -> str:
    if record["status"] == FAILED:
        return f"{record['run']} FAILED: {record['reason']}"
    parts = []
    for name in ("task_accuracy", "retention_accuracy"):
        if record[name] is not None:
            parts.append(f"{name.removesuffix('_accuracy')} {100 * record[name]:.1f} %")
    parts.append(f"{record['results']['wall_s']:.0f} s")
    return f"{record['run']}  {', '.join(parts)}"


def _last_words(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "no output"
    return lines[-1][:300] if lines else "no output"


# ---------------------------------------------------------------- how long


def seconds_of_a_run(
    study: Study, runs: Sequence[Run], store: Store, executor: Executor
) -> tuple[float, str]:
    """Estimate the seconds of a run, and name the source of the figure.

    That is the study's file, the runs that have finished, or a calibration run.
    """
    if study.run_s is not None:
        return float(study.run_s), "run_s of the study file"
    done = [record["results"]["wall_s"] for record in store.runs().values() if record["status"] == DONE]
    if done:
        return sum(done) / len(done), f"the mean of {len(done)} finished runs"
    run = max(runs, key=lambda run: _distance(run.cell, study))
    return (
        _calibrate(run, store, executor),
        f"{CALIBRATION_STEPS} steps of {run.cell.name}, the most expensive cell",
    )


def _distance(cell: Cell, study: Study) -> int:
    """Factors off their baseline; none of a control."""
    return sum(cell.levels.get(factor.name, factor.baseline) != factor.baseline for factor in study.factors)


def _calibrate(run: Run, store: Store, executor: Executor) -> float:
    """Time a very short run, and stretch it: load + evaluation by rows + training by steps."""
    from unisd.run.inputs import hold_out_validation, load_data
    from unisd.training.plan import planned_steps

    options, config = resolved(run.options, "calibration")
    short: Options = {
        **run.options,
        "max_steps": CALIBRATION_STEPS,
        "max_eval_rows": CALIBRATION_ROWS,
        "save_strategy": "no",
    }
    if number_of(options.eval_split) is not None:
        short["eval_split"] = None  # it holds out more rows than a calibration has time for
    folder = store.folder / "calibration"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(yaml.safe_dump(short), encoding="utf-8")
    where = ("--config", str(folder / CONFIG), "--output_dir", str(folder / "run"), "--overwrite_output_dir")
    executor.submit(Job("calibration", (sys.executable, "-m", "unisd", "train", *where), folder / LOG))
    if executor.wait().returncode != 0:
        raise UserError(
            f"the calibration run failed: {_last_words(folder / LOG)} (its output: {folder / LOG})."
        )
    results = json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))
    remove_weights(folder / "run")
    data = load_data(options, config.seed, needs_reference=config.uses_reference)
    hold_out_validation(data, options, config)
    steps = planned_steps(config, len(data.train))
    rows = len(data.evaluation) + sum(len(one.rows) for one in data.retention)
    short_rows = results["after"]["n_task"] + results["after"]["n_retention"]
    seconds = results["phases_s"]
    step_s = results["cost"]["train_s"] / CALIBRATION_STEPS
    return float(seconds["load"] + seconds["eval"] * rows / max(short_rows, 1) + step_s * steps)
