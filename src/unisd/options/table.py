"""Every option of how a run trains; those of the method itself are in `method_table.py`.

Flat names, TRL's where TRL has one. What `unisd train` runs is in `run/options.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from unisd.data.outcomes import KEEPS, NO_LOSS
from unisd.data.privilege import BUILT
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
        "Folder of the run; unset: the first unused of unisd-output/RECIPE-MODEL-DATA, ...-2, ...-3.",
    )
    per_device_train_batch_size: int = option("training", "Rows per micro-batch and device.", 4, low=1)
    num_train_epochs: float = option("training", "Passes over the training rows.", 1.0)
    max_steps: int = option(
        "training", "Optimizer steps of the run, instead of num_train_epochs; -1: unset.", -1
    )
    learning_rate: float = option("training", "Peak learning rate.", 2e-5)
    lr_scheduler_type: str = option("training", "Learning-rate schedule.", "cosine")
    warmup_steps: float = option("training", "Warm-up: steps, or a share of all steps if below 1.", 0.1)
    gradient_accumulation_steps: int = option("training", "Micro-batches per optimizer step.", 4, low=1)
    bf16: bool = option("training", "Mixed precision: matrix products in bfloat16.", False)
    gradient_checkpointing: bool = option(
        "training",
        "Recompute activations to save memory; unset: switched on if a step would not fit otherwise.",
        False,
    )
    disable_dropout: bool = option(
        "training",
        "Switch off the model's own dropout and router noise (not lora_dropout), which would make student"
        " and teacher differ.",
        True,
    )
    router_aux_loss_coef: float = option(
        "training",
        "Weight of the load-balancing loss of a mixture-of-experts model, as the model computes it; 0: none.",
        0.0,
        low=0,
    )
    logging_steps: float = option("training", "Log every N optimizer steps.", 1)
    logging_nan_inf_filter: bool = option(
        "inherited",
        "Hide nan and inf in the log; this would wait for the device at every micro-batch.",
        False,
    )
    report_to: str | list[str] | None = option(
        "training",
        "Trackers that receive the metrics: tensorboard, wandb, trackio, ...; all (that are installed) or"
        " none. These three also receive the final table and the kept answers, which contain texts of your"
        " rows.",
        "none",
    )
    eval_strategy: Literal["no", "steps", "epoch"] = option(
        "training",
        "When to evaluate during training: no, steps (every eval_steps) or epoch. Uses the rows of"
        " validation_split; if none are held out, the reported rows.",
        "no",
    )
    eval_steps: float | None = option(
        "training", "eval_strategy=steps: evaluate every N steps; unset: every save_steps."
    )
    early_stopping_patience: int | None = option(
        "training",
        "Stop after N evaluations in a row without a better metric_for_best_model; unset: never.",
        low=1,
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] = option(
        "training",
        "When to save a checkpoint: no, steps (every save_steps), epoch or best (at each new best).",
        "steps",
    )
    save_steps: float = option(
        "training", "save_strategy=steps: save every N steps, or a share of all steps if below 1.", 500
    )
    save_total_limit: int | None = option(
        "training", "Maximum number of checkpoints kept, the newest and the best; unset: all."
    )
    push_to_hub: bool = option(
        "training",
        "Upload the output folder at the end, with samples.jsonl and answers.json, which contain texts of"
        " your rows.",
        False,
    )
    hub_model_id: str | None = option(
        "training", "push_to_hub: the repository; unset: the name of output_dir."
    )
    seed: int = option(
        "training",
        "Seed of all random draws.",
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
        "training",
        "Continue from this checkpoint-N folder; without a value: from the newest complete one of the run.",
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
        "Nucleus sampling: sample from the smallest set of tokens with this total probability.",
        1.0,
        low=1e-06,
        high=1,
    )
    top_k: int = option("rollout", "Sample only from the k most likely tokens; 0: from all.", 0, low=0)
    min_p: float = option(
        "rollout",
        "Sample only tokens at least this share as likely as the most likely one.",
        0.0,
        low=0,
        high=1,
    )
    max_prompt_length: int | None = option(
        "rollout",
        "Longest student prompt in tokens; longer rows are errors. Unset: what the model's context leaves"
        " room for.",
        low=1,
    )
    max_completion_length: int = option(
        "rollout", "Maximum tokens per answer of the student.", 256, low=1, shared=("prepare",)
    )
    num_generations: int = option("rollout", "Answers sampled per prompt.", 1, low=1)
    rollout_batch_size: int = option("rollout", "Rows generated at once, sorted by length.", 64, low=1)
    completion_source: str = option(
        "rollout",
        "Who writes the answers to train on: student; reference (from the dataset, off-policy); initial"
        " (the untrained model, once per row); mixture (student with probability on_policy_share, else"
        " reference).",
        "student",
        choices=("student", "reference", "initial", "mixture"),
    )
    refresh_rollouts_every: int | None = option(
        "rollout",
        "initial: replace the initial model's weights with the student's every N optimizer steps; unset:"
        " never.",
        low=1,
    )
    on_policy_share: float = option(
        "rollout", "mixture: share of rows that the student answers (lambda of GKD).", 0.5, low=0, high=1
    )
    num_iterations: int = option(
        "rollout",
        "Optimizer steps that use each rollout; above 1, importance ratios correct for the reuse.",
        1,
        low=1,
    )
    importance_cap: float | None = option(
        "rollout",
        "Largest importance ratio of a token, for reused answers and for engines whose log-probabilities"
        " differ; none: no correction.",
        2.0,
        low=1,
    )
    num_loss_tokens_to_skip: int = option(
        "rollout", "Number of tokens at the start of each answer that carry no loss.", 0, low=0
    )
    merge_stop_tokens: bool = option(
        "rollout",
        "Treat all tokens that end an answer as one; false: the divergence distinguishes them.",
        True,
    )
    mask_truncated_completions: bool = option(
        "rollout", "Exclude answers that reached max_completion_length from the loss.", False
    )

    rollout_keep: str = option(
        "rollout",
        "Which answers carry loss, by the grader's verdict: all, passed, failed, shortest_passed (one per"
        " prompt), mixed_groups (of prompts where some passed and some failed).",
        "all",
        choices=KEEPS,
    )
    verdict_seconds: float = option(
        "rollout", "Time limit for one verdict of the grader, in seconds.", 30.0, low=0.01
    )
    chat_template_kwargs: dict[str, Any] | None = option(
        "rollout",
        "Options of the model's chat template, as JSON: '{\"enable_thinking\": false}'. They are saved with"
        " the tokenizer; unset: those saved with it.",
        shared=("probe", "prepare", "eval"),
    )

    # -- vllm: another engine for the rollouts -----------------------------------------------------
    use_vllm: bool = option(
        "vllm", "Sample the student's answers with vLLM instead of transformers' generate.", False
    )
    vllm_mode: str = option(
        "vllm",
        "colocate: in this process, on its device; server: a `vllm serve` that is already running.",
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
        "vllm", "colocate: maximum tokens of a prompt with its answer; unset: the model's own context.", low=2
    )
    vllm_enable_sleep_mode: bool = option(
        "vllm", "colocate: release vLLM's memory between rollouts (no effect on a CPU).", False
    )
    vllm_server_base_url: str | None = option(
        "vllm", "server: address, such as http://host:8000; overrides host and port."
    )
    vllm_server_host: str = option("vllm", "server: host.", "127.0.0.1")
    vllm_server_port: int = option("vllm", "server: port.", 8000, low=1, high=65535)
    vllm_server_timeout: float = option(
        "vllm",
        "server: seconds that one answer may take. A server counts as gone after failing for this long, and"
        " at least three times.",
        240.0,
        low=0.1,
    )

    # -- scoring -----------------------------------------------------------------------------------
    packing: str = option(
        "scoring",
        "auto: packed rows where this is exact and faster (CUDA in 16 bits; CPU from 50M parameters), else"
        " padded; or packed, padded.",
        "auto",
        choices=("auto", "packed", "padded"),
    )
    token_budget: int | None = option(
        "scoring", "Tokens per forward pass without gradient; unset: 2048 on a CPU, 8192 elsewhere.", low=1
    )

    # -- diagnostics -------------------------------------------------------------------------------
    diagnostics: bool = option(
        "diagnostics", "Measure properties of the answers: words of doubt, leaks, repetition.", True
    )
    diagnostics_words: str = option(
        "diagnostics", "Words of doubt: a language (en, de), or a file with one word per line.", "en"
    )
    alarms: str = option(
        "diagnostics",
        "What to do if the last steps compare badly with the first (collapse, lost doubt, leak, forgetting,"
        " ...): warn, stop (with a checkpoint) or off.",
        "warn",
        choices=("warn", "stop", "off"),
    )
    alarm_window: int = option(
        "diagnostics", "Number of steps at the start, and at the end, that alarms compare.", 5, low=1
    )
    diagnostics_probe_steps: int | None = option(
        "diagnostics",
        "Every N steps, probe the teacher with a wrong answer and without the question, and the likelihood"
        " of the probe set.",
        low=1,
    )
    diagnostics_probe_rows: int = option("diagnostics", "Rows per probe.", 8, low=1)
    diagnostics_gradient_steps: int | None = option(
        "diagnostics",
        "Every N steps from the first on, measure how much of the gradient each mechanism makes (a pass with"
        " gradient for each).",
        low=1,
    )

    # -- evaluation --------------------------------------------------------------------------------
    eval_max_new_tokens: int | None = option(
        "evaluation", "Maximum tokens per greedy answer in evaluations; unset: max_completion_length.", low=1
    )

    record_samples: int = option(
        "evaluation",
        "Answers per logged step written to samples.jsonl, with the divergence, weight and"
        " log-probabilities of every token; 0: none.",
        2,
        low=0,
        high=100,
    )

    # -- safety: what keeps a long run from losing work --------------------------------------------
    max_skipped_steps: int = option(
        "safety",
        "A step with a non-finite loss or gradient is skipped; this many in a row stop the run, which names"
        " the rows.",
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
        told = self.teacher_context not in ("plain", *BUILT) or self.target is not None
        if not told and self.completion_source in ("student", "initial"):
            return False
        return self.distillation_mode != "nll" or self.completion_source in ("reference", "mixture")
