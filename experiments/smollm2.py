"""Does it help a real model?

`python -m experiments.smollm2 {new_facts,scienceqa} [--data_files F] [--folder docs/results]`.

Adapts SmolLM2-135M-Instruct (another with --model) by supervised fine-tuning, plain
self-distillation, UniSD* and two later recipes, three seeds each, at equal numbers of optimizer
steps, and evaluates every 20 steps, so that methods can be compared at equal steps and at equal
gain. Divergence and learning rate are chosen by pilots of 30 steps on validation rows, with a seed
of their own: the setting with the most points gained on the task plus points kept of general
knowledge. UniSD* takes the setting of plain self-distillation; the later recipes take its rate and
keep their published divergence.

Each finished cell is a line of `smollm2.jsonl`; a cell that was stopped goes on from its last
checkpoint. `experiments.smollm2_page` makes the page. Hours on two cores; on a GPU --steps, --rows
and --model take it to the published size.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from experiments.grid import Cell, add_jobs, append, carry_out, read
from unisd.data.prompts import encode_completion, encode_prompt
from unisd.data.rows import Row
from unisd.evaluation.accuracy import accuracy, generate_greedy
from unisd.evaluation.likelihood import corpus_ppl, gold_ppl, sequence_logprobs
from unisd.evaluation.retention import retention
from unisd.files import cache_dir
from unisd.memory import MIB
from unisd.models.tokens import eos_ids
from unisd.monitoring.cost import peak_memory
from unisd.recipes import load as load_recipe
from unisd.run.inputs import adapter_config, load_data, load_model
from unisd.run.resolve import parse
from unisd.tasks import get
from unisd.tasks.base import Task
from unisd.trainer import UniSDTrainer
from unisd.training.checkpoints import last_complete_checkpoint

# The later recipes are the two that look best on the pocket (docs/results/field.md): the most
# points of the task plus points kept of prior skills, over its two tables.
LATER = ("demopsd", "opsd-ectr")
METHODS = ("sft", "sdft", "unisd-star", *LATER)
RAW = "raw"
SEEDS = (0, 1, 2)
PILOT_SEED, PILOT_STEPS, EVERY = 11, 30, 20
MODEL, ROWS = "smollm2-135m", 200
STEPS = {"new_facts": 120, "scienceqa": 60}
# `append` and `turn`: what `unisd probe` says of SmolLM2 on each task.
TASK_FLAGS = {
    "new_facts": ["--task", "new_facts", "--teacher_prompt_layout", "append"],
    "scienceqa": ["--task", "scienceqa", "--task_options", "short=true", "--teacher_prompt_layout", "turn"],
}
SHARED_FLAGS = [
    "--dtype", "float32", "--use_peft", "--lora_r", "32", "--lora_alpha", "64",
    "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2",
    "--num_train_epochs", "1000", "--max_completion_length", "40",
    "--save_strategy", "steps", "--save_steps", str(EVERY), "--save_total_limit", "1",
]  # fmt: skip
FORWARD, JSD = 0.0, 0.5
# Pilots of a task: (divergence, rate).
PILOTS: dict[str, list[tuple[float, float]]] = {
    "sft": [(FORWARD, 3e-4), (FORWARD, 1e-3)],
    "sdft": [(FORWARD, 5e-4), (FORWARD, 1e-3), (JSD, 1e-3)],
}
Setting = tuple[str, int, int]
"""Model, steps and test rows."""
TOTAL = 1 + sum(map(len, PILOTS.values())) + len(SEEDS) * len(METHODS)  # cells of one task


@dataclass(frozen=True)
class Plan:
    """One cell to run."""

    task: str
    method: str
    seed: int
    alpha: float
    learning_rate: float
    pilot: bool
    model: str
    steps: int
    rows: int
    data_files: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What tells cells apart; where the data lies does not."""
        return "-".join(str(value) for name, value in asdict(self).items() if name != "data_files")


def arguments(plan: Plan) -> list[str]:
    """The flags of `unisd train` for a cell."""
    flags = [
        "--recipe",
        "sft" if plan.method == RAW else plan.method,
        "--model_name_or_path",
        plan.model,
        *TASK_FLAGS[plan.task],
    ]
    if plan.data_files:
        flags += ["--data_files", *plan.data_files]
    if plan.method == "unisd-star":
        flags += ["--agreement_contexts", "columns"]  # those of the task, drawn at random
    if plan.method in ("sdft", "unisd-star"):
        flags += ["--distillation_alpha", str(plan.alpha)]
    if plan.method == "unisd-star" and plan.alpha == JSD:
        flags += ["--token_clip_quantile", "0.99"]  # a constant of 10 nats cannot bind there
    run = {"--seed": plan.seed, "--learning_rate": plan.learning_rate, "--max_steps": plan.steps}
    return [*flags, *(str(part) for pair in run.items() for part in pair), *SHARED_FLAGS]


class Examiner:
    """Measures a model on fixed rows.

    Form and knowledge of the task, general knowledge, drift from its own first answers.
    """

    def __init__(self, plan: Plan, task: Task, tokenizer: Any, base: Any) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.rows = task.load("validation" if plan.pilot else "test", limit=plan.rows)
        self.general_task = get("new_facts")
        self.general = self.general_task.retention_rows()
        self.prompts = [encode_prompt(tokenizer, row["prompt"]) for row in self.general]
        self.base_answers = generate_greedy(
            base, tokenizer, self.prompts, self.general_task.max_new_tokens, progress=False
        )

    def __call__(self, model: Any) -> Cell:
        task = self._graded(model, self.rows, self.task)
        general = self._graded(model, self.general, self.general_task)
        logp_N, count_N = sequence_logprobs(model, self.prompts, self.base_answers)
        return {
            "task_correct": _marks(grade.correct for grade in task),
            "form_right": _marks(grade.extracted is not None for grade in task),
            "knowledge_correct": _marks(self._prefers_the_right_one(model)),
            "general_correct": _marks(grade.correct for grade in general),
            "fit_ppl": gold_ppl(model, self.tokenizer, self.rows),
            "retention_ppl_reverse": corpus_ppl(logp_N, count_N),
        }

    def _graded(self, model: Any, rows: Sequence[Row], task: Task) -> list[Any]:
        found = accuracy(
            model, self.tokenizer, rows, task.grade, max_new_tokens=task.max_new_tokens, progress=False
        )
        return list(found["grades"])

    def _prefers_the_right_one(self, model: Any) -> list[bool]:
        """Say whether the right candidate has the highest likelihood per token.

        This is knowledge without form.
        """
        prompts: list[list[int]] = []
        texts: list[list[int]] = []
        groups: list[tuple[int, int, int]] = []
        ends = eos_ids(model, self.tokenizer)
        for row in self.rows:
            options, right = candidates(row)
            groups.append((len(texts), len(options), right))
            prompts += [encode_prompt(self.tokenizer, row["prompt"])] * len(options)
            texts += [encode_completion(self.tokenizer, option, ends, row["prompt"]) for option in options]
        logp_N, count_N = sequence_logprobs(model, prompts, texts)
        mean_N = logp_N / count_N
        return [int(mean_N[first : first + count].argmax()) == right for first, count, right in groups]


def candidates(row: Row) -> tuple[list[str], int]:
    """The answers whose likelihoods are compared, and which of them is right."""
    if "candidates" in row:
        return list(row["candidates"]), 0
    letters = "ABCDEFGHIJ"[: len(row["options"])]
    return [f"Answer: {letter}" for letter in letters], letters.index(row["answer"])


def _marks(values: Any) -> str:
    return "".join(str(int(value)) for value in values)


class Curve(TrainerCallback):  # type: ignore[misc]
    """Evaluates now and then.

    Each point is on disk before its checkpoint, so that a resumed run repeats none.
    """

    def __init__(self, file: Path, examine: Examiner, model: Any, steps: int, every: int) -> None:
        self.file, self.examine, self.model, self.steps, self.every = file, examine, model, steps, every
        self.started = time.process_time()
        self.spent = max((point["train_cpu_s"] for point in read(file)), default=0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == self.steps:
            self.spent += time.process_time() - self.started
            if state.global_step not in {point["step"] for point in read(self.file)}:
                training = self.model.training
                append(
                    self.file,
                    {"step": state.global_step, "train_cpu_s": self.spent, **self.examine(self.model)},
                )
                self.model.train(training)
            self.started = time.process_time()


def run_cell(plan: Plan) -> Cell:
    """Train and measure one cell, from its last checkpoint where there is one."""
    folder = cache_dir() / "evidence" / plan.key.replace("/", "_")
    options, config = parse([*arguments(plan), "--output_dir", str(folder)])
    data = load_data(options, config.seed)
    model, tokenizer, _ = load_model(options)
    model.to(config.device)
    assert data.task is not None
    examine = Examiner(plan, data.task, tokenizer, model)
    record = {name: value for name, value in asdict(plan).items() if name != "data_files"}
    if plan.method == RAW:
        return {**record, "curve": [{"step": 0, "train_cpu_s": 0.0, **examine(model)}]}
    trainer = UniSDTrainer(
        model, config, data.train, processing_class=tokenizer, peft_config=adapter_config(options)
    )
    trainer.remove_callback(PrinterCallback)
    curve = folder / "curve.jsonl"
    trainer.add_callback(
        Curve(curve, examine, trainer.model, plan.steps, plan.steps if plan.pilot else EVERY)
    )
    checkpoint = last_complete_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    cell = {**record, "curve": read(curve), "phases_s": dict(trainer.metrics.phases)}
    cell |= {"peak_mb": peak_memory()[0] / MIB, "device": device_name(config.device)}
    if not plan.pilot:
        moved = retention(
            trainer.model,
            None,
            tokenizer,
            examine.general,
            max_new_tokens=examine.general_task.max_new_tokens,
            progress=False,
        )
        cell |= {"retention_ppl_forward": moved["forward"]["ppl"], "retention_jsd": moved["reverse"]["jsd"]}
    shutil.rmtree(folder)
    return cell


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def score(cell: Cell) -> float:
    """Judge a pilot by the share right on the task plus that of general knowledge, at its end."""
    point = cell["curve"][-1]
    return share(point["task_correct"]) + share(point["general_correct"])


def share(marks: str) -> float:
    return marks.count("1") / max(1, len(marks))


def is_of(cell: Cell, task: str, setting: Setting) -> bool:
    """Pilots belong to every setting of their model and rows that has as many steps or more."""
    model, steps, rows = setting
    wanted = min(PILOT_STEPS, steps) if cell["pilot"] else steps
    return (cell["task"], cell["model"], cell["rows"], cell["steps"]) == (task, model, rows, wanted)


def best_pilot(cells: list[Cell], task: str, method: str) -> tuple[float, float] | None:
    """Return divergence and rate of a method's best pilot; None while pilots are missing.

    Where it has none, plain self-distillation's.
    """
    method = method if method in PILOTS else "sdft"
    found = [cell for cell in cells if cell["pilot"] and cell["task"] == task and cell["method"] == method]
    if len(found) < len(PILOTS[method]):
        return None
    best = max(found, key=score)
    return best["alpha"], best["learning_rate"]


def plans(
    cells: list[Cell], task: str, model: str, steps: int, rows: int, data_files: tuple[str, ...]
) -> Iterator[Plan]:
    """Yield cells that may be run now, in order.

    The untouched model, pilots, then one seed after the other. `cells` may grow meanwhile.
    """

    def plan(method: str, seed: int, alpha: float, rate: float, pilot: bool = False) -> Plan:
        return Plan(
            task,
            method,
            seed,
            alpha,
            rate,
            pilot,
            model,
            min(PILOT_STEPS, steps) if pilot else steps,
            rows,
            data_files,
        )

    def best(method: str) -> tuple[float, float] | None:
        return best_pilot([cell for cell in cells if is_of(cell, task, (model, steps, rows))], task, method)

    def new(candidate: Plan) -> bool:
        return all(
            Plan(**{k: cell[k] for k in asdict(candidate) if k != "data_files"}).key != candidate.key
            for cell in cells
        )

    yield from filter(new, [plan(RAW, 0, 0.0, 0.0)])
    for method, settings in PILOTS.items():
        for alpha, rate in settings:
            yield from filter(new, [plan(method, PILOT_SEED, alpha, rate, pilot=True)])
    for seed in SEEDS:
        for method in METHODS:
            chosen = best(method)
            if chosen is None:
                continue
            alpha, rate = chosen
            if method in LATER:
                alpha = load_recipe(method).options["distillation_alpha"]
            yield from filter(new, [plan(method, seed, alpha, rate)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=sorted(TASK_FLAGS))
    parser.add_argument("--data_files", nargs="*", default=[], help="ScienceQA's files")
    parser.add_argument(
        "--folder", type=Path, default=Path("docs/results"), help="where smollm2.jsonl and the page are"
    )
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of 16 rows; default: 120 for new facts, 60 for ScienceQA"
    )
    parser.add_argument("--rows", type=int, default=ROWS, help="most test rows")
    add_jobs(parser)
    args = parser.parse_args(argv)
    setting = (args.task, args.model, args.steps or STEPS[args.task], args.rows, tuple(args.data_files))
    cells = carry_out(
        args.folder / "smollm2.jsonl",
        lambda cells: plans(cells, *setting),
        run_cell,
        len(TASK_FLAGS) * TOTAL,
        args.most,
        args.jobs,
    )
    from experiments import smollm2_page as evidence_page

    evidence_page.write(args.folder, cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())
