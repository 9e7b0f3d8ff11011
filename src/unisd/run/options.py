"""Everything a run is told beside `UniSDConfig`: which recipe, model and data.

`resolve.py` makes both from recipe, task, file and flags.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from unisd.errors import UserError
from unisd.models.adapters import is_adapter
from unisd.options.option import check_declared, option
from unisd.options.parser import Values
from unisd.recipes import DEFAULT

ONE_PROCESS = "graft_scales are measured by one process: unset it, and run `unisd eval --scales` afterwards."

# Headings of `unisd train --help`, in this order; the others are `options.table.GROUPS`.
RUN_GROUPS = ("run", "model", "adapter", "data")

# Commands that take what `unisd train` takes.
_MODEL = ("probe", "prepare", "eval")
_GRADED = (*_MODEL, "grade", "judge")
_ROWS = (*_GRADED, "contamination")
_ONE_TASK = ("probe", "prepare", "grade", "judge", "contamination")


@dataclass(frozen=True)
class RunOptions:
    """What `unisd train` runs; flat, as on the command line.

    See `config.UniSDConfig` for how it trains.
    """

    # -- run ---------------------------------------------------------------------------------------
    recipe: str = option(
        "run",
        "Published method that sets the defaults of this run, or your own recipe file; `unisd recipes`"
        " lists them.",
        DEFAULT,
    )
    dry_run: bool = option(
        "run",
        "Check everything; print what would run, an example and the predicted memory; train nothing.",
        False,
    )
    verbose: bool = option(
        "run",
        "Print all resolved options; with dry_run also the whole example and the memory by parts.",
        False,
    )
    overwrite_output_dir: bool = option(
        "run", "Replace an earlier run in output_dir (its results and checkpoints).", False
    )

    before_cache: str | None = option(
        "run",
        "Folder that stores the `before` measurement: runs with the same model and evaluation rows measure"
        " it once.",
    )
    answers_kept: int | None = option(
        "run",
        "Number of evaluation rows whose answers before and after are kept (answers.json) and shown; 0:"
        " none. Unset: 64; without a grader 24, and each of these costs two greedy answers.",
        low=0,
    )
    graft_scales: list[float] | None = option(
        "run",
        "After training, also measure base + L x (what training changed) for each of these L:"
        " grafting.json, and a curve in the report. A part of the change often keeps more than it loses.",
    )
    device_tdp: float | None = option(
        "run",
        "Watts of one device at full load, for the energy estimate; unset: what the driver of a GPU reports.",
        shared=("probe",),
    )
    accelerate_config: str | None = option(
        "run",
        "Several processes on this machine: ddp, fsdp2, zero2, zero3 (fsdp2 and zero3 shard the weights) or"
        " your own accelerate file.",
    )
    num_processes: int | None = option(
        "run", "accelerate_config: number of processes; unset: one per accelerator.", low=1
    )

    # -- model -------------------------------------------------------------------------------------
    model_name_or_path: str = option(
        "model",
        "A folder (of a model, or of an adapter to train further), Hub id or .gguf file; or `pocket`"
        " (embedded, 1M parameters) or `smollm2-135m`. Short form: --model.",
        "pocket",
        shared=_MODEL,
    )
    dtype: str = option(
        "model",
        "float32, bfloat16 or float16; auto: float32, or bfloat16 for a model under an adapter where it is"
        " native. Matrix products on one GPU use bfloat16 (from 50M parameters) unless dtype, bf16 or fp16"
        " is given.",
        "auto",
        shared=_MODEL,
    )
    trust_remote_code: bool = option("model", "Run code that comes with the model.", False, shared=_MODEL)
    load_in_4bit: bool = option(
        "model", "QLoRA: 4-bit base weights (needs bitsandbytes and use_peft).", False
    )

    # -- adapter -----------------------------------------------------------------------------------
    use_peft: bool = option("adapter", "Train a LoRA adapter instead of all weights.", False)
    lora_r: int = option("adapter", "Rank of the adapter.", 64, low=1)
    lora_alpha: int = option("adapter", "Scale of the adapter (divided by the rank).", 128, low=1)
    lora_dropout: float = option("adapter", "Dropout before the adapter.", 0.05)
    lora_target_modules: list[str] = option("adapter", "Modules to adapt, or all-linear.", ["all-linear"])

    # -- data --------------------------------------------------------------------------------------
    task: str | None = option(
        "data",
        "Built-in or installed task; unset, with no other data given: pocket.",
        shared=_ONE_TASK,
    )
    data_files: list[str] | None = option(
        "data", "Files for the task to read (for tasks that come without data).", shared=_ONE_TASK
    )
    task_options: list[str] | None = option("data", "More options of the task, as name=value.", shared=_ROWS)
    allow_unsafe_code_execution: bool = option(
        "data",
        "Run model-written code with your own permissions if the machine cannot isolate it.",
        False,
        shared=_GRADED,
    )
    noise: float | None = option(
        "data", "Pocket task: share of training references that are wrong.", shared=("probe", "prepare")
    )
    reference_style: str | None = option(
        "data",
        "Pocket task: annotators, hedged (with words of doubt) or own (the model's wording).",
        shared=("probe", "prepare"),
    )
    train_file: str | list[str] | None = option(
        "data",
        "Your rows: one or more .jsonl, .json, .csv, .tsv or .parquet files. They have prompt and"
        " privileged_context, or a common layout (messages, ShareGPT, alpaca, ...).",
        shared=_ROWS,
    )
    eval_file: str | None = option(
        "data",
        "Rows to report on; unset: those that eval_split selects.",
        excludes="eval_split",
        shared=_ROWS,
    )
    eval_split: str | None = option(
        "data",
        "Rows to report on: a share of the training rows or (1 or more) a number of them, held out by"
        " problem; or a split of dataset_name. Unset: a seeded 10 % (at most max_eval_rows). For a task that"
        " is trained on: the name of its split (unset: test; validation: for choosing settings, as a study"
        " does).",
        shared=_ROWS,
    )
    dataset_name: str | list[str] | None = option(
        "data",
        "Your rows as a folder of data files, a folder that save_to_disk wrote, or a Hub id; one or several.",
        shared=_ROWS,
    )
    train_weights: list[float] | None = option(
        "data",
        "How often the training rows of each train_file or dataset_name count, in the same order: 2 takes"
        " them twice, 0.5 a seeded half; unset: 1 each.",
        shared=_ROWS,
    )
    dataset_config: str | None = option("data", "Configuration of dataset_name.", shared=_ROWS)
    dataset_train_split: str = option(
        "data",
        "Split of dataset_name to train on (where it has splits).",
        "train",
        shared=_ROWS,
    )
    agreement_contexts: str = option(
        "data",
        "Auxiliary contexts: columns (those in the rows), or built for all rows: random, retrieval or"
        " induction. The value in a recipe does not replace contexts in your own rows, except with"
        " teacher_context=other.",
        "columns",
        choices=("columns", "random", "retrieval", "induction"),
        shared=("prepare",),
    )
    embedder: str = option(
        "data",
        "retrieval: tfidf, model (its own hidden states) or a sentence-transformers model.",
        "tfidf",
        shared=("prepare",),
    )
    negatives: str = option(
        "data",
        "Wrong references for rows without one: columns (build none), corrupt or model.",
        "columns",
        choices=("columns", "corrupt", "model"),
        shared=("prepare",),
    )
    writer_url: str | None = option(
        "data",
        "For induction and negatives=model: an OpenAI-compatible server whose model writes them; unset: the"
        " model itself.",
        shared=("prepare",),
    )
    writer_model: str | None = option(
        "data",
        "writer_url: name of the model on the server; unset: the first that it lists.",
        shared=("prepare",),
    )
    columns: str | None = option(
        "data",
        "Names of your columns: prompt=question,privileged_context=answer. prompt=a+b joins the texts of"
        " two columns; names with a comma are quoted.",
        shared=_ROWS,
    )
    grader: str | None = option(
        "data",
        "Grades the answers to your rows, to report accuracy: exact, contains, choice, number, call and"
        " similarity (free text) compare with the column answer (else the completion); code runs the column"
        " tests.",
        shared=_GRADED,
    )
    max_train_rows: int | None = option(
        "data", "Train only on this many rows, the first ones.", low=1, shared=("prepare",)
    )
    validation_split: float | None = option(
        "data",
        "Training rows held out, by problem, for evaluations during training: a share or (1 or more) a"
        " number. Unset: none; 10 % (at most max_eval_rows) if they choose the model"
        " (load_best_model_at_end).",
    )
    retention: list[str] | None = option(
        "data",
        "What must not be lost, measured before and after training: none, general (short everyday items),"
        " tasks, or files of rows; several are allowed. Unset: the task's own set, and general for a real"
        " model.",
        shared=("eval",),
    )
    retention_rows: int | None = option(
        "data",
        "Maximum rows per retention set; unset: max_eval_rows, and at most 120 for general.",
        low=1,
        shared=("eval",),
    )
    max_eval_rows: int = option("data", "Maximum rows per evaluation (task, retention).", 400, low=1)

    # -- not on the command line -------------------------------------------------------------------
    explicit: frozenset[str] = frozenset()
    """Names that the user gave in the config file or as flags."""
    command: tuple[str, ...] = ()
    """The arguments as given, for telling how to resume."""
    values: Values = field(default_factory=dict)
    """What recipe, task, config file and flags set, the user's above the others."""

    @property
    def trains_adapter(self) -> bool:
        """Whether an adapter is trained: a new one, or the one that is given as the model."""
        return self.use_peft or is_adapter(self.model_name_or_path)

    def check(self) -> None:
        """Raise `UserError` for the first option that is out of range or contradicts another."""
        self._check_source()
        check_declared(self, outside="{name}={value} must be {low} or more.")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout={self.lora_dropout} must be 0 or more and below 1.")
        split = self.validation_split
        if split is not None and (split <= 0 or (split > 1 and split != int(split))):
            raise UserError(
                f"validation_split={split} must be a share between 0 and 1, or a whole number of rows."
            )
        self._check_mixture()
        if self.num_processes is not None and self.accelerate_config is None:
            raise UserError(
                "num_processes belongs to accelerate_config: unset it, or give --accelerate_config ddp."
            )
        if self.graft_scales is not None:
            self._check_grafting()
        if self.writer_url is not None:
            from unisd.http_client import check_server  # heavy

            check_server("writer_url", self.writer_url)
        elif self.writer_model is not None:
            raise UserError("writer_model is a name on a server: give its writer_url, too.")
        if self.load_in_4bit and not self.trains_adapter:
            raise UserError("load_in_4bit needs use_peft: 4-bit weights cannot be trained themselves.")

    def _check_grafting(self) -> None:
        check_scales(self.graft_scales or (), "graft_scales")
        if is_adapter(self.model_name_or_path):
            raise UserError(
                "graft_scales are parts of what is added to the base, and this run trains an adapter further:"
                " unset it, or merge that adapter first (`unisd merge`)."
            )
        if self.accelerate_config is not None:
            raise UserError(ONE_PROCESS)

    def _check_mixture(self) -> None:
        """Check what says which rows of which source are trained on, and which reported."""
        sources = as_list(self.train_file) or as_list(self.dataset_name)
        if twice := next((name for name in sources if sources.count(name) > 1), None):
            raise UserError(f"{twice} is given twice: give it once, and say how often by train_weights.")
        if self.train_weights is not None:
            if len(self.train_weights) != len(sources):
                raise UserError(
                    f"train_weights has {len(self.train_weights)} weights for {len(sources)} sources"
                    f" ({', '.join(sources)}): give one for each."
                )
            if not all(0 < weight < math.inf for weight in self.train_weights):
                raise UserError(f"train_weights={self.train_weights}: each must be a number above 0.")
        if self.eval_split is None:
            return
        count = number_of(self.eval_split)
        if self.task is not None:
            if count is not None:
                raise UserError(f"eval_split={self.eval_split}: a task has splits by name: test, validation.")
            return
        if count is None and self.dataset_name is None:
            raise UserError(
                f"eval_split={self.eval_split!r} must be a share between 0 and 1, or a whole number of rows;"
                " splits by name belong to dataset_name."
            )
        if count is not None and not (0 < count < 1 or (count >= 1 and count == int(count))):
            raise UserError(
                f"eval_split={self.eval_split} must be a share between 0 and 1, or a whole number of rows."
            )

    def _check_source(self) -> None:
        """Check that there is one source of rows, and no option of another kind of source."""
        sources = [name for name in ("task", "train_file", "dataset_name") if getattr(self, name) is not None]
        if len(sources) > 1:
            raise UserError(f"{' and '.join(sources)} exclude each other: give one source of training rows.")
        if self.task is None:
            for name in ("noise", "reference_style", "data_files", "task_options"):
                if getattr(self, name) is not None:
                    raise UserError(f"{name} belongs to a task: unset it, or give --task.")
        else:
            for name in ("columns", "grader", "eval_file", "dataset_config", "train_weights"):
                if getattr(self, name) is not None and (name, self.task) != ("grader", "jsonl"):
                    raise UserError(
                        f"{name} belongs to your own rows: unset it, or give --train_file instead of a task."
                    )


def as_list(value: str | list[str] | None) -> list[str]:
    """The values of an option that takes one or several."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def number_of(split: str | float | None) -> float | None:
    """The number that `eval_split` is; None: it is unset, or the name of a split."""
    try:
        number = math.nan if split is None else float(split)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def check_scales(scales: Sequence[float], option: str) -> None:
    """Raise `UserError` unless all are parts of a change that need asking for, each once."""
    for scale in scales:
        if not math.isfinite(scale) or scale in (0.0, 1.0):
            raise UserError(
                f"{option}: {scale:g} is not a part to measure: give numbers such as 0.25 0.5 0.75; the"
                " base (0)"
                " and all of the change (1) are measured anyway."
            )
    if len(set(scales)) < len(scales):
        raise UserError(f"{option} {' '.join(f'{one:g}' for one in scales)}: one is given twice.")
