"""Runs that are made to go wrong, and healthy ones: which alarm is raised, and when?

`python -m experiments.pocket_alarms`.

Each cell trains the pocket model for 60 steps and measures accuracy on the task and on prior skills
every five steps, so that it can be said whether what was lost (half of an accuracy) had been told
before: the task by the cell's own alarm, prior skills by `forgetting`. Cells become lines of
`diagnostics.jsonl`, and those the table of `diagnostics.md`; cells that are there are not run
again.

| cell | what is wrong | must raise |
|---|---|---|
| `healthy` | nothing | none |
| `collapse` | a live teacher and a rate too high | `collapse` |
| `leak` | the teacher sees the final answer only | `blind teacher` |
| `doubt-lost` | the base doubts aloud, its references do not | `suppressed doubt` |

The base that doubts is :mod:`experiments.pocket_base.hedging`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from experiments.grid import Cell, add_jobs, carry_out
from experiments.pages import update
from unisd.console import markdown_table
from unisd.files import METRICS, is_evaluation, read_lines
from unisd.monitoring import alarms
from unisd.run.inputs import load_data, load_model
from unisd.run.resolve import parse
from unisd.trainer import UniSDTrainer

COMMON = [
    "--recipe",
    "sdft",
    "--diagnostics_probe_steps",
    "2",
    "--save_strategy",
    "no",
    "--record_samples",
    "0",
]
COMMON += [
    "--eval_strategy",
    "steps",
    "--eval_steps",
    "5",
    "--eval_on_start",
    "true",
    "--max_eval_rows",
    "80",
]
LOST = 0.5  # of what it was at the start, on the task or on prior skills
EVERY = 5  # steps whose middle is kept of each watched metric


@dataclass(frozen=True)
class Provocation:
    """Holds flags of `unisd train`, the alarm that must be raised, and how many seeds.

    The alarm None means: no alarm at all.
    """

    flags: tuple[str, ...]
    alarm: str | None
    seeds: int
    hedging: bool = False


PROVOCATIONS = {
    "healthy": Provocation((), None, 5),
    "collapse": Provocation(("--teacher_model_kind", "live", "--learning_rate", "3e-3"), "collapse", 2),
    "leak": Provocation(("--teacher_context", "answer"), "blind teacher", 2),
    "doubt-lost": Provocation((), "suppressed doubt", 2, hedging=True),
}


@dataclass(frozen=True)
class Plan:
    """One cell to run."""

    name: str
    seed: int


def hedging_base(folder: Path) -> Path:
    """Train the base that doubts aloud (or train it on) where it is not there yet: some minutes."""
    from experiments.pocket_base.pretrain import pretrain

    pretrain(folder, resume=True, compile=False, variant="hedging")
    return folder


def run_cell(plan: Plan, base: Path, steps: int | None = None) -> Cell:
    """Train and watch one cell. base: folder of the hedging base, made if need be."""
    provocation = PROVOCATIONS[plan.name]
    limit = [] if steps is None else ["--max_steps", str(steps)]
    with tempfile.TemporaryDirectory() as folder:
        flags = [*COMMON, *provocation.flags, *limit, "--seed", str(plan.seed), "--output_dir", folder]
        options, config = parse(flags)  # with the embedded model's overlay, which suits both bases
        if provocation.hedging:
            options = replace(options, model_name_or_path=str(hedging_base(base)))
        data = load_data(options, config.seed)
        model, tokenizer, _ = load_model(options)
        trainer = UniSDTrainer(
            model,
            config,
            data.train,
            {"task": data.evaluation, "retention": data.retention[0].rows},
            processing_class=tokenizer,
            grader=data.grade,
            probe_dataset=data.retention[0].rows[: config.diagnostics_probe_rows],
        )
        trainer.remove_callback(PrinterCallback)
        clock = time.process_time()
        trainer.train()
        lines = [line for line in read_lines(Path(folder) / METRICS) if not is_evaluation(line)]
        return {
            **asdict(plan),
            "steps": trainer.state.global_step,
            "train_cpu_s": time.process_time() - clock,
            "alarms": [asdict(alarm) for alarm in trainer.health.alarms],
            "curve": curve(trainer.state.log_history),
            "watched": watched(lines),
            "shared_pull": shared_pull(lines),
        }


def curve(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Accuracies by step, from the Trainer's log: those of one step are lines of their own."""
    points: dict[int, dict[str, float]] = {}
    for line in history:
        for part in ("task", "retention"):
            if (value := line.get(f"eval_{part}_accuracy")) is not None:
                points.setdefault(line["step"], {"step": line["step"]})[part] = value
    return [points[step] for step in sorted(points)]


def watched(lines: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """The metrics that alarms look at: the middle of every `EVERY` steps."""
    found: dict[str, list[float | None]] = {}
    for metric in sorted(alarms.WATCHED | {"words/all"}):
        parts = [
            [line[metric] for line in lines[start : start + EVERY] if line.get(metric) is not None]
            for start in starts(lines)
        ]
        found[metric] = [round(alarms.middle(metric, part), 4) if part else None for part in parts]
    return found


def shared_pull(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Compare the teacher's pull under the right and under a wrong reference, over the run.

    By its cosine: as the teacher is told, and told all.
    """
    found = {}
    for told, names in (("as in the run", alarms.PULLS), ("all", alarms.TOLD_ALL)):
        sums = [sum(line.get(name) or 0.0 for line in lines) for name in names]
        if sums[1] and sums[2]:
            found[told] = round(alarms.pull_cosine(*sums), 3)
    return found


def starts(lines: list[dict[str, Any]]) -> range:
    return range(0, len(lines), EVERY)


def lost_at(cell: Cell, part: str) -> int | None:
    """Find the first evaluation at which an accuracy is less than `LOST` of what it was.

    The accuracy is that on a part, `task` or `retention`.
    """
    first = cell["curve"][0]
    return next((int(point["step"]) for point in cell["curve"] if point[part] < LOST * first[part]), None)


def told_at(cell: Cell, alarm: str | None) -> int | None:
    """The step at which an alarm was raised first."""
    return min((int(raised["step"]) for raised in cell["alarms"] if raised["name"] == alarm), default=None)


def passed(cell: Cell) -> bool:
    """Say whether a cell did what it should.

    That is: no alarm came where none should; else the cell's own came, and each loss was told no
    later than it was measured.
    """
    own = PROVOCATIONS[cell["name"]].alarm
    if own is None:
        return not cell["alarms"]
    if told_at(cell, own) is None:
        return False
    for part, alarm in (("task", own), ("retention", "forgetting")):
        lost, told = lost_at(cell, part), told_at(cell, alarm)
        if lost is not None and (told is None or told > lost):
            return False
    return True


def page(cells: list[Cell]) -> str:
    """The table, and what the alarms said."""
    head = [
        "cell",
        "seed",
        "alarms (step)",
        "its own alarm at step",
        "half of the task lost at step",
        "half of the prior skills lost at step",
        "task, %: start, end",
        "prior skills, %: start, end",
    ]
    head += ["words of doubt: start, end", "shared pull", "reported in time"]
    rows, said = [], []
    for cell in sorted(cells, key=lambda cell: (list(PROVOCATIONS).index(cell["name"]), cell["seed"])):
        points = [cell["curve"][0], cell["curve"][-1]]
        task, old = (
            ", ".join(f"{100 * point[part]:.1f}" for point in points) for part in ("task", "retention")
        )
        raised = ", ".join(f"{alarm['name']} ({alarm['step']})" for alarm in cell["alarms"]) or "none"
        own = told_at(cell, PROVOCATIONS[cell["name"]].alarm)
        steps = [
            "-" if step is None else str(step)
            for step in (own, lost_at(cell, "task"), lost_at(cell, "retention"))
        ]
        doubt = ", ".join(f"{cell['watched']['words/all'][place] or 0:.1f}" for place in (0, -1))
        pull = ", ".join(f"{value:.2f}" for value in cell["shared_pull"].values())
        rows.append(
            [
                cell["name"],
                str(cell["seed"]),
                raised,
                *steps,
                task,
                old,
                doubt,
                pull,
                "yes" if passed(cell) else "**no**",
            ]
        )
        if cell["seed"] == 0:
            said += [
                f"- `{cell['name']}`, step {alarm['step']}, {alarm['name']}: {alarm['text']}"
                for alarm in cell["alarms"]
            ]
    legend = (
        f"Accuracies are measured every {EVERY} steps. Words of doubt: per 1,000 tokens, first and last"
        f" {EVERY} steps. Shared pull: cosine of the teacher's pull under the right and under a wrong"
        " reference, with the context of the run; then with the whole reference, if that differs."
    )
    counted = (
        f"{sum(map(passed, cells))} of {len(cells)} cells succeeded: a healthy run raised no alarm;"
        " another raised its own, and each loss was reported in time, on the task by that alarm, on"
        f" prior skills by `forgetting`. There are {total()} cells in total."
    )
    parts = [counted, "\n".join(markdown_table(head, rows)), legend]
    return "\n\n".join([*parts, "With seed 0 the alarms said:", "\n".join(said)] if said else parts)


def total() -> int:
    return sum(provocation.seeds for provocation in PROVOCATIONS.values())


def plans(cells: list[Cell], only: list[str] | None = None) -> Iterator[Plan]:
    """Cells not yet run: the first seed of each first."""
    done = {(cell["name"], cell["seed"]) for cell in cells}
    for seed in range(max(provocation.seeds for provocation in PROVOCATIONS.values())):
        for name, provocation in PROVOCATIONS.items():
            if seed < provocation.seeds and (name, seed) not in done and (not only or name in only):
                yield Plan(name, seed)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("docs/results"), help="where diagnostics.jsonl and the page are"
    )
    parser.add_argument(
        "--base",
        type=Path,
        default=Path("unisd-output/pocket-hedging"),
        help="where the base that doubts is kept",
    )
    parser.add_argument("--only", nargs="*", choices=list(PROVOCATIONS), help="these cells only")
    add_jobs(parser)
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / "diagnostics.jsonl"
    if any(PROVOCATIONS[plan.name].hedging for plan in plans(read_lines(file), args.only)):
        hedging_base(args.base)  # before there are several jobs that would train it
    run = partial(run_cell, base=args.base)
    cells = carry_out(file, partial(plans, only=args.only), run, total(), args.most, args.jobs)
    update(args.folder / "diagnostics.md", "Alarms, provoked", page(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
