"""What an editor shows of an option, made from the table: `python tests/house/test_hover.py`."""

from dataclasses import dataclass
from typing import Any, Literal

from unisd.options import table

@dataclass
class UniSDOptions(table.UniSDOptions):
    teacher_model_kind: str = ...
    """Weights of the teacher: base (initial model), live (current student), ema (Eq. 3), or restart
    (a fixed copy of the student, replaced every teacher_restart_steps). Default: 'base'.
    """

    teacher_update_rate: float = ...
    """EMA: weight of the student in each update, 1 - beta of Eq. 3 (0.01-0.05 is usual). Default:
    0.02.
    """

    teacher_sync_steps: int = ...
    """EMA: update the teacher every N optimizer steps. Default: 1."""

    teacher_restart_steps: int | None = ...
    """restart: copy the student into the teacher every N optimizer steps. Default: None."""

    teacher_context: str = ...
    """How much of the reference the teacher sees: full, half, hints (steps without results), answer
    (only the final answer), unconditioned (the reference without the problem), plain (nothing),
    wrong (a wrong reference) or other (another problem with its solution). Default: 'full'.
    """

    rollout_contexts: list[str] = ...
    """What the teacher sees about the step's own answers, instead of teacher_context; the first
    available one is used: sibling+feedback, sibling (another answer to the prompt, which
    passed), feedback (the grader's words on this answer), none (last: no loss). Default: [].
    """

    sibling: str = ...
    """Which passed answer is used as sibling. Default: 'first'."""

    target: str | None = ...
    """What the student moves towards instead of the teacher's distribution, by registered name
    (view_consensus, contrast, geometric, pmi); options as name:key=value,key=value. Default:
    None.
    """

    target_reference_steps: int | None = ...
    """For a target's source step/...: copy the student every N optimizer steps. Default: None."""

    teacher_prompt_layout: str = ...
    """append: reference after the problem in one user turn; turn: reference as the assistant's
    answer, then the problem again. `unisd probe` measures which one suits a model and task.
    Default: 'append'.
    """

    teacher_prompt_template: str | None = ...
    """Template of the append layout, with {prompt} and {privileged_context}; unset: built-in.
    Default: None.
    """

    auxiliary_prompt_template: str | None = ...
    """Template of auxiliary views, with {context} and {prompt}; unset: built-in. Default: None."""

    teacher_chat_template_kwargs: dict[str, Any] | None = ...
    """chat_template_kwargs for the teacher's prompts; unset: the student's. Default: None."""

    max_teacher_prompt_length: int | None = ...
    """Longest teacher prompt in tokens; longer rows are errors. Unset: what the model's context
    leaves room for. Default: None.
    """

    distillation_alpha: float = ...
    """0: forward KL(teacher||student); 1: reverse KL; between: generalised Jensen-Shannon. Default:
    0.0.
    """

    distillation_weight: float = ...
    """Weight of the divergence beside the terms; 0: the terms are the whole loss. Default: 1.0."""

    distillation_mode: str = ...
    """full (all of the vocabulary), topk (a support of distillation_topk tokens), sampled (the
    realised token) or nll (no teacher: SFT). Default: 'full'.
    """

    distillation_topk: int = ...
    """topk: size of the support. Default: 100."""

    distillation_topk_support: str = ...
    """topk: take the most likely tokens of the teacher or of the student. Default: 'teacher'."""

    distillation_add_tail: bool = ...
    """topk: add one bucket for all other tokens. Default: True."""

    topk_estimator: str = ...
    """topk with reverse KL: support (of the support and its tail) or residual (corrected by the
    realised token, so that it is unbiased). Default: 'support'.
    """

    loss_aggregation: str = ...
    """sequence: mean per answer, then over answers; token: mean over all tokens of the step.
    Default: 'sequence'.
    """

    loss_implementation: str = ...
    """chunked (never holds logits, gradient in the forward pass) or plain (the reference
    implementation). Default: 'chunked'.
    """

    loss_chunk_tokens: int | None = ...
    """Tokens projected to the vocabulary at once; unset: chosen by memory. Default: None."""

    agreement: str = ...
    """Weigh by the model's agreement with itself across auxiliary contexts: none, token or
    sequence. Default: 'none'.
    """

    num_auxiliary_contexts: int = ...
    """Maximum auxiliary contexts used per row (K). Default: 3."""

    agreement_gamma: float = ...
    """Strength. token: the weight is 1 / (1 + gamma * scaled disagreement); sequence: exp(-gamma *
    disagreement). Default: 0.01.
    """

    agreement_stat: str = ...
    """Measure of disagreement of the K log-probabilities: var or range. Default: 'var'."""

    agreement_quantile: float = ...
    """token: the quantile of disagreement that is scaled to 1. Default: 0.95."""

    agreement_cap: float = ...
    """token: largest scaled disagreement. Default: 10.0."""

    agreement_budget_contexts: int | None = ...
    """Budget: score only this many of a row's contexts, drawn again in every step; unset: all.
    Default: None.
    """

    agreement_uncertain_share: float = ...
    """Budget: score contexts for only this share of a step's rows, of the largest teacher entropy.
    Default: 1.0.
    """

    token_weights: list[str] = ...
    """More reliability weights by registered name, multiplied in order; options as
    name:key=value,key=value. Default: [].
    """

    weight_normalizer: str | None = ...
    """Divide by the sum of weights (weights) or by the token count (tokens; mean1: after scaling
    each answer's weights to mean 1). Unset: as published for the last of the weights. Default:
    None.
    """

    contrastive_weight: float = ...
    """Weight of the hinge loss towards the reference and away from a wrong one. Default: 0.0."""

    contrastive_margin: float = ...
    """Margin of the hinge in nats. Default: 0.5."""

    feature_weight: float = ...
    """Weight of the squared distance of hidden states (mean over hidden size). Default: 0.0."""

    feature_layers: list[int] | None = ...
    """Layers to match (0: the output of the first block); unset: the head's input, after the final
    norm. Default: None.
    """

    terms: list[str] = ...
    """More terms of the loss by registered name; options as name:coefficient=value,key=value.
    Default: [].
    """

    token_clip: float | None = ...
    """Largest divergence of one token in nats (after the vocabulary sum). Default: None."""

    token_clip_quantile: float | None = ...
    """token_clip as a quantile of the step's divergences (costs one student pass without gradient).
    Default: None.
    """

    entry_clip: float | None = ...
    """Largest summand of one vocabulary entry (OPSD: 0.05). Can make a token's loss negative.
    Default: None.
    """

    output_dir: str = ...
    """Folder of the run; unset: the first unused of unisd-output/RECIPE-MODEL-DATA, ...-2, ...-3.
    Default: None.
    """

    per_device_train_batch_size: int = ...
    """Rows per micro-batch and device. Default: 4."""

    num_train_epochs: float = ...
    """Passes over the training rows. Default: 1.0."""

    max_steps: int = ...
    """Optimizer steps of the run, instead of num_train_epochs; -1: unset. Default: -1."""

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
    """Recompute activations to save memory; unset: switched on if a step would not fit otherwise.
    Default: False.
    """

    disable_dropout: bool = ...
    """Switch off the model's own dropout and router noise (not lora_dropout), which would make
    student and teacher differ. Default: True.
    """

    router_aux_loss_coef: float = ...
    """Weight of the load-balancing loss of a mixture-of-experts model, as the model computes it; 0:
    none. Default: 0.0.
    """

    logging_steps: float = ...
    """Log every N optimizer steps. Default: 1."""

    logging_nan_inf_filter: bool = ...
    """Hide nan and inf in the log; this would wait for the device at every micro-batch. Default:
    False.
    """

    report_to: str | list[str] | None = ...
    """Trackers that receive the metrics: tensorboard, wandb, trackio, ...; all (that are installed)
    or none. These three also receive the final table and the kept answers, which contain texts
    of your rows. Default: 'none'.
    """

    eval_strategy: Literal["no", "steps", "epoch"] = ...
    """When to evaluate during training: no, steps (every eval_steps) or epoch. Uses the rows of
    validation_split; if none are held out, the reported rows. Default: 'no'.
    """

    eval_steps: float | None = ...
    """eval_strategy=steps: evaluate every N steps; unset: every save_steps. Default: None."""

    early_stopping_patience: int | None = ...
    """Stop after N evaluations in a row without a better metric_for_best_model; unset: never.
    Default: None.
    """

    save_strategy: Literal["no", "steps", "epoch", "best"] = ...
    """When to save a checkpoint: no, steps (every save_steps), epoch or best (at each new best).
    Default: 'steps'.
    """

    save_steps: float = ...
    """save_strategy=steps: save every N steps, or a share of all steps if below 1. Default: 500."""

    save_total_limit: int | None = ...
    """Maximum number of checkpoints kept, the newest and the best; unset: all. Default: None."""

    push_to_hub: bool = ...
    """Upload the output folder at the end, with samples.jsonl and answers.json, which contain texts
    of your rows. Default: False.
    """

    hub_model_id: str | None = ...
    """push_to_hub: the repository; unset: the name of output_dir. Default: None."""

    seed: int = ...
    """Seed of all random draws. Default: 42."""

    remove_unused_columns: bool = ...
    """Columns are kept: the grader may need them. Default: False."""

    ddp_find_unused_parameters: bool | None = ...
    """DDP: all trained weights are used in every step. Default: False."""

    resume_from_checkpoint: str | None = ...
    """Continue from this checkpoint-N folder; without a value: from the newest complete one of the
    run. Default: None.
    """

    temperature: float = ...
    """Temperature of the student's samples; the divergence divides all logits by it too. Default:
    0.7.
    """

    top_p: float = ...
    """Nucleus sampling: sample from the smallest set of tokens with this total probability.
    Default: 1.0.
    """

    top_k: int = ...
    """Sample only from the k most likely tokens; 0: from all. Default: 0."""

    min_p: float = ...
    """Sample only tokens at least this share as likely as the most likely one. Default: 0.0."""

    max_prompt_length: int | None = ...
    """Longest student prompt in tokens; longer rows are errors. Unset: what the model's context
    leaves room for. Default: None.
    """

    max_completion_length: int = ...
    """Maximum tokens per answer of the student. Default: 256."""

    num_generations: int = ...
    """Answers sampled per prompt. Default: 1."""

    rollout_batch_size: int = ...
    """Rows generated at once, sorted by length. Default: 64."""

    completion_source: str = ...
    """Who writes the answers to train on: student; reference (from the dataset, off-policy);
    initial (the untrained model, once per row); mixture (student with probability
    on_policy_share, else reference). Default: 'student'.
    """

    refresh_rollouts_every: int | None = ...
    """initial: replace the initial model's weights with the student's every N optimizer steps;
    unset: never. Default: None.
    """

    on_policy_share: float = ...
    """mixture: share of rows that the student answers (lambda of GKD). Default: 0.5."""

    num_iterations: int = ...
    """Optimizer steps that use each rollout; above 1, importance ratios correct for the reuse.
    Default: 1.
    """

    importance_cap: float | None = ...
    """Largest importance ratio of a token, for reused answers and for engines whose
    log-probabilities differ; none: no correction. Default: 2.0.
    """

    num_loss_tokens_to_skip: int = ...
    """Number of tokens at the start of each answer that carry no loss. Default: 0."""

    merge_stop_tokens: bool = ...
    """Treat all tokens that end an answer as one; false: the divergence distinguishes them.
    Default: True.
    """

    mask_truncated_completions: bool = ...
    """Exclude answers that reached max_completion_length from the loss. Default: False."""

    rollout_keep: str = ...
    """Which answers carry loss, by the grader's verdict: all, passed, failed, shortest_passed (one
    per prompt), mixed_groups (of prompts where some passed and some failed). Default: 'all'.
    """

    verdict_seconds: float = ...
    """Time limit for one verdict of the grader, in seconds. Default: 30.0."""

    chat_template_kwargs: dict[str, Any] | None = ...
    """Options of the model's chat template, as JSON: '{"enable_thinking": false}'. They are saved
    with the tokenizer; unset: those saved with it. Default: None.
    """

    use_vllm: bool = ...
    """Sample the student's answers with vLLM instead of transformers' generate. Default: False."""

    vllm_mode: str = ...
    """colocate: in this process, on its device; server: a `vllm serve` that is already running.
    Default: 'colocate'.
    """

    vllm_gpu_memory_utilization: float = ...
    """colocate: share of the device's memory for vLLM (on a CPU: of the free memory, for its
    cache). Default: 0.3.
    """

    vllm_max_model_length: int | None = ...
    """colocate: maximum tokens of a prompt with its answer; unset: the model's own context.
    Default: None.
    """

    vllm_enable_sleep_mode: bool = ...
    """colocate: release vLLM's memory between rollouts (no effect on a CPU). Default: False."""

    vllm_server_base_url: str | None = ...
    """server: address, such as http://host:8000; overrides host and port. Default: None."""

    vllm_server_host: str = ...
    """server: host. Default: '127.0.0.1'."""

    vllm_server_port: int = ...
    """server: port. Default: 8000."""

    vllm_server_timeout: float = ...
    """server: seconds that one answer may take. A server counts as gone after failing for this
    long, and at least three times. Default: 240.0.
    """

    packing: str = ...
    """auto: packed rows where this is exact and faster (CUDA in 16 bits; CPU from 50M parameters),
    else padded; or packed, padded. Default: 'auto'.
    """

    token_budget: int | None = ...
    """Tokens per forward pass without gradient; unset: 2048 on a CPU, 8192 elsewhere. Default:
    None.
    """

    diagnostics: bool = ...
    """Measure properties of the answers: words of doubt, leaks, repetition. Default: True."""

    diagnostics_words: str = ...
    """Words of doubt: a language (en, de), or a file with one word per line. Default: 'en'."""

    alarms: str = ...
    """What to do if the last steps compare badly with the first (collapse, lost doubt, leak,
    forgetting, ...): warn, stop (with a checkpoint) or off. Default: 'warn'.
    """

    alarm_window: int = ...
    """Number of steps at the start, and at the end, that alarms compare. Default: 5."""

    diagnostics_probe_steps: int | None = ...
    """Every N steps, probe the teacher with a wrong answer and without the question, and the
    likelihood of the probe set. Default: None.
    """

    diagnostics_probe_rows: int = ...
    """Rows per probe. Default: 8."""

    diagnostics_gradient_steps: int | None = ...
    """Every N steps from the first on, measure how much of the gradient each mechanism makes (a
    pass with gradient for each). Default: None.
    """

    eval_max_new_tokens: int | None = ...
    """Maximum tokens per greedy answer in evaluations; unset: max_completion_length. Default:
    None.
    """

    record_samples: int = ...
    """Answers per logged step written to samples.jsonl, with the divergence, weight and
    log-probabilities of every token; 0: none. Default: 2.
    """

    max_skipped_steps: int = ...
    """A step with a non-finite loss or gradient is skipped; this many in a row stop the run, which
    names the rows. Default: 5.
    """
