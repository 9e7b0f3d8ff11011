"""The options of the method: the teacher, the divergence and the five mechanisms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unisd.data.privilege import LEVELS
from unisd.options.option import option


@dataclass
class MethodOptions:
    """What a recipe is made of, beside its rollout."""

    # -- teacher: the same model under the reference (and other weights) ---------------------------
    teacher_model_kind: str = option(
        "teacher",
        "Weights of the teacher: base (initial model), live (current student), ema (Eq. 3), or restart (a"
        " fixed copy of the student, replaced every teacher_restart_steps).",
        "base",
        choices=("base", "live", "ema", "restart"),
    )
    teacher_update_rate: float = option(
        "teacher",
        "EMA: weight of the student in each update, 1 - beta of Eq. 3 (0.01-0.05 is usual).",
        0.02,
        low=0,
        high=1,
    )
    teacher_sync_steps: int = option("teacher", "EMA: update the teacher every N optimizer steps.", 1, low=1)
    teacher_restart_steps: int | None = option(
        "teacher", "restart: copy the student into the teacher every N optimizer steps.", low=1
    )
    teacher_context: str = option(
        "teacher",
        "How much of the reference the teacher sees: full, half, hints (steps without results), answer"
        " (only the final answer), unconditioned (the reference without the problem), plain (nothing), wrong"
        " (a wrong reference) or other (another problem with its solution).",
        "full",
        choices=LEVELS,
    )
    rollout_contexts: list[str] = option(
        "teacher",
        "What the teacher sees about the step's own answers, instead of teacher_context; the first"
        " available one is used: sibling+feedback, sibling (another answer to the prompt, which passed),"
        " feedback (the grader's words on this answer), none (last: no loss).",
        [],
    )
    sibling: str = option(
        "teacher", "Which passed answer is used as sibling.", "first", choices=("first", "shortest")
    )
    target: str | None = option(
        "teacher",
        "What the student moves towards instead of the teacher's distribution, by registered name"
        " (view_consensus, contrast, geometric, pmi); options as name:key=value,key=value.",
    )
    target_reference_steps: int | None = option(
        "teacher", "For a target's source step/...: copy the student every N optimizer steps.", low=1
    )
    teacher_prompt_layout: str = option(
        "teacher",
        "append: reference after the problem in one user turn; turn: reference as the assistant's answer,"
        " then the problem again. `unisd probe` measures which one suits a model and task.",
        "append",
        choices=("append", "turn"),
        shared=("prepare",),
    )
    teacher_prompt_template: str | None = option(
        "teacher",
        "Template of the append layout, with {prompt} and {privileged_context}; unset: built-in.",
        shared=("probe", "prepare"),
    )
    auxiliary_prompt_template: str | None = option(
        "teacher",
        "Template of auxiliary views, with {context} and {prompt}; unset: built-in.",
        shared=("probe", "prepare"),
    )
    teacher_chat_template_kwargs: dict[str, Any] | None = option(
        "teacher",
        "chat_template_kwargs for the teacher's prompts; unset: the student's.",
        shared=("probe", "prepare"),
    )
    max_teacher_prompt_length: int | None = option(
        "teacher",
        "Longest teacher prompt in tokens; longer rows are errors. Unset: what the model's context leaves"
        " room for.",
        low=1,
        shared=("prepare",),
    )

    # -- divergence (Eq. 7-8) ----------------------------------------------------------------------
    distillation_alpha: float = option(
        "divergence",
        "0: forward KL(teacher||student); 1: reverse KL; between: generalised Jensen-Shannon.",
        0.0,
    )
    distillation_weight: float = option(
        "divergence",
        "Weight of the divergence beside the terms; 0: the terms are the whole loss.",
        1.0,
        low=0,
    )
    distillation_mode: str = option(
        "divergence",
        "full (all of the vocabulary), topk (a support of distillation_topk tokens), sampled (the realised"
        " token) or nll (no teacher: SFT).",
        "full",
        choices=("full", "topk", "sampled", "nll"),
    )
    distillation_topk: int = option("divergence", "topk: size of the support.", 100, low=1)
    distillation_topk_support: str = option(
        "divergence",
        "topk: take the most likely tokens of the teacher or of the student.",
        "teacher",
        choices=("teacher", "student"),
    )
    distillation_add_tail: bool = option("divergence", "topk: add one bucket for all other tokens.", True)
    topk_estimator: str = option(
        "divergence",
        "topk with reverse KL: support (of the support and its tail) or residual (corrected by the realised"
        " token, so that it is unbiased).",
        "support",
        choices=("support", "residual"),
    )
    loss_aggregation: str = option(
        "divergence",
        "sequence: mean per answer, then over answers; token: mean over all tokens of the step.",
        "sequence",
        choices=("sequence", "token"),
    )
    loss_implementation: str = option(
        "divergence",
        "chunked (never holds logits, gradient in the forward pass) or plain (the reference implementation).",
        "chunked",
        choices=("chunked", "plain"),
    )
    loss_chunk_tokens: int | None = option(
        "divergence", "Tokens projected to the vocabulary at once; unset: chosen by memory.", low=1
    )

    # -- A. agreement and other reliability weights ------------------------------------------------
    agreement: str = option(
        "agreement",
        "Weigh by the model's agreement with itself across auxiliary contexts: none, token or sequence.",
        "none",
        choices=("none", "token", "sequence"),
    )
    num_auxiliary_contexts: int = option(
        "agreement", "Maximum auxiliary contexts used per row (K).", 3, low=0, shared=("probe", "prepare")
    )
    agreement_gamma: float = option(
        "agreement",
        "Strength. token: the weight is 1 / (1 + gamma * scaled disagreement); sequence: exp(-gamma *"
        " disagreement).",
        0.01,
        low=0,
    )
    agreement_stat: str = option(
        "agreement",
        "Measure of disagreement of the K log-probabilities: var or range.",
        "var",
        choices=("var", "range"),
    )
    agreement_quantile: float = option(
        "agreement", "token: the quantile of disagreement that is scaled to 1.", 0.95, low=0, high=1
    )
    agreement_cap: float = option("agreement", "token: largest scaled disagreement.", 10.0, low=1e-06)
    agreement_budget_contexts: int | None = option(
        "agreement",
        "Budget: score only this many of a row's contexts, drawn again in every step; unset: all.",
        low=2,
    )
    agreement_uncertain_share: float = option(
        "agreement",
        "Budget: score contexts for only this share of a step's rows, of the largest teacher entropy.",
        1.0,
        low=0,
        high=1,
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
        " answer's weights to mean 1). Unset: as published for the last of the weights.",
        choices=(None, "weights", "tokens", "mean1"),
    )

    # -- C. contrast (Eq. 4-5) ---------------------------------------------------------------------
    contrastive_weight: float = option(
        "contrast", "Weight of the hinge loss towards the reference and away from a wrong one.", 0.0, low=0
    )
    contrastive_margin: float = option("contrast", "Margin of the hinge in nats.", 0.5, low=0)

    # -- D. feature matching (Eq. 6) ---------------------------------------------------------------
    feature_weight: float = option(
        "features", "Weight of the squared distance of hidden states (mean over hidden size).", 0.0, low=0
    )
    feature_layers: list[int] | None = option(
        "features",
        "Layers to match (0: the output of the first block); unset: the head's input, after the final norm.",
    )

    # -- further terms of the loss -----------------------------------------------------------------
    terms: list[str] = option(
        "terms",
        "More terms of the loss by registered name; options as name:coefficient=value,key=value.",
        [],
    )

    # -- E. clipping -------------------------------------------------------------------------------
    token_clip: float | None = option(
        "clipping",
        "Largest divergence of one token in nats (after the vocabulary sum).",
        low=1e-09,
        excludes="token_clip_quantile",
    )
    token_clip_quantile: float | None = option(
        "clipping",
        "token_clip as a quantile of the step's divergences (costs one student pass without gradient).",
        low=1e-06,
        high=0.99999,
    )
    entry_clip: float | None = option(
        "clipping",
        "Largest summand of one vocabulary entry (OPSD: 0.05). Can make a token's loss negative.",
        low=1e-09,
    )
