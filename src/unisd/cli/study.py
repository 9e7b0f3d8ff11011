"""`unisd study`: arguments in, runs and an analysis out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from unisd.cli.parser import DATA, MEASURED, OUTPUT, CommandParser
from unisd.errors import UserError
from unisd.files import write_whole
from unisd.run.resolve import check_names
from unisd.study import design
from unisd.study.store import FAILED, RUNS, Store, data_of

STUDY_FILE = "study.yaml"
DEFAULT_FOLDER = "unisd-study"


def study_command(arguments: Sequence[str]) -> int:
    """Carry a study out (or go on with it), then analyse it; returns the exit code (1: some runs
    failed for good).

    Raises:
        UserError: a study file that makes no sense, options that `unisd train` refuses, a folder of
            another study.
    """
    parser = study_parser()
    own, of_runs = _split(parser, arguments)
    options = parser.parse(own)
    if options is None:
        return 0
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs {options.jobs}: at least one is needed.")
    if options.analyse:
        if of_runs:
            raise UserError(f"{of_runs[0]} belongs to the runs of a study, which --analyse does not run.")
        if options.folder is None or not (Path(options.folder) / RUNS).is_file():
            raise UserError(
                "--analyse needs the folder of a study that has finished runs: unisd study DIR --analyse."
            )
        return _analyse(Path(options.folder), options.margin)
    if options.folder is not None:
        raise UserError(
            f"{options.folder}: a folder is given with --analyse only; choose where runs go with"
            " --output_dir."
        )
    return _carry_out(options, of_runs, arguments)


def study_parser() -> CommandParser:
    parser = CommandParser(
        "study",
        "Find which mechanisms matter for a task: a design of runs, and effects with intervals.",
    )
    data, measured = parser.under(DATA), parser.under(MEASURED)
    runs, output = parser.under("how it runs"), parser.under(OUTPUT)
    parser.add_argument("folder", nargs="?", metavar="DIR", help="with --analyse: the folder of a study")
    runs.add_argument(
        "--config", metavar="STUDY.yaml", help="the study (see docs/study.md); flags override it"
    )
    output.add_argument(
        "--output_dir",
        help=f"the study's folder; the same again continues (default: {DEFAULT_FOLDER}/NAME)",
    )
    measured.add_argument(
        "--mechanisms", nargs="+", help=f"of {', '.join(design.MECHANISMS)} (unset: all; none with --factor)"
    )
    measured.add_argument(
        "--design", nargs="+", help=f"{', '.join(design.DESIGNS)} (default: one-in leave-one-out)"
    )
    data.add_argument("--tasks", nargs="+", help="built-in tasks (default: those of base; pocket)")
    measured.add_argument(
        "--factor",
        nargs="+",
        action="append",
        metavar="NAME VALUE",
        help="another factor: an option and its values, the baseline first",
    )
    measured.add_argument("--seeds", nargs="+", type=int, help="default: 1 2 3")
    runs.add_argument(
        "--budget_minutes",
        type=float,
        help="start no run after so many minutes; run again to continue",
    )
    runs.add_argument("--run_s", type=float, help="expected seconds per run; unset: a short calibration run")
    output.add_argument("--keep_models", action="store_true", default=None, help="keep every run's weights")
    measured.add_argument(
        "--controls",
        nargs="*",
        help="add the controls that critics ask for, at equal steps and answers: reference-free,"
        " wrong-reference, other-solution, sft, sft-graft, rejection-sft (default: all of them)",
    )
    runs.add_argument("--jobs", type=int, help="runs at once (default: one per GPU, else one per core)")
    runs.add_argument(
        "--executor", choices=("local", "ray"), default="local", help="where runs run (default: local)"
    )
    runs.add_argument("--ray_address", help="a running cluster; unset: a new one on this machine")
    runs.add_argument("--retry_failed", action="store_true", help="run again the runs that failed for good")
    runs.add_argument("--dry_run", action="store_true", help="check and list all runs; run nothing")
    output.add_argument("--analyse", action="store_true", help="only analyse the stored results")
    output.add_argument(
        "--margin", type=float, default=1.0, help="smallest effect that matters, points (default: 1)"
    )
    parser.epilog = (
        "Every option of `unisd train` may be given too, and holds for all runs: --model_name_or_path,"
        " --max_steps, ..."
    )
    return parser


def _split(parser: CommandParser, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A study's own arguments, and those of its runs: flags that it does not have, with their
    values.
    """
    own: list[str] = []
    of_runs: list[str] = []
    target = own
    for argument in arguments:
        if argument.startswith("--"):
            target = own if argument.partition("=")[0] in parser._option_string_actions else of_runs
        target.append(argument)
    return own, of_runs


def _study_of(options: Any, of_runs: Sequence[str]) -> design.Study:
    """The study of the file and the flags, which win.

    Raises:
        UserError: as `design.from_dict`; options that `unisd train` does not have.
    """
    from unisd.files import read_yaml

    names = ("mechanisms", "design", "tasks", "seeds", "budget_minutes", "run_s", "keep_models", "controls")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if given.get("controls") == []:
        given["controls"] = True
    values = {**(read_yaml(Path(options.config)) if options.config else {}), **given}
    further = {"base": _typed(of_runs), "factors": {}}
    for name, *levels in options.factor or ():
        further["factors"][name] = [_typed([f"--{name}", level])[name] for level in levels]
    for name, more in further.items():
        if more and isinstance(values.get(name) or {}, dict):
            values[name] = {**(values.get(name) or {}), **more}
    return design.from_dict(values, options.config or "the flags")


def _typed(flags: Sequence[str]) -> dict[str, Any]:
    """Flags of `unisd train` as a configuration file would hold them."""
    if not flags:
        return {}
    from unisd.options.parser import UNSET
    from unisd.run.resolve import train_parser

    parser = train_parser("unisd study")
    parser.also = {flag.removeprefix("--") for flag in study_parser()._option_string_actions}
    found = parser.given(flags)
    return {name: None if value is UNSET else value for name, value in found.items()}


def _carry_out(options: Any, of_runs: Sequence[str], arguments: Sequence[str]) -> int:
    from unisd.console import loading_libraries

    design.check_installed()
    study = _study_of(options, of_runs)
    runs = design.runs_of(study)
    for option in ("recipe", "task", "grader"):
        check_names({option: [*{str(run.options.get(option)) for run in runs if run.options.get(option)}]})
    with loading_libraries():
        from unisd.study import runner

        runner.check_runs(runs, study)
    _introduce(study, runs)
    if options.dry_run:
        for run in runs:
            print(run.id)
        print("dry run: nothing was run, nothing was written")
        return 0
    name = Path(options.config).stem if options.config else "study"
    folder = Path(options.output_dir or Path(DEFAULT_FOLDER) / name)
    store = Store(folder)
    try:
        _remember(folder, study)
        complete = _run_left(options, study, runs, store)
    except KeyboardInterrupt:
        print(f"\ninterrupted; continue with:\n  unisd study {shlex.join(arguments)}", flush=True)
        return 130
    finally:
        store.close()
    if not complete:
        print(
            f"the budget of {study.budget_minutes:g} minutes is used up; continue with:\n  unisd study"
            f" {shlex.join(arguments)}"
        )
    mine = {run.id for run in runs}
    failed = sum(record["status"] == FAILED for run_id, record in store.runs().items() if run_id in mine)
    if failed:
        print(
            f"{failed} run(s) failed for good: see {folder / 'attempts.jsonl'} and the .log files;"
            " --retry_failed tries again"
        )
    code = _analyse(folder, options.margin)
    return code or int(failed > 0)


def _introduce(study: design.Study, runs: Sequence[design.Run]) -> None:
    """Say what will run."""
    cells = {run.cell.name: run.cell for run in runs}
    models = dict.fromkeys(str(run.options.get("model_name_or_path", "pocket")) for run in runs)
    print(f"{len(runs)} runs: {len(cells)} cells x {len(study.tasks)} tasks x {len(study.seeds)} seeds")
    print(f"cells: {', '.join(cells)}")
    print(f"model: {', '.join(models)}")


def _run_left(options: Any, study: design.Study, runs: Sequence[design.Run], store: Store) -> bool:
    """Run what the store does not hold yet; returns whether the budget was enough."""
    from unisd.study import executor as executors
    from unisd.study import runner

    known = store.runs()
    if options.retry_failed:
        for run in runs:
            if run.id in known and known[run.id]["status"] == FAILED:
                store.note(run.id, "anew")
                del known[run.id]
    _refuse_other_data(known, runs)
    left = [run for run in runs if run.id not in known]
    executor = executors.make(options.executor, options.jobs, options.ray_address)
    try:
        if left:
            seconds, source = runner.seconds_of_a_run(study, left, store, executor)
            minutes = max(1, round(seconds * -(-len(left) // executor.slots) / 60))
            print(
                f"{len(left)} to run, {executor.slots} at once: about {minutes} min ({seconds:.0f} s"
                f" a run, from {source})",
                flush=True,
            )
        return runner.carry_out(study, left, store, executor, lambda line: print(line, flush=True))
    finally:
        executor.close()


def _refuse_other_data(known: Mapping[str, Any], runs: Sequence[design.Run]) -> None:
    """Raise `UserError` if the study has runs on rows that are others now."""
    changed: dict[str, int] = {}
    for run in runs:
        held, now = known.get(run.id, {}).get("data") or {}, data_of(run.options)
        for file in (file for file, mark in held.items() if now.get(file) != mark):
            changed[file] = changed.get(file, 0) + 1
    if changed:
        file, count = max(changed.items(), key=lambda item: item[1])
        raise UserError(
            f"{file} has changed since {count} run(s) of this study, which cannot be compared with new ones:"
            " give another --output_dir, or put the file back."
        )


def _remember(folder: Path, study: design.Study) -> None:
    """Keep the study's description in its folder; refuse to mix two studies."""
    path = folder / STUDY_FILE
    factors = {factor.name: list(factor.levels) for factor in study.factors}
    if path.exists():
        earlier = design.load(path)
        if {
            factor.name: list(factor.levels) for factor in earlier.factors
        } != factors or earlier.base != study.base:
            raise UserError(
                f"{folder} holds a study of other factors or another base: choose another --output_dir."
            )
        if earlier.source == study.source:
            return
    write_whole(path, yaml.safe_dump(study.source, sort_keys=False))  # the study reads it again


def _analyse(folder: Path, margin: float) -> int:
    from unisd.study import analysis, recommend

    study = design.load(folder / STUDY_FILE)
    found = analysis.analyse(study, Store(folder, writes=False), margin)
    if found is None:
        print("nothing to analyse yet: no run has finished")
        return 0
    recommend.write(folder, study, found)
    for line in recommend.console_lines(found):
        print(line)
    print(f"written to {folder}: analysis.md, analysis.json, recommended.yaml; see it: unisd report {folder}")
    return 0
