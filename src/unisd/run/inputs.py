"""Loads what a run works on, by its options.

Rows with their grader, the model with its adapter, and what the rows can serve.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unisd import tasks
from unisd.config import UniSDConfig
from unisd.console import loading
from unisd.data.reading import KINDS, load_file
from unisd.data.rows import Row, hold_out, prepare_rows
from unisd.data.text import problem_key
from unisd.errors import UserError, first_line, flag
from unisd.models.adapters import is_adapter, make_trainable
from unisd.run.options import RunOptions, as_list, number_of
from unisd.run.own_rows import apart, grader_of, load_own, named
from unisd.run.retention import RetentionSet, load_sets, probed_of
from unisd.tasks import sandbox
from unisd.tasks.base import Grade, Task

logger = logging.getLogger(__name__)

GradeFunction = Callable[[Row, str], Grade]


@dataclass
class RunData:
    """Rows by use.

    `grade` is None where nobody can tell a right answer; `retention` is empty where nothing is
    asked that must not be lost, and `validation` where evaluations during training choose nothing.
    """

    name: str
    train: list[Row]
    evaluation: list[Row]
    retention: list[RetentionSet] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    grade: GradeFunction | None = None
    answers_kept: int | None = None
    """See `answers.kept`."""
    task: Task | None = None
    contexts: str = ""
    """A line that says where the auxiliary contexts of the training rows come from."""

    @property
    def probed(self) -> RetentionSet | None:
        """The set on whose rows drift is measured: the first with free prompts, else the first."""
        return probed_of(self.retention)

    @property
    def evaluated(self) -> dict[str, list[Row]]:
        """All rows that are answered before and after, by what they are called."""
        found = {"the evaluation data": self.evaluation}
        for one in self.retention:
            found[f"the retention data {one.name}"] = [*one.rows, *one.free]
        return found


def get_task(options: RunOptions) -> Task:
    """The task that the options name, with those of its own options that were given."""
    assert options.task is not None
    own = {"noise": options.noise, "reference_style": options.reference_style}
    grader = options.grader if options.task == "jsonl" else None
    task = tasks.from_flags(options.task, options.data_files, options.task_options, grader, **own)
    if task.runs_code:
        sandbox.require_with(options.allow_unsafe_code_execution)
    return task


def load_data(
    options: RunOptions,
    seed: int = 0,
    training: bool = True,
    whole: bool = False,
    needs_reference: bool = True,
) -> RunData:
    """Rows of the task, or the user's own.

    Args:
        whole: hold none of the user's own rows out.
        needs_reference: refuse rows of the user's own without a reference, which contexts and wrong
            references are built of, too.

    Raises:
        UserError: unreadable or empty data, a row that breaks the contract or that the grader
            cannot grade, a task that must not be trained on.
    """
    if options.task is not None:
        return _task_data(options, seed, training)
    files = as_list(options.train_file)
    given: list[tuple[str, Any]] = [(file, file) for file in files]
    for dataset in as_list(options.dataset_name):
        given.append((dataset, _load_dataset(options, dataset, options.dataset_train_split)))
    sources = load_own(options, given, needs_reference)
    grade: GradeFunction | None = None
    for source, found in sources:
        grade = _named_grader(options, found, source)
    others = _rows_to_report_on(options, needs_reference)
    evaluation: list[Row]
    if whole and not others:
        rows, evaluation = [row for _, found in sources for row in found], []
    else:
        rows, evaluation = apart(options, sources, seed, hold=not others)
    for other, found in others:
        _named_grader(options, found, other)
        _say_what_is_trained_on(found, rows, other, " and ".join(name for name, _ in given))
        evaluation += found
    if len(evaluation) > options.max_eval_rows:
        logger.warning(
            "%s: the first %d of %d rows are reported on; all of them: %s.",
            " and ".join(name for name, _ in others),
            options.max_eval_rows,
            len(evaluation),
            flag("max_eval_rows", str(len(evaluation))),
        )
    return RunData(
        name=named([name for name, _ in given], bool(files)),
        train=rows[: options.max_train_rows],
        evaluation=evaluation[: options.max_eval_rows],
        retention=_retention(options, None) if training else [],
        grade=grade,
        answers_kept=options.answers_kept,
    )


def _rows_to_report_on(options: RunOptions, needs_reference: bool) -> list[tuple[str, list[Row]]]:
    """The rows of `eval_file`, or of the split that `eval_split` names; none: some are held out."""
    given: list[tuple[str, Any]] = [(file, file) for file in as_list(options.eval_file)]
    split = options.eval_split
    if split is not None and number_of(split) is None:
        for dataset in as_list(options.dataset_name):
            given.append((f"{dataset} (split {split})", _load_dataset(options, dataset, split)))
    return load_own(options, given, needs_reference)


def _say_what_is_trained_on(evaluation: list[Row], rows: list[Row], eval_file: str, name: str) -> None:
    if Path(eval_file).resolve() == Path(name).resolve():
        logger.warning(
            "%s is trained on and reported on: the results do not show what the model does on new rows.", name
        )
        return
    known = {problem_key(row["prompt"]) for row in rows}
    shared = sum(problem_key(row["prompt"]) in known for row in evaluation)
    if shared:
        logger.warning(
            "%s: %d of %d rows repeat problems of %s, which are trained on: their results do not show what"
            " the model does on new ones.",
            eval_file,
            shared,
            len(evaluation),
            name,
        )


def hold_out_validation(data: RunData, options: RunOptions, config: UniSDConfig) -> None:
    """Move training rows to `data.validation` where evaluations during training are to have some.

    What is reported before and after the run must not choose the model that it is reported of.

    Raises:
        UserError: there is nothing to hold out, or no evaluation that it would be for.
    """
    split, choice = options.validation_split, _choice(config)
    if split is not None and config.eval_strategy == "no":
        raise UserError(
            "validation_split is for evaluations during training: set eval_strategy, or unset it."
        )
    if split is None and choice is None:
        return
    total = len(data.train)
    default = min(max(1, round(0.1 * total)), options.max_eval_rows)
    count = default if split is None else round(split * total) if split < 1 else int(split)
    train, held = hold_out(data.train, seed=config.seed, count=count)
    if not held or count >= total:
        what = f"{choice} needs rows to choose on" if split is None else f"validation_split={split}"
        raise UserError(
            f"{what}: {total} training rows with {1 if not held else 'too few'} different prompts cannot be"
            " split: give more rows, or hold out fewer (validation_split)."
        )
    # rows that count several times are looked at once
    data.train, data.validation = train, list({id(row): row for row in held}.values())
    if split is None and config.process_index == 0:
        logger.warning(
            "%s chooses on %d of %d training rows, which are held out (--validation_split says how many).",
            choice,
            len(held),
            total,
        )


def _choice(config: UniSDConfig) -> str | None:
    """The option by which evaluations during training choose something, if there is one."""
    if config.load_best_model_at_end:
        return "load_best_model_at_end"
    if config.save_strategy == "best":
        return "save_strategy=best"
    if config.early_stopping_patience is not None:
        return "early_stopping_patience"
    plateau = config.lr_scheduler_type == "reduce_lr_on_plateau"
    return "lr_scheduler_type=reduce_lr_on_plateau" if plateau else None


def _task_data(options: RunOptions, seed: int, training: bool) -> RunData:
    assert options.task is not None
    task = get_task(options)
    if training and task.evaluation_only:
        raise UserError(
            f"task {task.name} is for evaluation only (its authors ask for this): train on another one."
        )
    where, split = f"task {task.name}", options.eval_split or "test"
    if split in ("train", "all"):
        raise UserError(f"eval_split={split} would report on training rows: give test or validation.")
    if training:
        task.prepare_training()
    return RunData(
        name=options.task,
        train=prepare_rows(task.load("train", limit=options.max_train_rows, seed=seed), name=where)
        if training
        else [],
        # Evaluation rows do not depend on the run's seed, so that runs can be compared.
        evaluation=prepare_rows(task.load(split, limit=options.max_eval_rows), name=where),
        retention=_retention(options, task, others=split == "validation"),
        grade=task.grade,
        answers_kept=options.answers_kept,
        task=task,
    )


def _retention(options: RunOptions, task: Task | None, others: bool = False) -> list[RetentionSet]:
    """The sets that must not be lost; of a task's own, to choose on, `others` than are reported."""
    if task is not None and others:
        shared = {problem_key(row["prompt"]) for row in task.load("validation")}
        if shared & {problem_key(row["prompt"]) for row in task.load("test")}:
            logger.warning(
                "task %s: some validation rows are test rows too: a choice made on them looks too good"
                " there.",
                task.name,
            )
    return load_sets(options, task, others)


def _load_dataset(options: RunOptions, name: str, split: str) -> list[Row]:
    import datasets

    whole = (Path(name) / "dataset_dict.json").is_file()  # the two that save_to_disk writes
    try:
        if not whole and not (Path(name) / "state.json").is_file():
            builder = datasets.load_dataset_builder(name, options.dataset_config)
            if options.dataset_config is None:
                _say_what_is_not_read(name, builder)
            if (rows := _as_they_stand(builder, split)) is not None:
                return rows
            loaded = datasets.load_dataset(name, options.dataset_config, split=split)
        elif options.dataset_config is not None:
            raise ValueError("a saved dataset has no configurations: unset dataset_config.")
        else:
            loaded = datasets.load_from_disk(name)
            if whole and split not in loaded:
                option = "dataset_train_split" if split == options.dataset_train_split else "eval_split"
                raise ValueError(f"it has no split {split!r}: set {option} to one of {', '.join(loaded)}.")
            loaded = loaded[split] if whole else loaded
    except Exception as error:  # the library raises a dozen kinds, all of them about the name or the network
        raise UserError(f"dataset {name!r} cannot be loaded: {first_line(error)}") from None
    return [dict(row) for row in loaded]


def _say_what_is_not_read(name: str, builder: Any) -> None:
    """Name files of a folder that the library passes over: of another kind, or of no split."""
    named = getattr(builder.config, "data_files", None) or {}
    read = {Path(str(file)).resolve() for found in named.values() for file in found}
    left = [
        str(file.relative_to(name))
        for file in sorted(Path(name).rglob("*"))
        if set(file.suffixes) & set(KINDS) and file.is_file() and file.resolve() not in read
    ]
    left = [file for file in left if file not in ("dataset_info.json", "dataset_infos.json")]
    if read and left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        logger.warning(
            "%s: not read: %s%s (of a folder, files of one kind are read, and where names tell splits those"
            " of a split alone); --train_file takes any files.",
            name,
            ", ".join(left[:3]),
            more,
        )


def _as_they_stand(builder: Any, split: str) -> list[Row] | None:
    """Rows of local files of text, whose types the library would guess; None: it reads others."""
    import datasets

    named = getattr(builder.config, "data_files", None) or {}
    files = {part: [Path(str(file)) for file in found] for part, found in named.items()}
    every = [file for found in files.values() for file in found]
    kinds = (".csv", ".tsv", ".jsonl", ".csv.gz", ".tsv.gz", ".jsonl.gz")
    if not every or not all(file.is_file() and file.name.endswith(kinds) for file in every):
        return None
    rows = {str(part): [row for file in found for row in load_file(file)] for part, found in files.items()}
    chosen = datasets.ReadInstruction.from_spec(split).to_absolute({part: len(rows[part]) for part in rows})
    return [row for part in chosen for row in rows[part.splitname][part.from_ : part.to]]


def _named_grader(options: RunOptions, rows: list[Row], where: str) -> GradeFunction | None:
    return grader_of(options.grader, options.allow_unsafe_code_execution, rows, where)


def fit_mechanisms(config: UniSDConfig, options: RunOptions, rows: list[Row]) -> UniSDConfig:
    """The config without what a recipe asks for and the rows cannot serve.

    What the user asked for stays, and the trainer refuses it.
    """
    asked = options.explicit
    contexts = any(len(row.get("auxiliary_contexts") or []) >= 2 for row in rows)
    negatives = any(row.get("negative_context") for row in rows)
    off: dict[str, Any] = {}
    dropped = []
    if config.agreement != "none" and "agreement" not in asked and not contexts:
        off["agreement"] = "none"
        dropped.append("agreement (needs a column auxiliary_contexts, or --agreement_contexts retrieval)")
    # without a reference the contrast is all that moves the student
    kept = "contrastive_weight" in asked or config.teacher_context == "plain"
    if config.contrastive_weight and not kept and not negatives:
        off["contrastive_weight"] = 0.0
        dropped.append("contrast (needs a column negative_context, or --negatives corrupt)")
    if not off:
        return config
    why = f"recipe {options.recipe} runs without {' and without '.join(dropped)}."
    if config.process_index == 0:
        logger.warning("%s", why)
    return config.changed(why, **off)


def load_model(options: RunOptions, training: bool = True) -> tuple[Any, Any, str]:
    """The model, its tokenizer and the path that they came from.

    Raises:
        UserError: not a model, or a library that is missing.
    """
    from unisd.models.load import load_model_and_tokenizer

    adapter = is_adapter(options.model_name_or_path)
    if adapter and options.use_peft:
        raise UserError(
            f"{options.model_name_or_path} is an adapter, which is trained further: leave --use_peft"
            " out, or merge it into a full model first, with `unisd merge`."
        )
    # bfloat16 weights cannot hold updates of 1e-5; an adapter is float32 on whatever base.
    full = training and not options.use_peft and not adapter
    dtype = "float32" if options.dtype == "auto" and full else options.dtype
    with loading(f"model {options.model_name_or_path}"):
        model, tokenizer, info = load_model_and_tokenizer(
            options.model_name_or_path,
            dtype=dtype,
            trust_remote_code=options.trust_remote_code,
            load_in_4bit=options.load_in_4bit,
        )
    if adapter and training:
        make_trainable(model)
    return model, tokenizer, info.path


def adapter_config(options: RunOptions) -> Any:
    """The LoRA configuration, or None for training all weights."""
    if not options.use_peft:
        return None
    from peft import LoraConfig

    modules: Any = options.lora_target_modules
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=modules[0] if modules == ["all-linear"] else modules,
        task_type="CAUSAL_LM",
    )
