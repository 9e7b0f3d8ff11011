"""Compare every method on the pocket task.

`python -m experiments.pocket_methods [--folder docs/results]`.

One cell is one method, one state of the references (`clean`, or 30 % of them wrong) and one seed;
it is trained in a process of its own and becomes one line of `pocket.jsonl`. Cells that are there
are not run again, so that the command goes on where it was stopped.

How it is kept honest:

- each method's learning rate is chosen among three (of some whose lowest was best also lower ones:
  `FURTHER`), on validation rows, clean references and a seed of its own (`PILOT_SEED`), by points
  gained on the task plus points kept of prior skills; the choice is reused under wrong references;
- `sft-own` is the control: supervised fine-tuning on the same facts in the model's own wording.
  Without it, what supervised fine-tuning forgets could not be told from what its references' style
  costs;
- `fixed-teacher` is the cell that mechanisms are compared with: the initial model as teacher, all
  five mechanisms off;
- an answer counts if it is right in any wording (`PocketTask.knows`), the model's own or an
  annotator's: form is reported apart, or supervised fine-tuning on the annotators' references would
  get nothing for what it knows;
- `sft-graft` is `sft` with a part of its change, chosen on validation rows by the same sum;
- all methods see the same number of optimizer steps and answers, and the same test problems (a
  method that draws eight answers of a prompt sees an eighth of the prompts); the divergence is
  Jensen-Shannon, 0.5, so that a method's row shows its mechanism, but for methods whose recipe has
  its own (OPSD and what is built on it, DemoPSD, AVSD, OASIS).

`experiments.pocket_page` makes the page from the lines.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from experiments.grid import Cell, add_jobs, carry_out
from unisd import recipes
from unisd.evaluation.accuracy import accuracy
from unisd.evaluation.likelihood import gold_ppl
from unisd.evaluation.retention import retention
from unisd.pocket.skills import SKILLS
from unisd.pocket.task import PocketTask, problems
from unisd.run.inputs import RunData, load_data, load_model
from unisd.run.prepare import prepare
from unisd.run.resolve import parse
from unisd.tasks.base import Row
from unisd.trainer import UniSDTrainer

# The comparison's overlay: short enough that all cells end within an evening on two cores. A step
# has 24 answers, of as many prompts but where a method draws several answers of one.
OVERLAY = ["--max_steps", "40", "--gradient_accumulation_steps", "3"]
ANSWERS = 8  # of a micro-batch
SEEDS = (0, 1, 2)
PILOT_SEED = 11
NOISE = {"clean": 0.0, "noisy": 0.3}
N_TEST, N_HARD, N_RETENTION, N_DRIFT = 500, 200, 400, 200
CONTROL, REFERENCE, RAW, GRAFT = "sft-own", "fixed-teacher", "raw", "sft-graft"
# Cells that are no recipe of their own: which recipe they start from, and what they change.
VARIANTS = {
    RAW: ["--recipe", "sft"],
    CONTROL: ["--recipe", "sft", "--reference_style", "own"],
    REFERENCE: ["--recipe", "unisd-ema", "--teacher_model_kind", "base"],
    GRAFT: ["--recipe", "sft"],
}
PILOTS_OF = {GRAFT: "sft"}
"""Methods that take the rate of another's pilots."""
GRAFTED = (0.25, 0.5, 0.75)
"""Parts of the fine-tuned change, of which validation rows choose one."""
SCALES = (0.5, 1.0, 2.0)
# The middle one of three rates. The likelihood of off-policy answers moves a model faster than a
# divergence does.
MIDDLE_RATE = {"sft": 3e-4, CONTROL: 3e-4, "ssd": 3e-4, "rejection-sft": 3e-4}
DEFAULT_RATE = 8e-4
# Lower rates, of methods whose lowest of the three came apart or was best.
FURTHER = {"sdpo": (1e-4, 2e-4), "oasis": (5e-5, 1e-4, 2e-4), "nsd": (1e-4, 2e-4), "rejection-sft": (7.5e-5,)}


@dataclass(frozen=True)
class Plan:
    """One cell to run. `method` is a recipe or one of `VARIANTS` (`raw` is the untouched base)."""

    method: str
    condition: str
    seed: int
    learning_rate: float
    pilot: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(asdict(self).values())


def methods() -> list[str]:
    """All recipes, the control and the reference cell."""
    return [*recipes.names(), CONTROL, REFERENCE, GRAFT]


def rates(method: str) -> list[float]:
    """The learning rates of a method's pilots, three of most."""
    return [*FURTHER.get(method, ()), *(scale * MIDDLE_RATE.get(method, DEFAULT_RATE) for scale in SCALES)]


def arguments(plan: Plan) -> list[str]:
    """The flags of `unisd train` for a cell."""
    method = VARIANTS.get(plan.method, ["--recipe", plan.method])
    noise = ["--noise", str(NOISE[plan.condition])]
    of_one_prompt = recipes.load(method[1]).options.get("num_generations", 1)
    batch = ["--per_device_train_batch_size", str(ANSWERS // of_one_prompt)]
    rate = ["--learning_rate", str(plan.learning_rate)]
    return [*method, *noise, "--seed", str(plan.seed), *rate, *OVERLAY, *batch]


def evaluation_rows(pilot: bool) -> dict[str, list[Any]]:
    """Rows by use. Pilots see validation rows and retention rows that the table never reports."""
    task = PocketTask()
    retention = task.load("retention")
    if pilot:
        return {"task": task.load("validation", limit=N_TEST), "retention": retention[-N_RETENTION:]}
    return {
        "task": task.load("test", limit=N_TEST),
        "hard": task.load("test_hard", limit=N_HARD),
        "retention": retention[:N_RETENTION],
    }


def run_cell(plan: Plan) -> Cell:
    """Train and measure one cell."""
    with tempfile.TemporaryDirectory() as folder:
        options, config = parse([*arguments(plan), "--output_dir", folder])
        data: RunData = load_data(options, config.seed)
        model, tokenizer, _ = load_model(options)
        rows = prepare(data, options, config, partial(load_model, options))
        trainer = UniSDTrainer(model, config, rows, processing_class=tokenizer, grader=data.grade)
        trainer.remove_callback(PrinterCallback)
        clock = time.process_time()
        if plan.method != RAW:
            trainer.train()
        seconds = time.process_time() - clock
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        base = load_model(options)[0]
        grafted = _graft(trainer.model, tokenizer, base) if plan.method == GRAFT else {}
        cell: Cell = {
            **asdict(plan),
            **grafted,
            "train_cpu_s": seconds,
            "peak_mb": peak,
        }
        return cell | _measure(trainer.model, tokenizer, base, plan.pilot)


def _graft(model: Any, tokenizer: Any, base: Any) -> Cell:
    """Leave that part of the change in the model which validation rows choose."""
    trained = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    start = dict(base.named_parameters())

    @torch.no_grad()
    def scaled(scale: float) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(start[name] + scale * (trained[name] - start[name]))

    points = {}
    for scale in GRAFTED:
        scaled(scale)
        found = _measure(model, tokenizer, base, pilot=True)
        points[scale] = found["task_accuracy"] + found["retention_accuracy"]
    best = max(points, key=lambda scale: points[scale])
    scaled(best)
    return {"scale": best}


def knows(task: PocketTask, row: Row, completion: str) -> bool:
    """Say whether the completion is right in any wording.

    That is the model's own (`grade`), or word for word an annotator's.

    `grade` asks for the form that the task asks for; a model that has learnt the annotators'
    wording fails it with what it knows.
    """
    text = " ".join(completion.split())
    return task.grade(row, completion).correct or any(text == " ".join(one.split()) for one in wordings(row))


def wordings(row: Row) -> list[str]:
    """How each annotator words the right answer to a pocket problem."""
    _, split, number = str(row["id"]).split("-")
    problem = problems()[split][int(number)]
    skill = SKILLS[problem.skill]
    return [skill.annotate(problem, problem.values, style) for style in range(skill.styles)]


def _measure(model: Any, tokenizer: Any, base: Any, pilot: bool) -> Cell:
    rows, task, cap = evaluation_rows(pilot), PocketTask(), PocketTask.max_new_tokens
    found: Cell = {}
    for name, part in rows.items():
        answered = accuracy(
            model, tokenizer, part, task.grade, max_new_tokens=cap, batch_size=125, progress=False
        )
        known = [knows(task, row, text) for row, text in zip(part, answered["completions"], strict=True)]
        # One mark per problem, so that methods can be compared problem by problem.
        found[f"{name}_correct"] = "".join(str(int(grade.correct)) for grade in answered["grades"])
        found[f"{name}_known"] = "".join(str(int(mark)) for mark in known)
        found[f"{name}_accuracy"] = sum(known) / len(known)
    found["gold_ppl"] = gold_ppl(model, tokenizer, rows["task"])
    if not pilot:
        moved = retention(
            model,
            base,
            tokenizer,
            rows["retention"][:N_DRIFT],
            max_new_tokens=cap,
            batch_size=125,
            progress=False,
        )
        found |= {f"retention_ppl_{way}": moved[way]["ppl"] for way in ("forward", "reverse")}
        found["retention_jsd"] = moved["reverse"]["jsd"]
    return found


def chosen_rate(cells: list[Cell], method: str) -> float | None:
    """Choose the pilot rate with the most points gained on the task plus points of retention.

    None: pilots are missing.
    """
    method = PILOTS_OF.get(method, method)
    pilots = {cell["learning_rate"]: cell for cell in cells if cell["pilot"] and cell["method"] == method}
    if set(pilots) != set(rates(method)):
        return None
    return float(
        max(pilots, key=lambda rate: pilots[rate]["task_accuracy"] + pilots[rate]["retention_accuracy"])
    )


def plans(cells: list[Cell], only: list[str] | None = None) -> Iterator[Plan]:
    """Cells that may be run now, in order: pilots first, then one seed after the other.

    `cells` may grow meanwhile.
    """
    names = [name for name in methods() if not only or name in only]
    wanted = [Plan(RAW, "clean", 0, 0.0)]
    wanted += [
        Plan(name, "clean", PILOT_SEED, rate, pilot=True)
        for name in dict.fromkeys(PILOTS_OF.get(name, name) for name in names)
        for rate in rates(name)
    ]
    for plan in wanted:
        if plan.key not in _done(cells):
            yield plan
    for seed in SEEDS:
        for condition in NOISE:
            for name in names:
                rate = chosen_rate(cells, name)
                if rate is None:
                    continue  # its pilots are still running
                plan = Plan(name, condition, seed, rate)
                if plan.key not in _done(cells):
                    yield plan


def _done(cells: list[Cell]) -> set[tuple[Any, ...]]:
    return {Plan(**{name: cell[name] for name in Plan.__dataclass_fields__}).key for cell in cells}


def total(only: list[str] | None = None) -> int:
    """Cells of the whole comparison."""
    names = [name for name in methods() if not only or name in only]
    piloted = {PILOTS_OF.get(name, name) for name in names}
    return 1 + sum(len(rates(name)) for name in piloted) + len(names) * len(SEEDS) * len(NOISE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("docs/results"), help="where pocket.jsonl and the page are"
    )
    parser.add_argument("--only", nargs="*", help="these methods only")
    add_jobs(parser)
    args = parser.parse_args(argv)
    if unknown := set(args.only or []) - set(methods()):
        parser.error(f"unknown method {sorted(unknown)[0]}: there are {', '.join(methods())}")
    args.folder.mkdir(parents=True, exist_ok=True)
    only = partial(plans, only=args.only)
    cells = carry_out(args.folder / "pocket.jsonl", only, run_cell, total(args.only), args.most, args.jobs)
    from experiments import pocket_page as comparison

    comparison.write(args.folder, cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())
