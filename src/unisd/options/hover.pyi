"""What an editor shows of an option, made from the table: `python tests/house/test_hover.py`."""

from dataclasses import dataclass
from typing import Any, Literal

from unisd.options import table

@dataclass
class UniSDOptions(table.UniSDOptions):
    teacher_model_kind: str = ...
    """Weights of the teacher: base (initial model), live (current student), ema (Eq. 3), or restart
    (a fixed copy of the student, taken anew every teacher_restart_steps). Default: 'base'.
    """

    teacher_update_rate: float = ...
    """EMA: weight of the student in each update, 1 - beta of Eq. 3 (0.01-0.05 is usual). Default:
    0.02.
    """

    teacher_sync_steps: int = ...
    """EMA: update the teacher every so many optimizer steps. Default: 1."""

    teacher_restart_steps: int | None = ...
    """restart: copy the student into the teacher every so many optimizer steps. Default: None."""

    teacher_context: str = ...
    """How much of the reference the teacher sees: full, half, hints (steps without results), answer
    (the final answer only), unconditioned (the reference without the problem), plain (nothing),
    wrong (a wrong one) or other (another problem, solved). Default: 'full'.
    """

    rollout_contexts: list[str] = ...
    """What the teacher is told of the step's own answers in place of teacher_context, the first
    that there is: sibling+feedback, sibling (another answer to the prompt, which passed),
    feedback (the grader's words on this answer), none (last: no loss). Default: [].
    """

    sibling: str = ...
    """Which passed answer is shown as sibling. Default: 'first'."""

    target: str | None = ...
    """What the student is moved towards instead of the teacher's distribution, by registered name
    (view_consensus, contrast, geometric, pmi); options as name:key=value,key=value. Default:
    None.
    """

    target_reference_steps: int | None = ...
    """A target's source step/...: copy the student every so many optimizer steps. Default: None."""

    teacher_prompt_layout: str = ...
    """append: reference after the problem in one user turn; turn: reference as the assistant's
    answer, then the problem again. `unisd probe` measures which one suits a model and task.
    Default: 'append'.
    """

    teacher_prompt_template: str | None = ...
    """Free template of the append layout with {prompt} and {privileged_context}; unset: built in.
    Default: None.
    """

    auxiliary_prompt_template: str | None = ...
    """Template of auxiliary views with {context} and {prompt}; unset: built in. Default: None."""

    teacher_chat_template_kwargs: dict[str, Any] | None = ...
    """The same for what the teacher reads; unset: the student's. Default: None."""

    max_teacher_prompt_length: int | None = ...
    """Longest teacher prompt in tokens; unset: what the model's context leaves. Longer rows are
    errors. Default: None.
    """

    distillation_alpha: float = ...
    """0: forward KL(teacher||student); 1: reverse KL; between: generalised Jensen-Shannon. Default:
    0.0.
    """

    distillation_weight: float = ...
    """Weight of the divergence beside the terms; 0: they are the whole loss. Default: 1.0."""

    distillation_mode: str = ...
    """full vocabulary, topk (a support of distillation_topk tokens), sampled (realised token); or
    nll: no teacher (SFT). Default: 'full'.
    """

    distillation_topk: int = ...
    """topk: size of the support. Default: 100."""

    distillation_topk_support: str = ...
    """topk: whose most likely tokens: teacher or student. Default: 'teacher'."""

    distillation_add_tail: bool = ...
    """topk: one more bucket for all other tokens. Default: True."""

    topk_estimator: str = ...
    """topk, reverse KL: support, that of the support and its tail; or residual, corrected by the
    realised token, so that it is right on average. Default: 'support'.
    """

    loss_aggregation: str = ...
    """sequence: mean per answer, then over answers; token: mean over all tokens of the step.
    Default: 'sequence'.
    """

    loss_implementation: str = ...
    """chunked (never holds logits, gradient in the forward pass) or plain (the oracle). Default:
    'chunked'.
    """

    loss_chunk_tokens: int | None = ...
    """Tokens projected to the vocabulary at once; unset: by memory. Default: None."""

    agreement: str = ...
    """Weigh by the model's agreement with itself over auxiliary contexts: none, token or sequence.
    Default: 'none'.
    """

    num_auxiliary_contexts: int = ...
    """Most auxiliary contexts used per row (K). Default: 3."""

    agreement_gamma: float = ...
    """Strength: the weight is 1 / (1 + gamma * scaled disagreement). Default: 0.01."""

    agreement_stat: str = ...
    """Disagreement of the K log-probabilities: var or range. Default: 'var'."""

    agreement_quantile: float = ...
    """token: quantile of disagreement that becomes the unit. Default: 0.95."""

    agreement_cap: float = ...
    """token: largest scaled disagreement. Default: 10.0."""

    agreement_budget_contexts: int | None = ...
    """Budget: score so many of a row's contexts only, drawn anew in every step (unset: all).
    Default: None.
    """

    agreement_uncertain_share: float = ...
    """Budget: score contexts only for this share of a step's rows, those of largest teacher
    entropy. Default: 1.0.
    """

    token_weights: list[str] = ...
    """More reliability weights by registered name, multiplied in order; options as
    name:key=value,key=value. Default: [].
    """

    weight_normalizer: str | None = ...
    """Divide by the sum of weights (weights) or by the token count (tokens; mean1: after scaling
    each answer's weights to mean 1); unset: as published for the last of the weights. Default:
    None.
    """

    contrastive_weight: float = ...
    """Weight of the hinge towards the reference, away from a wrong one. Default: 0.0."""

    contrastive_margin: float = ...
    """Margin of the hinge in nats. Default: 0.5."""

    feature_weight: float = ...
    """Weight of the squared distance of hidden states (mean over hidden size). Default: 0.0."""

    feature_layers: list[int] | None = ...
    """Layers to match (0 is the first block's output); unset: the head's input, after the final
    norm. Default: None.
    """

    terms: list[str] = ...
    """More terms of the loss by registered name; options as name:coefficient=value,key=value.
    Default: [].
    """

    token_clip: float | None = ...
    """Largest divergence of one token in nats (after the vocabulary sum). Default: None."""

    token_clip_quantile: float | None = ...
    """The same, as a quantile of the step's divergences (costs one student pass without gradient).
    Default: None.
    """

    entry_clip: float | None = ...
    """Largest summand of one vocabulary entry (OPSD: 0.05). Can make a token's loss negative.
    Default: None.
    """

    output_dir: str = ...
    """Where the run is written; unset: the first unused of unisd-output/RECIPE-MODEL-DATA, ...-2,
    ...-3. Default: None.
    """

    per_device_train_batch_size: int = ...
    """Rows per micro-batch and device. Default: 4."""

    num_train_epochs: float = ...
    """Passes over the training rows. Default: 1.0."""

    max_steps: int = ...
    """Optimizer steps of the run, in place of num_train_epochs; -1: unset. Default: -1."""

    learning_rate: float = ...
    """Peak learning rate. Default: 2e-05."""

    lr_scheduler_type: str = ...
    """Learning-rate schedule. Default: 'cosine'."""

    warmup_steps: float = ...
    """Warm-up: steps, or a share of all steps if below 1. Default: 0.1."""

    gradient_accumulation_steps: int = ...
    """Micro-batches per optimizer step. Default: 4."""

    bf16: bool = ...
    """Mixed precision: matrix products in bfloat16. Default: False."""

    gradient_checkpointing: bool = ...
    """Recompute activations to save memory; unset: switched on where a step would not fit without
    it. Default: False.
    """

    disable_dropout: bool = ...
    """Switch the model's own dropout and routers' noise off (not lora_dropout): student and teacher
    would differ by it. Default: True.
    """

    router_aux_loss_coef: float = ...
    """Weight of the load-balancing loss of a mixture of experts, as the model computes it; 0: none.
    Default: 0.0.
    """

    logging_steps: float = ...
    """Log every so many optimizer steps. Default: 1."""

    logging_nan_inf_filter: bool = ...
    """Hide nan and inf in the log; would wait for the device at every micro-batch. Default:
    False.
    """

    report_to: str | list[str] | None = ...
    """Trackers that get the metrics: tensorboard, wandb, trackio, ...; all (that are installed) or
    none. These three also get the final table and the kept answers, with texts of your rows.
    Default: 'none'.
    """

    eval_strategy: Literal["no", "steps", "epoch"] = ...
    """When to evaluate during training: no, steps (every eval_steps) or epoch; on the rows of
    validation_split, where none are held out on those that are reported. Default: 'no'.
    """

    eval_steps: float | None = ...
    """eval_strategy=steps: evaluate every so many steps; unset: every save_steps. Default: None."""

    early_stopping_patience: int | None = ...
    """Stop after so many evaluations in a row without a better metric_for_best_model; unset: never.
    Default: None.
    """

    save_strategy: Literal["no", "steps", "epoch", "best"] = ...
    """When to save a checkpoint: no, steps (every save_steps), epoch or best (so far). Default:
    'steps'.
    """

    save_steps: float = ...
    """save_strategy=steps: every so many steps, or a share of all steps if below 1. Default:
    500.
    """

    save_total_limit: int | None = ...
    """Checkpoints kept, the newest and the best; unset: all. Default: None."""

    push_to_hub: bool = ...
    """Upload the output folder at the end, with samples.jsonl and answers.json: texts of your rows
    are in them. Default: False.
    """

    hub_model_id: str | None = ...
    """push_to_hub: the repository; unset: named as output_dir. Default: None."""

    seed: int = ...
    """Seed of everything that is drawn at random. Default: 42."""

    remove_unused_columns: bool = ...
    """Columns are kept: the grader may need them. Default: False."""

    ddp_find_unused_parameters: bool | None = ...
    """DDP: all trained weights are used in every step. Default: False."""

    resume_from_checkpoint: str | None = ...
    """Go on from this checkpoint-N folder; alone: from the newest whole one of the run. Default:
    None.
    """

    temperature: float = ...
    """Temperature of the student's samples; the divergence divides all logits by it too. Default:
    0.7.
    """

    top_p: float = ...
    """Nucleus: sample from the smallest set of tokens that holds this probability. Default: 1.0."""

    top_k: int = ...
    """Sample from the k most likely tokens only; 0 means all. Default: 0."""

    min_p: float = ...
    """Sample only tokens at least this share as likely as the most likely one. Default: 0.0."""

    max_prompt_length: int | None = ...
    """Longest student prompt in tokens; unset: what the model's context leaves. Longer rows are
    errors. Default: None.
    """

    max_completion_length: int = ...
    """Most tokens that the student may write per answer. Default: 256."""

    num_generations: int = ...
    """Answers sampled per prompt. Default: 1."""

    rollout_batch_size: int = ...
    """Rows generated at once, sorted by length. Default: 64."""

    completion_source: str = ...
    """Who writes the answers trained on: student; reference (the dataset's, off-policy); initial
    (the untrained model, once a row); mixture (student with probability on_policy_share, else
    reference). Default: 'student'.
    """

    refresh_rollouts_every: int | None = ...
    """initial: take the student's weights of every so many optimizer steps for the initial model's;
    unset: never. Default: None.
    """

    on_policy_share: float = ...
    """mixture: share of rows that the student answers (lambda of GKD). Default: 0.5."""

    num_iterations: int = ...
    """Optimizer steps that each rollout serves; above 1 they are corrected. Default: 1."""

    importance_cap: float | None = ...
    """Largest importance ratio of a token, for reused answers and engines whose log-probabilities
    differ; none: no correction. Default: 2.0.
    """

    num_loss_tokens_to_skip: int = ...
    """First tokens of each answer that carry no loss. Default: 0."""

    merge_stop_tokens: bool = ...
    """Count all tokens that end an answer as one; no: the divergence tells them apart. Default:
    True.
    """

    mask_truncated_completions: bool = ...
    """Leave answers that ran into max_completion_length out of the loss. Default: False."""

    rollout_keep: str = ...
    """Which answers carry loss, by the grader's verdict: all, passed, failed, shortest_passed (one
    a prompt), mixed_groups (of prompts where some passed and some failed). Default: 'all'.
    """

    verdict_seconds: float = ...
    """Seconds that the grader has for one verdict. Default: 30.0."""

    chat_template_kwargs: dict[str, Any] | None = ...
    """Options of the model's chat template, as JSON: '{"enable_thinking": false}'; kept with the
    tokenizer; unset: those kept with it. Default: None.
    """

    use_vllm: bool = ...
    """Sample the student's answers with vLLM instead of transformers' generate. Default: False."""

    vllm_mode: str = ...
    """colocate: in this process, on its device; server: a `vllm serve` that runs already. Default:
    'colocate'.
    """

    vllm_gpu_memory_utilization: float = ...
    """colocate: share of the device's memory for vLLM (on a CPU: of the free memory, for its
    cache). Default: 0.3.
    """

    vllm_max_model_length: int | None = ...
    """colocate: longest prompt with its answer, in tokens; unset: the model's own context. Default:
    None.
    """

    vllm_enable_sleep_mode: bool = ...
    """colocate: give vLLM's memory back between rollouts (no effect on a CPU). Default: False."""

    vllm_server_base_url: str | None = ...
    """server: its address, such as http://host:8000; wins over host and port. Default: None."""

    vllm_server_host: str = ...
    """server: its host. Default: '127.0.0.1'."""

    vllm_server_port: int = ...
    """server: its port. Default: 8000."""

    vllm_server_timeout: float = ...
    """server: seconds that one answer may take; a server that fails for so long, and three times at
    least, counts as gone. Default: 240.0.
    """

    packing: str = ...
    """auto: packed rows where that is exact and faster (CUDA in 16 bits; on a CPU from 50M
    parameters), else padded; or packed, padded. Default: 'auto'.
    """

    token_budget: int | None = ...
    """Tokens per forward pass without gradient; unset: 2048 on a CPU, 8192 elsewhere. Default:
    None.
    """

    diagnostics: bool = ...
    """Count what the answers are made of: words of doubt, leaks, repetition. Default: True."""

    diagnostics_words: str = ...
    """Words of doubt: a language (en, de), or a file with one a line. Default: 'en'."""

    alarms: str = ...
    """When the last steps compare badly with the first (collapse, lost doubt, leak, forgetting,
    ...): warn, stop (with a checkpoint) or off. Default: 'warn'.
    """

    alarm_window: int = ...
    """Steps at the start, and at the end, that alarms compare. Default: 5."""

    diagnostics_probe_steps: int | None = ...
    """Every so many steps: the teacher under a wrong answer and without the question, and the
    likelihood of the probe set. Default: None.
    """

    diagnostics_probe_rows: int = ...
    """Rows of each probe. Default: 8."""

    eval_max_new_tokens: int | None = ...
    """Most tokens per greedy answer in evaluations; unset: max_completion_length. Default: None."""

    record_samples: int = ...
    """Answers of each logged step written to samples.jsonl with every token's divergence, weight
    and log-probabilities; 0: none. Default: 2.
    """

    max_skipped_steps: int = ...
    """A step whose loss or gradient is not finite is skipped; so many in a row stop the run, with
    the rows named. Default: 5.
    """
