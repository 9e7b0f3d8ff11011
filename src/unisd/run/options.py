"""Everything a run is told beside `UniSDConfig`: which recipe, model and data.

The parser of both is in `parsing.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from unisd.config import option
from unisd.recipes import DEFAULT

# Headings of `unisd train --help`, in this order; the other groups are those of `config.GROUPS`.
RUN_GROUPS = ("run", "model", "adapter", "data")


@dataclass
class RunOptions:
    """What `unisd train` runs; flat, as on the command line.

    See `config.UniSDConfig` for how it trains.
    """

    # -- run ---------------------------------------------------------------------------------------
    recipe: str = option(
        "run", "Published method whose settings are the defaults of this run; list: `unisd recipes`.", DEFAULT
    )
    dry_run: bool = option(
        "run", "Check everything, print the resolved options, an example and sizes; train nothing.", False
    )
    overwrite_output_dir: bool = option(
        "run", "Replace an earlier run in output_dir (its results and checkpoints).", False
    )

    before_cache: str | None = option(
        "run",
        "Folder that keeps `before` for other runs with the same model and evaluation rows, so that it is"
        " measured once.",
    )
    device_tdp: float | None = option(
        "run",
        "Watts of one device at full load, for the energy estimate; unset: what the driver of a GPU says.",
    )
    accelerate_config: str | None = option(
        "run",
        "Several processes of this machine: ddp, fsdp2, zero2, zero3 (fsdp2 and zero3 spread the weights) or"
        " an accelerate file of yours.",
    )
    num_processes: int | None = option(
        "run", "accelerate_config: processes; unset: one for each accelerator."
    )

    # -- model -------------------------------------------------------------------------------------
    model_name_or_path: str = option(
        "model",
        "A folder, hub id or .gguf file; or `pocket` (embedded, 1M parameters) or `smollm2-135m`.",
        "pocket",
    )
    dtype: str = option(
        "model",
        "float32, bfloat16 or float16; auto: float32, under an adapter bfloat16 where it is native. Products"
        " on one GPU are in bfloat16 (from 50M parameters) unless dtype, bf16 or fp16 is given.",
        "auto",
    )
    trust_remote_code: bool = option("model", "Run code that comes with the model.", False)
    load_in_4bit: bool = option(
        "model", "QLoRA: 4-bit base weights (needs bitsandbytes and use_peft).", False
    )

    # -- adapter -----------------------------------------------------------------------------------
    use_peft: bool = option("adapter", "Train a LoRA adapter instead of all weights.", False)
    lora_r: int = option("adapter", "Rank of the adapter.", 64)
    lora_alpha: int = option("adapter", "Scale of the adapter (divided by the rank).", 128)
    lora_dropout: float = option("adapter", "Dropout before the adapter.", 0.05)
    lora_target_modules: list[str] = option("adapter", "Modules to adapt, or all-linear.", ["all-linear"])

    # -- data --------------------------------------------------------------------------------------
    task: str | None = option("data", "Built-in or installed task; unset and no other data given: pocket.")
    data_files: list[str] | None = option("data", "Files that the task reads (tasks that come without data).")
    task_options: list[str] | None = option("data", "Further options of the task, as name=value.")
    allow_unsafe_code_execution: bool = option(
        "data", "Run model-written code with your own rights where the machine cannot isolate it.", False
    )
    noise: float | None = option("data", "Pocket task: share of wrong training references.")
    reference_style: str | None = option(
        "data", "Pocket task: annotators, hedged (in words of doubt), or own (the model's wording)."
    )
    train_file: str | None = option(
        "data", "Your rows: .jsonl, .json, .csv or .parquet with prompt and privileged_context."
    )
    eval_file: str | None = option(
        "data", "Rows to report on; unset: a seeded 10 % of the training rows, held out."
    )
    dataset_name: str | None = option(
        "data", "Your rows from a folder of data files, one that save_to_disk wrote, or a hub id."
    )
    dataset_config: str | None = option("data", "Configuration of dataset_name.")
    dataset_train_split: str = option(
        "data", "Split of dataset_name to train on (where it has splits).", "train"
    )
    agreement_contexts: str = option(
        "data",
        "Auxiliary contexts for rows that have none: columns (build none), random, retrieval or induction.",
        "columns",
    )
    embedder: str = option(
        "data", "retrieval: tfidf, model (its own hidden states) or a sentence-transformers model.", "tfidf"
    )
    negatives: str = option(
        "data", "Wrong references for rows that have none: columns (build none), corrupt or model.", "columns"
    )
    writer_url: str | None = option(
        "data",
        "induction, negatives=model: an OpenAI-compatible server whose model writes them; unset: the model"
        " itself.",
    )
    writer_model: str | None = option(
        "data", "writer_url: the model's name there; unset: the first that it serves."
    )
    columns: str | None = option("data", "Names of your columns: prompt=question,privileged_context=answer.")
    grader: str | None = option(
        "data",
        "Grades answers to your rows, so that accuracy is reported: exact, contains, choice, number or call"
        " compare with a column answer (else the completion); code runs a column tests.",
    )
    max_train_rows: int | None = option("data", "Train on the first so many rows only.")
    max_eval_rows: int = option("data", "Most rows of each evaluation (task, retention).", 400)

    # -- not on the command line -------------------------------------------------------------------
    explicit: frozenset[str] = field(default=frozenset(), init=False)
    """Names that the user gave in the config file or as flags."""
    command: tuple[str, ...] = field(default=(), init=False)
    """The arguments as given, for telling how to resume."""
