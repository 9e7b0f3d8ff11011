"""Every option of how a run trains; those of the method itself are in `method_table.py`.

Flat names, TRL's where TRL has one. What `unisd train` runs is in `run/options.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from unisd.data.outcomes import KEEPS, NO_LOSS
from unisd.data.privilege import REMEDIES
from unisd.options.method_table import MethodOptions
from unisd.options.option import option

GROUPS = (
    "rollout",
    "vllm",
    "teacher",
    "divergence",
    "agreement",
    "contrast",
    "features",
    "terms",
    "clipping",
    "scoring",
    "diagnostics",
    "evaluation",
    "safety",
    "training",
    "inherited",
)
"""Headings of help, in this order. The last two belong to transformers: its most used options, and
those that a run seldom sets.
"""


@dataclass
class UniSDOptions(MethodOptions):
    """The options that `UniSDConfig` adds to `TrainingArguments`, and those whose default it
    changes or whose meaning help explains.
    """

    # -- transformers' options, in its order: the most used, and what has another default here -----
    output_dir: str = option(  # None only until construction
        "training",
        "Where the run is written; unset: the first unused of unisd-output/RECIPE-MODEL-DATA, ...-2, ...-3.",
    )
    per_device_train_batch_size: int = option("training", "Rows per micro-batch and device.", 4, low=1)
    num_train_epochs: float = option("training", "Passes over the training rows.", 1.0)
    max_steps: int = option(
        "training", "Optimizer steps of the run, in place of num_train_epochs; -1: unset.", -1
    )
    learning_rate: float = option("training", "Peak learning rate.", 2e-5)
    lr_scheduler_type: str = option("training", "Learning-rate schedule.", "cosine")
    warmup_steps: float = option("training", "Warm-up: steps, or a share of all steps if below 1.", 0.1)
    gradient_accumulation_steps: int = option("training", "Micro-batches per optimizer step.", 4, low=1)
    bf16: bool = option("training", "Mixed precision: matrix products in bfloat16.", False)
    gradient_checkpointing: bool = option(
        "training",
        "Recompute activations to save memory; unset: switched on where a step would not fit without it.",
        False,
    )
    disable_dropout: bool = option(
        "training",
        "Switch the model's own dropout and routers' noise off (not lora_dropout): student and teacher would"
        " differ by it.",
        True,
    )
    router_aux_loss_coef: float = option(
        "training",
        "Weight of the load-balancing loss of a mixture of experts, as the model computes it; 0: none.",
        0.0,
        low=0,
    )
    logging_steps: float = option("training", "Log every so many optimizer steps.", 1)
    logging_nan_inf_filter: bool = option(
        "inherited", "Hide nan and inf in the log; would wait for the device at every micro-batch.", False
    )
    report_to: str | list[str] | None = option(
        "training",
        "Trackers that get the metrics: tensorboard, wandb, trackio, ...; all (that are installed) or none."
        " These three also get the final table and the kept answers, with texts of your rows.",
        "none",
    )
    eval_strategy: Literal["no", "steps", "epoch"] = option(
        "training",
        "When to evaluate during training: no, steps (every eval_steps) or epoch; on the rows of"
        " validation_split, where none are held out on those that are reported.",
        "no",
    )
    eval_steps: float | None = option(
        "training", "eval_strategy=steps: evaluate every so many steps; unset: every save_steps."
    )
    early_stopping_patience: int | None = option(
        "training",
        "Stop after so many evaluations in a row without a better metric_for_best_model; unset: never.",
        low=1,
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] = option(
        "training",
        "When to save a checkpoint: no, steps (every save_steps), epoch or best (so far).",
        "steps",
    )
    save_steps: float = option(
        "training", "save_strategy=steps: every so many steps, or a share of all steps if below 1.", 500
    )
    save_total_limit: int | None = option(
        "training", "Checkpoints kept, the newest and the best; unset: all."
    )
    push_to_hub: bool = option(
        "training",
        "Upload the output folder at the end, with samples.jsonl and answers.json: texts of your rows are in"
        " them.",
        False,
    )
    hub_model_id: str | None = option("training", "push_to_hub: the repository; unset: named as output_dir.")
    seed: int = option(
        "training",
        "Seed of everything that is drawn at random.",
        42,
        low=0,
        high=2**32 - 1,
        shared=("probe", "prepare", "eval", "grade", "contamination"),
    )
    remove_unused_columns: bool = option("inherited", "Columns are kept: the grader may need them.", False)
    ddp_find_unused_parameters: bool | None = option(
        "inherited", "DDP: all trained weights are used in every step.", False
    )
    resume_from_checkpoint: str | None = option(
        "training", "Go on from this checkpoint-N folder; alone: from the newest whole one of the run."
    )

    # -- rollout: the student answers the prompt ---------------------------------------------------
    temperature: float = option(
        "rollout",
        "Temperature of the student's samples; the divergence divides all logits by it too.",
        0.7,
        low=0,
        high=100,
    )
    top_p: float = option(
        "rollout",
        "Nucleus: sample from the smallest set of tokens that holds this probability.",
        1.0,
        low=1e-06,
        high=1,
    )
    top_k: int = option("rollout", "Sample from the k most likely tokens only; 0 means all.", 0, low=0)
    min_p: float = option(
        "rollout",
        "Sample only tokens at least this share as likely as the most likely one.",
        0.0,
        low=0,
        high=1,
    )
    max_prompt_length: int | None = option(
        "rollout",
        "Longest student prompt in tokens; unset: what the model's context leaves. Longer rows are errors.",
        low=1,
    )
    max_completion_length: int = option(
        "rollout", "Most tokens that the student may write per answer.", 256, low=1, shared=("prepare",)
    )
    num_generations: int = option("rollout", "Answers sampled per prompt.", 1, low=1)
    rollout_batch_size: int = option("rollout", "Rows generated at once, sorted by length.", 64, low=1)
    completion_source: str = option(
        "rollout",
        "Who writes the answers trained on: student; reference (the dataset's, off-policy); initial (the"
        " untrained model, once a row); mixture (student with probability on_policy_share, else reference).",
        "student",
        choices=("student", "reference", "initial", "mixture"),
    )
    refresh_rollouts_every: int | None = option(
        "rollout",
        "initial: take the student's weights of every so many optimizer steps for the initial model's; unset:"
        " never.",
        low=1,
    )
    on_policy_share: float = option(
        "rollout", "mixture: share of rows that the student answers (lambda of GKD).", 0.5, low=0, high=1
    )
    num_iterations: int = option(
        "rollout", "Optimizer steps that each rollout serves; above 1 they are corrected.", 1, low=1
    )
    importance_cap: float | None = option(
        "rollout",
        "Largest importance ratio of a token, for reused answers and engines whose log-probabilities differ;"
        " none: no correction.",
        2.0,
        low=1,
    )
    num_loss_tokens_to_skip: int = option(
        "rollout", "First tokens of each answer that carry no loss.", 0, low=0
    )
    merge_stop_tokens: bool = option(
        "rollout", "Count all tokens that end an answer as one; no: the divergence tells them apart.", True
    )
    mask_truncated_completions: bool = option(
        "rollout", "Leave answers that ran into max_completion_length out of the loss.", False
    )

    rollout_keep: str = option(
        "rollout",
        "Which answers carry loss, by the grader's verdict: all, passed, failed, shortest_passed (one a"
        " prompt), mixed_groups (of prompts where some passed and some failed).",
        "all",
        choices=KEEPS,
    )
    verdict_seconds: float = option("rollout", "Seconds that the grader has for one verdict.", 30.0, low=0.01)
    chat_template_kwargs: dict[str, Any] | None = option(
        "rollout",
        "Options of the model's chat template, as JSON: '{\"enable_thinking\": false}'; kept with the"
        " tokenizer; unset: those kept with it.",
        shared=("probe", "prepare", "eval"),
    )

    # -- vllm: another engine for the rollouts -----------------------------------------------------
    use_vllm: bool = option(
        "vllm", "Sample the student's answers with vLLM instead of transformers' generate.", False
    )
    vllm_mode: str = option(
        "vllm",
        "colocate: in this process, on its device; server: a `vllm serve` that runs already.",
        "colocate",
        choices=("colocate", "server"),
    )
    vllm_gpu_memory_utilization: float = option(
        "vllm",
        "colocate: share of the device's memory for vLLM (on a CPU: of the free memory, for its cache).",
        0.3,
        low=0.01,
        high=1,
    )
    vllm_max_model_length: int | None = option(
        "vllm", "colocate: longest prompt with its answer, in tokens; unset: the model's own context.", low=2
    )
    vllm_enable_sleep_mode: bool = option(
        "vllm", "colocate: give vLLM's memory back between rollouts (no effect on a CPU).", False
    )
    vllm_server_base_url: str | None = option(
        "vllm", "server: its address, such as http://host:8000; wins over host and port."
    )
    vllm_server_host: str = option("vllm", "server: its host.", "127.0.0.1")
    vllm_server_port: int = option("vllm", "server: its port.", 8000, low=1, high=65535)
    vllm_server_timeout: float = option(
        "vllm",
        "server: seconds that one answer may take; a server that fails for so long, and three times at least,"
        " counts as gone.",
        240.0,
        low=0.1,
    )

    # -- scoring -----------------------------------------------------------------------------------
    packing: str = option(
        "scoring",
        "auto: packed rows where that is exact and faster (CUDA in 16 bits; on a CPU from 50M parameters),"
        " else padded; or packed, padded.",
        "auto",
        choices=("auto", "packed", "padded"),
    )
    token_budget: int | None = option(
        "scoring", "Tokens per forward pass without gradient; unset: 2048 on a CPU, 8192 elsewhere.", low=1
    )

    # -- diagnostics -------------------------------------------------------------------------------
    diagnostics: bool = option(
        "diagnostics", "Count what the answers are made of: words of doubt, leaks, repetition.", True
    )
    diagnostics_words: str = option(
        "diagnostics", "Words of doubt: a language (en, de), or a file with one a line.", "en"
    )
    alarms: str = option(
        "diagnostics",
        "When the last steps compare badly with the first (collapse, lost doubt, leak, forgetting, ...):"
        " warn, stop (with a checkpoint) or off.",
        "warn",
        choices=("warn", "stop", "off"),
    )
    alarm_window: int = option(
        "diagnostics", "Steps at the start, and at the end, that alarms compare.", 5, low=1
    )
    diagnostics_probe_steps: int | None = option(
        "diagnostics",
        "Every so many steps: the teacher under a wrong answer and without the question, and the likelihood"
        " of the probe set.",
        low=1,
    )
    diagnostics_probe_rows: int = option("diagnostics", "Rows of each probe.", 8, low=1)

    # -- evaluation --------------------------------------------------------------------------------
    eval_max_new_tokens: int | None = option(
        "evaluation", "Most tokens per greedy answer in evaluations; unset: max_completion_length.", low=1
    )

    record_samples: int = option(
        "evaluation",
        "Answers of each logged step written to samples.jsonl with every token's divergence, weight and"
        " log-probabilities; 0: none.",
        2,
        low=0,
        high=100,
    )

    # -- safety: what keeps a long run from losing work --------------------------------------------
    max_skipped_steps: int = option(
        "safety",
        "A step whose loss or gradient is not finite is skipped; so many in a row stop the run, with the rows"
        " named.",
        5,
        low=1,
    )

    @property
    def uses_reference(self) -> bool:
        """Whether training looks at the rows' references: not where the likelihood of the model's
        own answers is all.
        """
        if self.rollout_contexts[-1:] == [NO_LOSS] and self.completion_source in ("student", "initial"):
            return False  # the teacher is told of the answers alone
        told = self.teacher_context not in ("plain", *REMEDIES) or self.target is not None
        if not told and self.completion_source in ("student", "initial"):
            return False
        return self.distillation_mode != "nll" or self.completion_source in ("reference", "mixture")
