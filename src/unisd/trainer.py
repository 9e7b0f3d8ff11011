"""UniSD's Algorithm 1 on top of `transformers.Trainer` (through `safety.SafeTrainer`, which does not lose work).

`get_batch_samples` hands over all micro-batches of an optimizer step, so lines 1-3 (rollout, scores, weights) run there once for the
whole step; `compute_loss` is line 4 (one student forward per micro-batch), and a callback is line 5 (teacher update).

Shapes: B rows of the step, T longest completion, N loss tokens of a micro-batch, H hidden size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoTokenizer, TrainerCallback, set_seed

from unisd.artefacts import PROBE, SAMPLES
from unisd.backbone import Backbone, Batch
from unisd.completions import CompletionSource
from unisd.config import UniSDConfig
from unisd.cost import TokenCounter
from unisd.data import Row, prepare_rows
from unisd.diagnostics import Answers, Counting, Diagnostics, answer_tokens, answers_to_keep, means, probe_leak
from unisd.errors import UserError
from unisd.guards import smaller_until_it_fits
from unisd.levels import reference_at
from unisd.losses import Contrast, Head, chunked_loss, plain_loss
from unisd.mechanisms import StepScores, feature_distance, parse_weight, quantile_clip
from unisd.memory import default_token_budget
from unisd.metrics import METRICS_FILE, StepMetrics, masked_mean, mean
from unisd.prompts import PromptBuilder
from unisd.reuse import RepeatedSteps, RolloutStore, behaviour_logp, with_logps
from unisd.rollout import Completion, Engine, Sampling, TransformersEngine
from unisd.safety import SafeTrainer
from unisd.samples import SampleRecorder
from unisd.scoring import NEGATIVE, Scorer, ScoringRow, TeacherStates, teacher_head
from unisd.step import (
    InForward,
    budgeted,
    check_data_serves,
    gather_scores,
    idle_agreement,
    loss_coefficients,
    micro_batch,
    most_uncertain,
    needed_views,
    reliability,
    scored_sources,
)
from unisd.targets import parse_target
from unisd.teacher import Teacher

logger = logging.getLogger(__name__)


class _RowNumbers(Dataset[int]):
    """The dataset as the data loader sees it: row numbers. The rows themselves stay in `UniSDTrainer.rows`."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class UniSDTrainer(SafeTrainer):
    """Self-distils a causal LM.

    Args:
        model: a path or hub id, or a causal LM (may be PEFT-wrapped or quantised).
        args: options; default `UniSDConfig()`.
        train_dataset: rows as in :mod:`unisd.data` (a `datasets.Dataset` or a list of dicts).
        eval_dataset: rows for `evaluate`, or a dict of such.
        processing_class: the tokenizer; default: the model's own.
        callbacks, optimizers: as in `transformers.Trainer`.
        peft_config: trains an adapter instead of all weights.
        grader: `(row, completion text) -> bool`; `evaluate` then reports greedy accuracy beside the reference's likelihood.
        engine: writes the completions; default: transformers' `generate` on the student itself.
        probe_dataset: rows of what must not be lost: the untrained model's own answers to them are watched
            (`diagnostics_probe_steps`).

    Raises:
        UserError: bad rows, rows over a length limit, agreement without contexts, contrast without negatives.
    """

    def __init__(
        self,
        model: str | nn.Module,
        args: UniSDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        grader: Callable[[Row, str], bool] | None = None,
        engine: Engine | None = None,
        probe_dataset: Any = None,
    ) -> None:
        args = args if args is not None else UniSDConfig()
        if isinstance(model, str):
            from unisd.models import load_model_and_tokenizer

            model, tokenizer, _ = load_model_and_tokenizer(model)
            processing_class = processing_class or tokenizer
        student: Any = model
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(student.config._name_or_path)
        if peft_config is not None:
            student = _with_adapter(student, peft_config, args)

        from unisd.models import eos_ids

        self.rows = prepare_rows(train_dataset, name="the training data") if train_dataset is not None else []
        self.grader = grader
        self.prompts = PromptBuilder(
            processing_class,
            args.teacher_prompt_layout,
            args.teacher_prompt_template,
            args.auxiliary_prompt_template,
            args.teacher_context,
        )
        if not self.prompts.is_chat:
            logger.warning("The tokenizer has no chat template: prompts are taken as plain text.")
        self.weights = [parse_weight(spec) for spec in args.reliability_weights]
        self.in_forward = InForward(args, self.weights)
        self.target = None if args.target is None else parse_target(args.target)
        self.sources = scored_sources(args, self.target)
        off_policy = args.num_iterations > 1 or getattr(engine, "returns_logps", False)
        self.needs = needed_views(args, self.weights, self.in_forward.weights, self.sources, off_policy)
        self.off_policy = off_policy and args.importance_cap is not None
        self.store = RolloutStore(args.num_iterations)
        if self.rows:
            check_data_serves(self.needs, self.rows)
        if args.feature_layers and args.gradient_checkpointing:
            raise UserError("feature_layers cannot be read under gradient_checkpointing: unset one of them.")
        if not isinstance(eval_dataset, dict) and eval_dataset is not None:
            eval_dataset = prepare_rows(eval_dataset, name="the evaluation data")

        self.backbone = Backbone(student)
        self.eos_ids = eos_ids(student, processing_class)
        self.pad_id = processing_class.pad_token_id if processing_class.pad_token_id is not None else self.eos_ids[0]
        packed = self.backbone.check(self.pad_id, args.packing)
        if args.packing == "auto" and args.device.type == "cpu":
            # Attention on a CPU computes the masked pairs too: padded rows of like length took 2/3 of the time of packed ones.
            packed = False

        super().__init__(
            model=student,
            args=args,
            data_collator=_collate,
            train_dataset=_RowNumbers(len(self.rows)) if self.rows else None,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError(
                "weights spread over processes (FSDP, DeepSpeed) are not supported: use DDP, for large models with a peft_config."
            )
        # Our loss is normalised over the whole optimizer step already.
        self.model_accepts_loss_kwargs = True
        self.teacher = Teacher(
            self.model, args.teacher_model_kind, args.teacher_update_rate, args.teacher_sync_steps, args.teacher_restart_steps
        )
        self.other_teachers = self._other_teachers()
        self.packed = packed
        self.scorer = Scorer(
            self.backbone,
            self.teacher,
            args.divergence_spec,
            needs=self.needs,
            packed=packed,
            token_budget=args.token_budget or default_token_budget(args.device),
            pad_id=self.pad_id,
            layers=args.feature_layers or (),
            autocast=self.accelerator.autocast,
            share_prompts=args.num_generations > 1 and self.backbone.can_continue(self.pad_id),
            choose_rows=self._most_uncertain if args.agreement_uncertain_share < 1 else None,
            target=self.target,
            sources=self.sources,
            others=self.other_teachers,
        )
        self.engine: Engine = engine or TransformersEngine(student, self.eos_ids, self.pad_id, args.rollout_batch_size)
        self.sampling = Sampling(args.max_completion_length, args.temperature, args.top_p, args.top_k, args.min_p)
        self.completions = CompletionSource(args, self.rows, self.prompts, self.engine, self.teacher, self.sampling, self.eos_ids)
        self.metrics = StepMetrics(Path(args.output_dir) / METRICS_FILE, args.device, self.accelerator.num_processes)
        self.tokens = TokenCounter()
        recorded = args.record_samples if self.is_world_process_zero() else 0
        self.samples = SampleRecorder(Path(args.output_dir) / SAMPLES, recorded, processing_class, grader)
        self._token_clip: float | None = args.token_clip
        self._teacher_head: Head | None = None  # of the step in progress
        self._said_idle = False
        self.add_callback(_StepCallback(self))
        self.probe_rows = [] if probe_dataset is None else prepare_rows(probe_dataset, name="the probe set")
        self._probe_answers: list[Row] | None = None
        self.counting: Counting | None = None
        self.diagnostics = Diagnostics(
            lambda: self.metrics.last, self.metrics.path, args.diagnostics_window, args.diagnostics_stop
        )
        if args.diagnostics:
            self.counting = Counting(processing_class, args.diagnostics_words, self.backbone.head_module.out_features)
            self._style_V = self.counting.style_V.to(args.device)
            self.add_callback(self.diagnostics)  # after the step's own, which closes the step's metrics
        if self.rows:
            self._check_lengths()
            self.completions.check()
            self.prompts.check_generation_prefix(self.rows[0])

    # -- set-up -----------------------------------------------------------------------------------------------------

    def _other_teachers(self) -> dict[str, Teacher]:
        """Weights that the target's sources name beside the teacher's; a fixed teacher is the initial model already."""
        others: dict[str, Teacher] = {}
        named = {source.partition("/")[0] for source in self.sources}
        if "base" in named:
            others["base"] = self.teacher if self.teacher.kind == "base" else Teacher(self.model, "base")
        if "step" in named:
            others["step"] = Teacher(self.model, "restart", restart_steps=self.args.target_reference_steps)
        return others

    def _own_other_teachers(self) -> dict[str, Teacher]:
        return {name: other for name, other in self.other_teachers.items() if other is not self.teacher}

    def _check_lengths(self) -> None:
        """Refuse rows whose prompts leave no room, by number: a cut prompt would teach another task."""
        context = getattr(self.backbone.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        room = None if context is None else context - self.args.max_completion_length
        if room is not None and room < 1:
            raise UserError(
                f"max_completion_length={self.args.max_completion_length} leaves no room for a prompt in the model's context "
                f"of {context} tokens: lower it."
            )
        limits = (
            ("prompt", "max_prompt_length", self.args.max_prompt_length, self.prompts.student),
            ("prompt with its reference", "max_teacher_prompt_length", self.args.max_teacher_prompt_length, self.prompts.teacher),
        )
        # Auxiliary and negative views are other texts: those over the limit are left out one by one, and counted.
        self._teacher_room = min(x for x in (self.args.max_teacher_prompt_length, room, 1 << 60) if x is not None)
        level = self.args.teacher_context
        empty = [i for i, row in enumerate(self.rows) if level not in ("full", "plain") and reference_at(row, level) is None]
        if empty:
            raise UserError(
                f"row {empty[0]} of the training data has nothing for teacher_context={level} ({len(empty)} such row(s)): add a column "
                "answer or hints, or use teacher_context=full."
            )
        for what, option, own_limit, encode in limits:
            limit = min(x for x in (own_limit, room, 1 << 60) if x is not None)
            too_long = [(i, length) for i, row in enumerate(self.rows) if (length := _length_over(limit, encode, row))]
            if too_long:
                row, length = too_long[0]
                name = option if limit == own_limit else "the model's context less max_completion_length"
                raise UserError(
                    f"row {row} of the training data: the {what} has {length} tokens, over the limit of {limit} ({name}); "
                    f"{len(too_long)} such row(s): shorten or remove them, or raise {option}."
                )

    # -- lines 1-3: everything that a step knows before its first gradient -------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Rollout, scores and weights of a whole optimizer step; returns its micro-batches ready for the student."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        G = self.args.num_generations
        numbers = [(int(row), g) for batch in batches for row in batch["row"] for g in range(G)]
        rows, completions = self._rollout(numbers)
        with self.metrics.timed("score"):
            self.scorer.progress = self.state.global_step / max(self.state.max_steps, 1)
            scores, states = self._score(rows, device)
            self._teacher_head = teacher_head(self.backbone, self.teacher)
            if self.off_policy and scores.student_logp is not None:
                completions = with_logps(completions, scores.student_logp)
                self.store.keep(numbers, completions, self.store.step)
                scores = replace(scores, behaviour_logp=behaviour_logp(completions, scores.mask.shape[1]))
            own, everywhere = gather_scores(self.accelerator, scores)
            coefficients, weights_log = loss_coefficients(self.args, self.weights, everywhere, self.in_forward.weights)
            coefficients = {name: value_BT[own, : scores.mask.shape[1]] for name, value_BT in coefficients.items()}
            self.in_forward.begin(scores, coefficients["divergence"])
            if self.args.token_clip_quantile is not None and everywhere.divergence is not None:
                self._token_clip = quantile_clip(everywhere.divergence, everywhere.mask, self.args.token_clip_quantile)
            self.metrics.values |= weights_log | self._observe(completions, everywhere)
            self._mask_BT = scores.mask
            self._record(numbers, completions, scores, own, everywhere)
            if not self._said_idle and (idle := idle_agreement(weights_log, self.args)):
                logger.warning("step %d: %s", self.state.global_step + 1, idle)
                self._said_idle = True
        if self.counting is not None:
            with self.metrics.timed("diagnostics"):
                self.metrics.values |= self._diagnose(numbers, rows, completions)
                answer_BT = torch.zeros(scores.mask.shape)
                for i, completion in enumerate(completions):
                    answer_BT[i, : len(completion.ids)] = torch.tensor(
                        answer_tokens(self.processing_class, completion.ids)
                    ).float()
                coefficients["answer"] = answer_BT  # no coefficient of the loss: marks tokens
        with self.metrics.timed("score"):
            # Rows of like length share a micro-batch: the step's loss does not depend on how it is cut.
            order = sorted(range(len(rows)), key=lambda i: len(rows[i].student) + len(rows[i].completion))
            self.micro_batch_of = partial(
                micro_batch,
                rows=rows,
                scores=scores,
                states=states,
                coefficients=coefficients,
                packed=self.packed,
                pad_id=self.pad_id,
                hidden_size=self.backbone.head_module.in_features,
                device=device,
            )
            micro_batches = []
            for batch in batches:
                part, order = order[: len(batch["row"]) * G], order[len(batch["row"]) * G :]
                micro_batches.append(self.micro_batch_of(part))
        self.begin_student_phase()
        # Not None, so that the Trainer does not divide the loss again.
        return micro_batches, int(everywhere.mask.sum())

    def _rollout(self, numbers: Sequence[tuple[int, int]]) -> tuple[list[ScoringRow], list[Completion]]:
        args = self.args
        with self.metrics.timed("rollout"):
            step = self.state.global_step
            if self.store.is_fresh(step):
                completions = self.completions.complete(numbers, step)
                self.store.keep(numbers, completions, step)
            else:
                completions = self.store.completions(numbers, step)
        rows, overlong = [], 0
        for (number, _), completion in zip(numbers, completions, strict=True):
            row = self.rows[number]
            kept = self.completions.carries_loss(completion)
            views = self.prompts.auxiliary(row, args.num_auxiliary_contexts) if "auxiliary" in self.needs else []
            fitting = [ids for ids in views if len(ids) <= self._teacher_room]
            auxiliary = budgeted(fitting, args.agreement_budget_contexts, args.seed, self.state.global_step, number)
            negative = self.prompts.negative(row) if "negative" in self.needs and row.get("negative_context") else None
            if negative is not None and len(negative) > self._teacher_room:
                negative, overlong = None, overlong + 1
            overlong += len(views) - len(fitting)
            rows.append(
                ScoringRow(
                    number=number,
                    completion=completion.ids,
                    loss_mask=[kept and t >= args.num_loss_tokens_to_skip for t in range(len(completion.ids))],
                    student=self.prompts.student(row),
                    teacher=self.prompts.teacher(row),
                    negative=negative,
                    auxiliary=auxiliary,
                    sources=self._source_prompts(row),
                )
            )
        self.metrics.add(overlong_views=float(overlong))
        self.tokens.add(rows, self.needs, args.distillation_mode != "nll")
        return rows, completions

    def _record(
        self,
        numbers: Sequence[tuple[int, int]],
        completions: Sequence[Completion],
        scores: StepScores,
        own: slice,
        everywhere: StepScores,
    ) -> None:
        """Open the records of this step's sampled completions, if it is one of those recorded."""
        step = self.state.global_step + 1
        if self.samples.wants(step, self.state.max_steps, self.args.logging_steps):
            token_BT, sequence_B, _ = reliability(self.weights, everywhere, self.in_forward.weights)
            weight_BT = (token_BT * sequence_B[:, None])[own]
            rows = [self.rows[row] for row, _ in numbers]
            self.samples.begin(step, rows, completions, scores, weight_BT, self.args.divergence_spec.temperature)

    def _score(self, rows: list[ScoringRow], device: torch.device) -> tuple[StepScores, TeacherStates]:
        """All views; where memory runs out, in smaller forward passes, which changes nothing in the scores."""

        def within(budget: int) -> tuple[StepScores, TeacherStates]:
            self.scorer.token_budget = budget
            return self.scorer.score(rows, device)

        return smaller_until_it_fits(within, self.scorer.token_budget, least=64)[0]

    def _source_prompts(self, row: Row) -> dict[str, list[int]]:
        """The prompts of the target's sources, without those that the row cannot serve or that are too long."""
        prompts = {name: self.prompts.at_level(row, name.partition("/")[2]) for name in self.sources if name != NEGATIVE}
        return {name: ids for name, ids in prompts.items() if ids is not None and len(ids) <= self._teacher_room}

    def _most_uncertain(self, entropy_B: Tensor) -> Tensor:
        return most_uncertain(entropy_B, self.args.agreement_uncertain_share, self.accelerator)

    # -- line 4: the student's loss -----------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of one micro-batch, already normalised over the whole optimizer step and all ranks."""
        args = self.args
        batch = Batch(inputs["input_ids"], inputs["position_ids"], inputs["attention_mask"], [])
        captured = self.backbone.forward(model, batch, args.feature_layers or ())
        assert captured.final is not None
        student_NH = captured.final.flatten(0, 1)[inputs["positions_N"]]
        contrast = None
        if "contrast_coefficient_N" in inputs:
            contrast = Contrast(None, inputs["negative_logp_N"], inputs["contrast_coefficient_N"], args.contrastive_margin)
        terms = (
            student_NH,
            self.backbone.head(),
            inputs["teacher_NH"],
            self._teacher_head or teacher_head(self.backbone, self.teacher),
            inputs["targets_N"],
            args.divergence_spec,
            inputs["divergence_coefficient_N"],
            self._token_clip,
            contrast,
        )
        target = None
        if self.target is not None:
            everywhere = torch.ones(len(student_NH), dtype=torch.bool, device=student_NH.device)
            target = self.scorer.target_states(inputs.get("target_states", {}), inputs.get("target_present_N", everywhere))
        reweigh = self.in_forward.reweigh(torch.tensor(inputs["part"]))
        if args.loss_implementation == "plain":
            output = plain_loss(*terms, target=target, reweigh=reweigh)
        else:
            output = chunked_loss(*terms, args.loss_chunk_tokens, target=target, reweigh=reweigh)
        loss = output.loss
        self.finite.see(inputs["row_N"], output.divergence_N, output.student_logp_N)
        self.metrics.add(tokens=len(student_NH), divergence=output.divergence_N.sum(), entropy=output.student_entropy_N.sum())
        if self.counting is not None:
            weighed_N = (inputs["divergence_coefficient_N"] * output.divergence_N).abs()
            style_N = self._style_V[inputs["targets_N"]]
            answer_N = inputs["answer_coefficient_N"]
            self.metrics.add(style_loss=torch.where(style_N, weighed_N, 0.0).sum(), whole_loss=weighed_N.sum())
            self.metrics.add(answer_loss=(weighed_N * answer_N).sum(), answer_tokens=answer_N.sum())
        self.metrics.add(clipped=output.clipped_N.sum(), student_logp=output.student_logp_N.sum())
        self.samples.take(self.samples.spans(inputs["part"], self._mask_BT), output)
        if args.distillation_mode != "nll":
            self.metrics.add(teacher_logp=output.teacher_logp_N.sum())
        if contrast is not None and output.contrast_N is not None and output.contrast_active_N is not None:
            # h is 0 where there is no negative. Selecting by mask would wait for the device.
            self.metrics.add(contrast=output.contrast_N.sum(), contrast_tokens=(contrast.coefficient_N > 0).sum())
            self.metrics.add(contrast_active=output.contrast_active_N.sum())
        if "features_coefficient_N" in inputs:
            pairs = [(student_NH, inputs["teacher_NH"])]
            if args.feature_layers:
                layers = {layer: h.flatten(0, 1)[inputs["positions_N"]] for layer, h in captured.layers.items()}
                pairs = [(layers[layer], inputs["teacher_layers_NH"][layer]) for layer in args.feature_layers]
            distance_N = torch.stack([feature_distance(student, teacher) for student, teacher in pairs]).mean(0)
            loss = loss + (inputs["features_coefficient_N"] * distance_N).sum()
            self.metrics.add(features=distance_N.detach().sum())
        # DDP averages gradients over ranks, but this loss is already a share of one global sum.
        loss = loss * self.accelerator.num_processes
        self.metrics.add(loss=loss.detach())
        return (loss, None) if return_outputs else loss

    # -- metrics ------------------------------------------------------------------------------------------------------

    def _observe(self, completions: Sequence[Completion], scores: StepScores) -> dict[str, float]:
        """Metrics that are known before the student's pass, over all ranks."""
        pairs = [(len(completion.ids), completion.truncated) for completion in completions]
        if self.accelerator.num_processes > 1:
            pairs = gather_object(pairs)
        values = {
            "completions/mean_length": mean([length for length, _ in pairs]),
            "completions/max_length": float(max(length for length, _ in pairs)),
            "completions/truncated_share": mean([truncated for _, truncated in pairs]),
        }
        if scores.negative_logp is not None and scores.negative_present is not None:
            mask = scores.mask & scores.negative_present[:, None]
            values["contrastive/negative_logp"] = masked_mean(scores.negative_logp, mask)
        if self._token_clip is not None:
            values["clip/threshold"] = self._token_clip
        return values

    def _diagnose(
        self, numbers: Sequence[tuple[int, int]], rows: Sequence[ScoringRow], completions: Sequence[Completion]
    ) -> dict[str, float]:
        """What the step's answers are made of, over all ranks; and now and then the probes."""
        assert self.counting is not None
        counted = self.counting.count([self.rows[n] for n, _ in numbers], [(c.ids, c.truncated) for c in completions])
        if self.accelerator.num_processes > 1:
            counted = sum(gather_object([counted]), Answers())
        values = counted.metrics(self.counting.hedges)
        every = self.args.diagnostics_probe_steps
        if every is not None and self.state.global_step % every == 0:
            probes = [self._probe([(self.rows[number], row) for (number, _), row in zip(numbers, rows, strict=True)])]
            if self.accelerator.num_processes > 1:  # all ranks must come to the same alarms
                probes = gather_object(probes)
            values |= means(probes)
        return values

    def _probe(self, rows: Sequence[tuple[Row, ScoringRow]]) -> dict[str, float]:
        """This rank's share of what costs passes: the probe set's likelihood, and some of the step's answers under other contexts."""
        from unisd.evaluation import reference_nll

        values: dict[str, float] = {}
        if self.probe_rows:
            if self._probe_answers is None:
                self._probe_answers = answers_to_keep(
                    self.probe_rows[: self.args.diagnostics_probe_rows],
                    lambda rows: self.engine.generate([self.prompts.student(row) for row in rows], None, self.sampling),
                    self.processing_class,
                    Path(self.args.output_dir) / PROBE,
                    resumed=self.state.global_step > 0,
                    is_writer=self.is_world_process_zero(),
                )
            nll, tokens = reference_nll(self.model, self.processing_class, self._probe_answers)
            values["retained/nll"] = nll / max(tokens, 1)
        if self.args.distillation_mode != "nll":
            values |= probe_leak(self.scorer, self.prompts, rows[: self.args.diagnostics_probe_rows], self.args.device)
        return values

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mechanisms' metrics (means over the steps since the last line) to the Trainer's own log line."""
        if "loss" in logs:
            logs |= self.metrics.take_means()
        super().log(logs, start_time)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """`eval_loss` (nats per token of the reference, given the plain prompt) and, with a grader, greedy `eval_accuracy`."""
        from unisd.evaluation import reference_nll
        from unisd.grading import grade_many

        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            parts = [self.evaluate(rows, ignore_keys, f"{metric_key_prefix}_{name}") for name, rows in dataset.items()]
            return {key: value for part in parts for key, value in part.items()}
        if dataset is None:
            raise UserError("evaluate needs rows: give eval_dataset.")
        start = time.perf_counter()
        rows = prepare_rows(dataset, name="the evaluation data")
        mine = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        nll, tokens = reference_nll(self.model, self.processing_class, mine) if mine else (0.0, 0)
        correct = 0
        if self.grader is not None and mine:
            sampling = replace(self.sampling, max_new_tokens=self.args.eval_max_new_tokens or self.args.max_completion_length)
            completions = self.engine.generate([self.prompts.student(row) for row in mine], None, sampling)
            texts = [self.processing_class.decode(completion.ids, skip_special_tokens=True) for completion in completions]
            correct = sum(map(bool, grade_many(self.grader, mine, texts)))
        sums = torch.tensor([nll, tokens, correct], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            sums = torch.tensor(gather_object([sums.tolist()]), dtype=torch.float64).sum(0)
        metrics = {f"{metric_key_prefix}_loss": float(sums[0] / sums[1].clamp_min(1))}
        if self.grader is not None:
            metrics[f"{metric_key_prefix}_accuracy"] = float(sums[2]) / len(rows)
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.metrics.phases["eval"] += metrics[f"{metric_key_prefix}_runtime"]
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        args = self.args
        if args.num_iterations == 1:
            return super()._get_train_sampler(train_dataset)
        per_step = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        return RepeatedSteps(len(self.rows), per_step, args.num_iterations, args.seed, lambda: int(self.state.epoch or 0))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; a checkpoint also gets the teacher's state (before `trainer_state.json`, which completes it)."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None:
            if self.args.should_save:
                self.teacher.save(output_dir)
                for name, other in self._own_other_teachers().items():
                    other.save(output_dir, f"teacher-{name}.safetensors")
            if self.args.num_iterations > 1:
                self.store.save(output_dir, self.args.should_save, self.accelerator.num_processes)

    def load_teachers(self, checkpoint: str | Path) -> None:
        super().load_teachers(checkpoint)
        for name, other in self._own_other_teachers().items():
            other.load(checkpoint, f"teacher-{name}.safetensors")

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """See :class:`unisd.safety.SafeTrainer`. Raises `UserError` if there are no training rows."""
        if not self.rows:
            raise UserError("there are no training rows: give train_dataset.")
        return super().train(resume_from_checkpoint, **kwargs)


class _StepCallback(TrainerCallback):  # type: ignore[misc]
    """Line 5: what follows an optimizer step."""

    def __init__(self, trainer: UniSDTrainer) -> None:
        self.trainer = trainer
        self.skipping = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop lines of steps that a resumed run does again, and tell the guard of the others."""
        metrics = self.trainer.metrics
        if self.trainer.is_world_process_zero():
            self.trainer.samples.forget_after(state.global_step)
        lines = [metrics.forget_after(state.global_step) if self.trainer.is_world_process_zero() else []]
        if args.world_size > 1:
            broadcast_object_list(lines)
        self.trainer.watch_earlier(lines[0])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A gradient that is not finite must not reach the weights: without gradients the optimizer does nothing at all."""
        trainer = self.trainer
        self.skipping = trainer.finite.is_bad(state.global_step + 1, trainer.metrics.sum_of("loss"))
        if self.skipping:
            logger.warning("Skipped %s.", trainer.finite.message)
            trainer.model.zero_grad(set_to_none=True)
        trainer.metrics.values["guard/skipped_steps"] = float(trainer.finite.skipped)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.metrics.values["learning_rate"] = float(kwargs["optimizer"].param_groups[0]["lr"])
        if not self.skipping:
            with self.trainer.metrics.timed("update"):
                for teacher in (self.trainer.teacher, *self.trainer._own_other_teachers().values()):
                    teacher.update(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.metrics.values |= trainer.in_forward.metrics(trainer.accelerator)
        if trainer.teacher.kind != "live":
            trainer.metrics.add(weight_distance=trainer.teacher.distance())
        values = trainer.metrics.finish(state.global_step, trainer.is_world_process_zero())
        trainer.watch(state.global_step, values, control)
        trainer.samples.write()


def _with_adapter(model: nn.Module, peft_config: Any, args: UniSDConfig) -> nn.Module:
    from peft import get_peft_model, prepare_model_for_kbit_training

    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
    set_seed(args.seed)  # the Trainer would seed only after the adapter's factors are drawn
    adapted: nn.Module = get_peft_model(model, peft_config)
    return adapted


def _length_over(limit: int, encode: Callable[[Row], list[int]], row: Row) -> int:
    """The encoded length if it exceeds `limit`, else 0; texts too short to exceed it are not tokenised."""
    texts = [row.get("teacher_prompt"), row["prompt"], row["prompt"], row.get("privileged_context")]
    if sum(len(str(text).encode()) for text in texts if text) + 1024 <= limit:
        return 0
    length = len(encode(row))
    return length if length > limit else 0


def _collate(numbers: list[int]) -> dict[str, Tensor]:
    return {"row": torch.tensor(numbers)}
