"""Does it help the paper's family? Qwen2.5-Coder-0.5B-Instruct on MBPP and CommonsenseQA.

`python -m experiments.qwen file` assembles the model file; `python -m experiments.qwen {mbpp,cos_e}
[--data FOLDER] [--folder docs/results]` runs what is missing and writes the page.

MBPP is the sanitized version in the paper's split (120 rows to train on, 43 to choose on, 257 to
report on); CommonsenseQA has the CoS-E explanations, of which 480 rows are trained on. A step has
16 answers, the adapter is the paper's (LoRA, r 64). Rates are chosen by pilots on MBPP, on rows
that are not reported; methods without pilots take that of `sdft`. Each finished part of a run (its
training, and each measurement of it) is a line of `qwen.jsonl`; a training that was stopped goes on
from its last step, and its adapter stays in the cache until it is measured. `experiments.qwen_page`
makes the page. A day and more on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from peft.helpers import rescale_adapter_scale
from rich.console import Console

from experiments import qwen_file
from experiments.grid import Cell, add_jobs, carry_out, read
from experiments.qwen_plan import DRIFT, GRAFT, RAW, TASK, TRAINING, Plan, hours, needed, of, outline, plans
from unisd.config import UniSDConfig
from unisd.data.rows import prepare_rows
from unisd.errors import UserError
from unisd.files import METRICS, cache_dir, is_evaluation, read_lines
from unisd.memory import MIB
from unisd.models.inference import load_any
from unisd.monitoring.cost import peak_memory
from unisd.run.baseline import key_of, measured_once
from unisd.run.changes import drift_of
from unisd.run.inputs import RunData, get_task, load_data
from unisd.run.measure import FREE, drift, measure
from unisd.run.options import RunOptions
from unisd.run.resolve import parse
from unisd.run.retention import RetentionSet
from unisd.run.train import set_up
from unisd.tasks import get
from unisd.training.checkpoints import last_complete_checkpoint

STORE = "qwen.jsonl"
FILES = {
    "mbpp": ["mbpp/sanitized-mbpp.json"],
    "cos_e": ["cose/csqa_cose_v1.11_train.jsonl.gz", "cose/csqa_cose_v1.11_dev.jsonl.gz"],
    "gsm8k": ["gsm8k/train.jsonl.gz"],
}
"""What `--data` must hold; without it the Hub's data sets are read."""
TASK_FLAGS = {
    "mbpp": ["--task", "mbpp", "--task_options", "version=sanitized"],
    "cos_e": ["--task", "cos_e", "--max_train_rows", "480"],
}
ANSWER_TOKENS = {"mbpp": 256, "cos_e": 72}  # the longest references have 230 and 69
TEST_ROWS = {"mbpp": 257, "cos_e": 300}
# What must not be lost: set, its task's options, rows, most tokens of an answer.
KEPT_SETS: dict[str, list[tuple[str, dict[str, Any], int, int]]] = {
    "mbpp": [("general", {}, 204, 64), ("gsm8k", {}, 50, 256), ("cos_e", {"short": True}, 100, 16)],
    "cos_e": [("general", {}, 204, 64), ("gsm8k", {}, 50, 256), ("mbpp", {"version": "sanitized"}, 60, 256)],
}
PILOT_KEPT = [("gsm8k", {}, 40, 256)]
"""Of other rows than those that are reported. On `cos_e` the untouched model guesses."""
CHAT_ROWS = 34
REFERENCES = 64
"""Rows whose references' perplexity is measured: that of all takes as long as their answers."""
SHARED_FLAGS = [
    "--dtype", "float32", "--use_peft", "--lora_r", "64", "--lora_alpha", "128",
    "--gradient_accumulation_steps", "4", "--rollout_batch_size", "128",
    "--num_train_epochs", "1000", "--retention", "none", "--max_eval_rows", "1",
    "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "1",
]  # fmt: skip
# Four prompts with four answers each, as many answers a step as the others have.
SINGLE = ["--per_device_train_batch_size", "4"]
GROUPS = ["--per_device_train_batch_size", "1", "--num_generations", "4"]
METHOD_FLAGS = {
    "sdft": [*SINGLE, "--teacher_model_kind", "base"],
    "rejection-sft": GROUPS,
    "sdpo": GROUPS,
}


def arguments(plan: Plan) -> list[str]:
    """The flags of `unisd train` for a cell."""
    recipe = "sft" if plan.method in (RAW, GRAFT) else plan.method
    flags = ["--recipe", recipe, "--model_name_or_path", plan.model, *TASK_FLAGS[plan.task]]
    if plan.data:
        flags += ["--data_files", *(str(Path(plan.data) / name) for name in FILES[plan.task])]
    run = {"--seed": plan.seed, "--learning_rate": plan.learning_rate, "--max_steps": plan.steps}
    run |= dict.fromkeys(("--max_completion_length", "--eval_max_new_tokens"), ANSWER_TOKENS[plan.task])
    of_run = [str(part) for pair in run.items() for part in pair]
    return [*flags, *of_run, *SHARED_FLAGS, *METHOD_FLAGS.get(plan.method, SINGLE)]


def adapter_folder(plan: Plan) -> Path:
    """Where a training leaves its adapter."""
    kind = "pilot" if plan.pilot else "run"
    name = f"{plan.task}-{plan.trained.method}-{kind}-{plan.seed}-{plan.learning_rate:g}"
    return cache_dir() / "qwen" / name


def run_cell(plan: Plan) -> Cell:
    """Train or measure, by the cell's part."""
    folder = adapter_folder(plan)
    options, config = parse([*arguments(plan), "--output_dir", str(folder)])
    started = time.perf_counter()
    found = trained(folder, options, config) if plan.part == TRAINING else examined(plan, options, config)
    cell = {**plan.record, **found, "seconds": time.perf_counter() - started}
    return {**cell, "peak_mb": peak_memory()[0] / MIB, "device": config.device.type}


def trained(folder: Path, options: RunOptions, config: UniSDConfig) -> Cell:
    """Train from the last whole checkpoint, and leave the adapter in its folder."""
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None:
        shutil.rmtree(folder, ignore_errors=True)
    data = load_data(options, config.seed)
    if config.teacher_context == "wrong":  # of a short program no slip may fail the tests
        data.train = [row for row in data.train if row.get("negative_context")]
    trainer = set_up(options, config, data, Console(quiet=True)).trainer
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model(str(folder))
    # Of all steps, also of those before a kill.
    steps = [line for line in read_lines(folder / METRICS) if not is_evaluation(line)]
    times = sorted({name for step in steps for name in step if name.startswith("step_time")})
    return {
        "step_s": sum(step["step_time"] for step in steps) / len(steps),
        "times_s": {name: sum(step.get(name, 0.0) for step in steps) for name in times},
        "answer_tokens": sum(step["completions/loss_tokens"] for step in steps),
        "losses": [step["loss"] for step in steps],
        "steps": len(steps),
        "rows": len(data.train),
    }


def examined(plan: Plan, options: RunOptions, config: UniSDConfig) -> Cell:
    """One measurement of a cell: marks of every answer, and figures."""
    data, adapter = rows_to_measure(plan, options), adapter_folder(plan)
    if plan.method == RAW:
        model, tokenizer = load_any(plan.model, "float32")
        return _answered(*measure(model, tokenizer, data, config, REFERENCES))
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(
            f"{adapter} has no adapter, though {STORE} says that it was trained: remove that line, and it is"
            " trained again."
        )
    model, tokenizer = load_any(str(adapter), "float32")
    with rescale_adapter_scale(model, plan.scale):
        figures, answers = measure(model, tokenizer, data, config, REFERENCES)
        if plan.part != DRIFT:
            return _answered(figures, answers)

        def of_base() -> dict[str, Any]:
            with model.disable_adapter():
                return {"answers": measure(model, tokenizer, data, config, REFERENCES)[1]}

        probed = data.retention[0]
        base = measured_once(str(cache_dir() / "qwen" / "base"), key_of(options, config, data), of_base)
        known = answers[FREE], base["answers"][FREE]
        found = drift(
            model, None, tokenizer, probed.probed, probed.cap or 64, config.rollout_batch_size, known
        )
    detail = found["retention_detail"]
    return {"drift": drift_of(detail, probed.name), "detail": detail}


def _answered(figures: dict[str, Any], answers: dict[str, Any]) -> Cell:
    marks = {
        part: "".join(str(int(mark)) for mark in found["correct"]) for part, found in answers.items() if found
    }
    lengths = {part: sum(map(len, found["token_ids"])) for part, found in answers.items() if found}
    return {"correct": marks, "tokens": lengths, "gold_ppl": figures["gold_ppl"]}


def rows_to_measure(plan: Plan, options: RunOptions) -> RunData:
    """What a part of a cell asks; pilots ask rows that are never reported."""
    if plan.part == TASK:
        task = get_task(options)
        split, limit = ("validation", None) if plan.pilot else ("test", TEST_ROWS[plan.task])
        rows = prepare_rows(task.load(split, limit=limit), name=f"task {plan.task}")
        return RunData(plan.task, [], rows, grade=task.grade)
    if plan.part == DRIFT:
        chat = get("general").load("chat", limit=CHAT_ROWS)
        return RunData(plan.task, [], [], [RetentionSet("general", [], None, chat, 64)])
    sets = []
    for name, own, count, cap in PILOT_KEPT if plan.pilot else KEPT_SETS[plan.task]:
        where = {"data_files": [str(Path(plan.data) / file) for file in FILES.get(name, ())]}
        task = get(name, **own, **(where if plan.data and name in FILES else {}))
        reported = next((size for other, _, size, _ in KEPT_SETS["mbpp"] if other == name), 0)
        start = reported if plan.pilot else 0
        rows = task.load("test", limit=start + count)[start:]
        sets.append(RetentionSet(name, rows, task.grade, cap=cap))
    return RunData(plan.task, [], [], sets)


def sweep(cells: list[Cell], task: str) -> None:
    """Remove adapters that are measured, and the checkpoints of those that are trained."""
    wanted = {adapter_folder(plan) for plan in needed(cells, task) if plan.learning_rate is not None}
    for cell in cells:
        if cell["part"] == TRAINING and cell["task"] == task:
            folder = adapter_folder(of(cell))
            for left in folder.glob("checkpoint-*") if folder in wanted else [folder]:
                shutil.rmtree(left, ignore_errors=True)


def model_of(given: str | None) -> str:
    """The model to adapt: what was given, else the assembled file."""
    if given is None and not qwen_file.place().is_file():
        raise UserError(
            f"{qwen_file.place()} is not there: run `python -m experiments.qwen file`, or give --model"
            " Qwen/Qwen2.5-Coder-0.5B-Instruct."
        )
    return given or str(qwen_file.place())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["file", *sorted(TASK_FLAGS)])
    parser.add_argument("--data", help="folder with the tasks' files; unset: the Hub's data sets")
    parser.add_argument("--folder", type=Path, default=Path("docs/results"), help="of the store and the page")
    parser.add_argument("--model", help="folder or hub id in the place of the assembled file")
    add_jobs(parser)
    args = parser.parse_args(argv)
    if args.what == "file":
        print(qwen_file.assemble())
        return 0
    task, model = args.what, model_of(args.model)
    for name in itertools.chain(*FILES.values()) if args.data else ():
        if not (Path(args.data) / name).is_file():
            raise UserError(f"--data {args.data} has no {name}: put it there.")
    args.folder.mkdir(parents=True, exist_ok=True)
    cells = read(args.folder / STORE)
    total = len(outline(task, cells))
    of_task = [cell for cell in cells if cell["task"] == task]
    print(
        f"{total - len(of_task)} of {total} cells are left: about {hours(cells, task):.1f} hours", flush=True
    )

    def wanted(finished: list[Cell]) -> list[Plan]:
        sweep(finished, task)
        return plans(finished, task, model, args.data or "")

    cells = carry_out(args.folder / STORE, wanted, run_cell, total, args.most, args.jobs)
    sweep(cells, task)
    from experiments import qwen_page

    qwen_page.write(args.folder, cells)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
