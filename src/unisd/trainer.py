"""UniSD's Algorithm 1 on top of `transformers.Trainer` (through `safety.FaultTolerantTrainer`, which does
not lose work).

`get_batch_samples` hands over all micro-batches of an optimizer step, so lines 1-3 (rollout,
scores, weights) run there once for the whole step; `compute_loss` is line 4 (one student forward
per micro-batch), and a callback is line 5 (teacher update).

Shapes: B rows of the step, T longest completion, N loss tokens of a micro-batch, H hidden size.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoTokenizer, TrainerCallback

from unisd.backbone import Backbone
from unisd.batching import Batch
from unisd.config import UniSDConfig
from unisd.data.prompts import PromptBuilder
from unisd.data.rows import Row, prepare_rows
from unisd.distributed import sharding
from unisd.distributed.collectives import gather_scores, on_all_ranks
from unisd.errors import UserError
from unisd.files import METRICS
from unisd.kernels import cpu_memory as heap
from unisd.kernels.attention import PACKED_FROM, disable_cudnn_sdpa, packs_well
from unisd.losses.chunked import chunked_loss
from unisd.losses.head import Head
from unisd.losses.plain import plain_loss
from unisd.memory import default_token_budget, smaller_until_it_fits
from unisd.methods.registry import parse_weight
from unisd.methods.scores import StepScores
from unisd.methods.targets import parse_target
from unisd.methods.terms import Contrast, feature_distance, quantile_clip
from unisd.models.load import eos_ids, load_model_and_tokenizer, with_adapter
from unisd.monitoring.metrics import StepMetrics
from unisd.monitoring.observer import Observer, Probes
from unisd.rollout.engine import Completion, Engine, Sampling
from unisd.rollout.replay import RepeatedSteps, RolloutStore, behaviour_logp, with_logps
from unisd.rollout.sources import CompletionSource
from unisd.rollout.transformers_engine import TransformersEngine
from unisd.rollout.vllm.build import build_engine
from unisd.rollout.vllm.common import logps_compare
from unisd.scoring.findings import TeacherStates
from unisd.scoring.passes import Passes, PassLayout
from unisd.scoring.prefix_sharing import can_share
from unisd.scoring.requests import RequestBuilder, ScoreRequest
from unisd.scoring.scorer import Scorer, teacher_head
from unisd.teacher import STATE_FILE, Teacher
from unisd.training.coefficients import (
    InForward,
    idle_agreement,
    loss_coefficients,
    most_uncertain,
    reliability,
)
from unisd.training.fault_tolerant_trainer import FaultTolerantTrainer
from unisd.training.micro_batch import alike, micro_batch, rows_to_fill
from unisd.training.plan import check_data_serves, drawn_scores, needed_views, scored_sources
from unisd.training.step_callback import StepCallback

logger = logging.getLogger(__name__)


class _RowNumbers(Dataset[int]):
    """The dataset as the data loader sees it: row numbers.

    The rows themselves stay in `UniSDTrainer.rows`.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class UniSDTrainer(FaultTolerantTrainer):
    """Self-distils a causal LM.

    Args:
        model: a path or hub id, or a causal LM (may be PEFT-wrapped or quantised).
        args: options; default `UniSDConfig()`.
        train_dataset: rows as in :mod:`unisd.data` (a `datasets.Dataset` or a list of dicts).
        eval_dataset: rows for `evaluate`, or a dict of such.
        processing_class: the tokenizer; default: the model's own.
        callbacks, optimizers: as in `transformers.Trainer`.
        peft_config: trains an adapter instead of all weights.
        grader: `(row, completion text) -> bool`; `evaluate` then reports greedy accuracy beside the
            reference's likelihood.
        engine: writes the completions; default: vLLM with `use_vllm`, else transformers' `generate`
            on the student itself.
        probe_dataset: rows of what must not be lost: the untrained model's own answers to them are
            watched (`diagnostics_probe_steps`).

    Raises:
        UserError: bad rows, rows over a length limit, agreement without contexts, contrast without
            negatives.
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
            # bfloat16 weights cannot hold updates of 1e-5; an adapter is float32 on whatever base.
            model, tokenizer, _ = load_model_and_tokenizer(
                model, dtype="float32" if peft_config is None else "auto"
            )
            processing_class = processing_class or tokenizer
        disable_cudnn_sdpa(args.device)
        student: Any = model
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(student.config._name_or_path)
        if peft_config is not None:
            student = with_adapter(student, peft_config, args.seed, args.gradient_checkpointing)
        if any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in student.parameters()):
            logger.warning(
                "Trained weights of 16 bits lose updates of 1e-5: load the model in float32 (bf16=True"
                " computes in bf16)."
            )

        self.rows = []
        if train_dataset is not None:
            self.rows = prepare_rows(
                train_dataset, name="the training data", needs_reference=args.uses_reference
            )
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
        self.target = None if args.target is None else parse_target(args.target)
        self.sources = scored_sources(args, self.target)
        told = (
            logps_compare(args)
            if args.use_vllm and engine is None
            else getattr(engine, "returns_logps", False)
        )
        self.off_policy = (args.num_iterations > 1 or told) and args.importance_cap is not None
        self.drawn = drawn_scores(args, self.weights) if engine is None and not args.use_vllm else frozenset()
        self.in_forward = InForward(args, self.weights, self.drawn, self.off_policy)
        self.needs = needed_views(
            args, self.weights, self.in_forward.weights, self.sources, self.drawn, self.off_policy
        )
        self.store = RolloutStore(args.num_iterations)
        if self.rows:
            check_data_serves(self.needs, self.rows)
        if args.feature_layers and args.gradient_checkpointing:
            raise UserError("feature_layers cannot be read under gradient_checkpointing: unset one of them.")
        if not isinstance(eval_dataset, dict) and eval_dataset is not None:
            eval_dataset = prepare_rows(eval_dataset, name="the evaluation data")

        self.backbone = Backbone(student)
        self.backbone.check_layers(args.feature_layers or ())
        self.backbone.freeze_the_rest()
        context = getattr(self.backbone.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        self.views = RequestBuilder(args, self.prompts, self.needs, self.sources, context)
        self.eos_ids = eos_ids(student, processing_class)
        self.pad_id = (
            processing_class.pad_token_id if processing_class.pad_token_id is not None else self.eos_ids[0]
        )
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
        # While every rank has a whole model, and before the teacher takes its copy.
        packed = self.backbone.check(self.pad_id, args.packing)
        # The model may lie elsewhere still.
        share_prefixes = packed and args.device.type == "cpu" and can_share(self.backbone)
        one_by_one = (
            args.device.type == "cpu" and self.backbone.tells_rows and student.num_parameters() >= PACKED_FROM
        )
        if args.packing == "auto" and not (one_by_one or packs_well(args.device, self._compute_dtype())):
            packed = False
        share_prompts = args.num_generations > 1 and self.backbone.can_continue(self.pad_id)
        if self.cuts_weights:
            sharding.shard(self)
        elif self.is_deepspeed_enabled and not getattr(self.backbone.causal_lm, "is_quantized", False):
            # transformers leaves that to the engine, which is built for training only.
            self._move_model_to_device(self.model, args.device)
        # Our loss is normalised over the whole optimizer step already.
        self.model_accepts_loss_kwargs = True
        self.teacher = Teacher(
            self.model,
            args.teacher_model_kind,
            args.teacher_update_rate,
            args.teacher_sync_steps,
            args.teacher_restart_steps,
        )
        self.other_teachers = self._other_teachers()
        self.packed = packed
        layout = PassLayout(
            packed,
            self.pad_id,
            args.token_budget or default_token_budget(args.device),
            layers=tuple(args.feature_layers or ()),
            share_prompts=share_prompts,
            share_prefixes=share_prefixes,
            merge_once=not args.gradient_checkpointing,  # which is there where memory is scarce
        )
        self.scorer = Scorer(
            Passes(self.backbone, layout, self.accelerator.autocast),
            {"teacher": self.teacher, **self.other_teachers},
            args.divergence_spec,
            needs=self.needs,
            target=self.target,
            sources=self.sources,
            choose_rows=self._most_uncertain if args.agreement_uncertain_share < 1 else None,
        )
        if engine is None and args.use_vllm:
            engine = build_engine(
                args, student, self.accelerator, self.eos_ids, lambda: self.state.global_step
            )
        own = TransformersEngine(
            student, self.eos_ids, self.pad_id, args.rollout_batch_size, tells_logps=bool(self.drawn)
        )
        self.engine: Engine = engine or own
        self.sampling = Sampling(
            args.max_completion_length, args.temperature, args.top_p, args.top_k, args.min_p
        )
        self.completions = CompletionSource(
            args, self.rows, self.prompts, self.engine, self.teacher, self.sampling, self.eos_ids
        )
        self.metrics = StepMetrics(
            Path(args.output_dir) / METRICS, args.device, self.accelerator.num_processes
        )
        # of the student's passes with gradient; the scorer counts its own
        self.tokens: Counter[str] = Counter()
        self._token_clip: float | None = args.token_clip
        self._teacher_head: Head | None = None  # of the step in progress
        self._said_idle = False
        self._uncertain_B: Tensor | None = None  # rows of the step in progress that agreement looks at
        self.add_callback(StepCallback(self))
        probes = Probes(
            args,
            [] if probe_dataset is None else prepare_rows(probe_dataset, name="the probe set"),
            self.model,
            processing_class,
            self.prompts,
            self.engine,
            self.sampling,
            self.scorer,
            is_writer=self.is_world_process_zero(),
        )
        self.observer = Observer(args, self.accelerator, self.metrics, processing_class, grader, probes)
        if self.rows:
            self.views.check(self.rows)
            self.completions.check()
            if args.uses_reference:
                self.prompts.check_generation_prefix(self.rows[0])

    def _compute_dtype(self) -> torch.dtype:
        """What the model's products are computed in."""
        named = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        return named or self.backbone.head_module.weight.dtype

    # -- set-up ------------------------------------------------------------------------------------

    def _other_teachers(self) -> dict[str, Teacher]:
        """Weights that the target's sources name beside the teacher's; a fixed teacher is the
        initial model already.
        """
        others: dict[str, Teacher] = {}
        named = {source.weights for source in self.sources}
        if "base" in named:
            others["base"] = self.teacher if self.teacher.kind == "base" else Teacher(self.model, "base")
        if "step" in named:
            others["step"] = Teacher(self.model, "restart", restart_steps=self.args.target_reference_steps)
        return others

    def own_other_teachers(self) -> dict[str, Teacher]:
        return {name: other for name, other in self.other_teachers.items() if other is not self.teacher}

    # -- lines 1-3: everything that a step knows before its first gradient -------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Rollout, scores and weights of a whole optimizer step; returns its micro-batches ready
        for the student.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        G = self.args.num_generations
        numbers = [(int(row), g) for batch in batches for row in batch["row"] for g in range(G)]
        data = [self.rows[number] for number, _ in numbers]
        rows, completions = self._rollout(numbers, G * self._rows_to_fill())
        with self.metrics.timed("score"):
            self.scorer.progress = self.state.global_step / max(self.state.max_steps, 1)
            scores, states = self._score(rows, device)
            self._teacher_head = teacher_head(self.backbone, self.teacher)
            scores = self._with_behaviour(scores, numbers, completions)
            own, everywhere = gather_scores(self.accelerator, scores)
            coefficients = self._weigh(scores, own, everywhere)
            self.observer.before_loss(completions, everywhere, self._token_clip)
            step = self.state.global_step + 1
            self.observer.record(
                step, self.state.max_steps, data, completions, scores, lambda: self._weights(everywhere)[own]
            )
        if self.args.diagnostics:
            with self.metrics.timed("diagnostics"):
                # No coefficients of the loss: they mark tokens.
                coefficients |= self.observer.diagnose(
                    data, rows, completions, self.state.global_step, scores.mask.shape[1]
                )
        with self.metrics.timed("score"):
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
            micro_batches = [
                self.micro_batch_of(part)
                for part in alike(rows, [G * len(batch["row"]) for batch in batches])
            ]
        self.begin_student_phase()
        # Not None, so that the Trainer does not divide the loss again.
        return micro_batches, int(everywhere.mask.sum())

    def _rows_to_fill(self) -> int:
        args, accelerator = self.args, self.accelerator
        if (
            not accelerator.gradient_state.end_of_dataloader
            or args.dataloader_drop_last
            or args.num_iterations > 1
        ):
            return 0
        return rows_to_fill(
            len(self.rows), self._train_batch_size, accelerator.process_index, accelerator.num_processes
        )

    def _rollout(
        self, numbers: Sequence[tuple[int, int]], fill: int = 0
    ) -> tuple[list[ScoreRequest], list[Completion]]:
        """The step's rows on this rank and what was written to them; the last `fill` of them carry
        no loss.
        """
        with self.metrics.timed("rollout"):
            step = self.state.global_step
            if self.store.is_fresh(step):
                completions = on_all_ranks(self.accelerator, lambda: self.completions.complete(numbers, step))
                self.store.keep(numbers, completions, step)
            else:
                completions = self.store.completions(numbers, step)
            versions = [c.version for c in completions if c.version is not None]
            if versions:
                self.metrics.values["rollout/weights_version"] = float(min(versions))
            if versions and self.store.is_fresh(step):
                # a part of the rollout's time
                self.metrics.values["step_time/sync"] = self.completions.sync_s
        rows = []
        for place, ((number, _), completion) in enumerate(zip(numbers, completions, strict=True)):
            carries_loss = place < len(numbers) - fill and self.completions.carries_loss(completion)
            row, overlong = self.views.of(self.rows[number], number, completion, carries_loss, step)
            rows.append(row)
            self.metrics.add(overlong_views=float(overlong))
            written = len(row.completion)
            self.tokens.update(trained=len(row.student) + written if written else 0, completion=written)
        return rows, completions

    def _with_behaviour(
        self, scores: StepScores, numbers: Sequence[tuple[int, int]], completions: Sequence[Completion]
    ) -> StepScores:
        """The scores with what the importance ratio and some weights know of the rollout: the
        log-probabilities it was drawn with.
        """
        width = scores.mask.shape[1]
        if self.off_policy and scores.student_logp is not None:
            completions = with_logps(completions, scores.student_logp)
            self.store.keep(numbers, completions, self.store.step)
            scores = replace(scores, behaviour_logp=behaviour_logp(completions, width))
        if self.drawn and scores.student_logp is None:
            scores = replace(scores, student_logp=behaviour_logp(completions, width))
        return scores

    def _weigh(self, scores: StepScores, own: slice, everywhere: StepScores) -> dict[str, Tensor]:
        """This rank's coefficients of the loss, `[B,T]`; weights, normalisers and clip are those of
        all ranks' rows.
        """
        coefficients, weights_log = loss_coefficients(
            self.args, self.weights, everywhere, self.in_forward.weights
        )
        coefficients = {
            name: value_BT[own, : scores.mask.shape[1]] for name, value_BT in coefficients.items()
        }
        self.in_forward.begin(scores, coefficients["divergence"])
        if self.args.token_clip_quantile is not None and everywhere.divergence is not None:
            self._token_clip = quantile_clip(
                everywhere.divergence, everywhere.mask, self.args.token_clip_quantile
            )
        self.metrics.values |= weights_log
        if not self._said_idle and (idle := idle_agreement(weights_log, self.args)):
            logger.warning("step %d: %s", self.state.global_step + 1, idle)
            self._said_idle = True
        return coefficients

    def _weights(self, everywhere: StepScores) -> Tensor:
        """The reliability weights `[B,T]` of all ranks' rows, as far as they are known before the
        student's pass.
        """
        token_BT, sequence_B, _ = reliability(self.weights, everywhere, self.in_forward.weights)
        return token_BT * sequence_B[:, None]

    def _score(self, rows: list[ScoreRequest], device: torch.device) -> tuple[StepScores, TeacherStates]:
        """All views; where memory runs out, in smaller forward passes, which changes nothing in the
        scores.
        """
        passes = self.scorer.passes

        def within(budget: int) -> tuple[StepScores, TeacherStates]:
            passes.layout = replace(passes.layout, token_budget=budget)
            return self.scorer.score(rows, device)

        together = "token_budget" if sharding.is_sharded(self.model) else None
        remedy = (
            "scoring a single row does not fit into memory: lower max_completion_length, or shorten the rows."
        )
        self._uncertain_B = None
        return smaller_until_it_fits(
            within, passes.layout.token_budget, least=64, remedy=remedy, together=together
        )[0]

    def _most_uncertain(self, entropy_B: Tensor) -> Tensor:
        # All ranks choose together, once: scoring again for want of memory is one rank's own
        # affair.
        if self._uncertain_B is None:
            self._uncertain_B = most_uncertain(
                entropy_B, self.args.agreement_uncertain_share, self.accelerator
            )
        return self._uncertain_B

    # -- line 4: the student's loss ----------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Loss of one micro-batch, already normalised over the whole optimizer step and all
        ranks.
        """
        args = self.args
        batch = Batch(
            inputs["input_ids"],
            inputs["position_ids"],
            inputs["attention_mask"],
            inputs["starts"],
            inputs["bounds"],
        )
        captured = self.backbone.forward(model, batch, args.feature_layers or ())
        assert captured.final is not None
        student_NH = captured.final.flatten(0, 1)[inputs["positions_N"]]
        contrast = None
        if "contrast_coefficient_N" in inputs:
            contrast = Contrast(
                None, inputs["negative_logp_N"], inputs["contrast_coefficient_N"], args.contrastive_margin
            )
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
            target = self.scorer.target_states(
                inputs.get("target_states", {}), inputs.get("target_present_N", everywhere)
            )
        reweigh = self.in_forward.reweigh(torch.tensor(inputs["part"]))
        # only the model's own forward has it so far; the scores were taken under it
        with self.accelerator.autocast():
            if args.loss_implementation == "plain":
                output = plain_loss(*terms, target=target, reweigh=reweigh)
            else:
                output = chunked_loss(*terms, args.loss_chunk_tokens, target=target, reweigh=reweigh)
        loss = output.loss
        self.finite.see(inputs["row_N"], output.divergence_N, output.student_logp_N)
        self.observer.after_loss(inputs, output, contrast)
        if "features_coefficient_N" in inputs:
            pairs = [(student_NH, inputs["teacher_NH"])]
            if args.feature_layers:
                layers = {
                    layer: h.flatten(0, 1)[inputs["positions_N"]] for layer, h in captured.layers.items()
                }
                pairs = [(layers[layer], inputs["teacher_layers_NH"][layer]) for layer in args.feature_layers]
            distance_N = torch.stack([feature_distance(student, teacher) for student, teacher in pairs]).mean(
                0
            )
            loss = loss + (inputs["features_coefficient_N"] * distance_N).sum()
            self.metrics.add(features=distance_N.detach().sum())
        # DDP averages gradients over ranks, but this loss is already a share of one global sum.
        loss = loss * self.accelerator.num_processes
        self.metrics.add(loss=loss.detach())
        return (loss, None) if return_outputs else loss

    # -- metrics -----------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mechanisms' metrics (means over the steps since the last line) to the Trainer's
        own log line.
        """
        if "loss" in logs:
            logs |= self.metrics.take_means()
        super().log(logs, start_time)

    # -- evaluation --------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """`eval_loss` (nats per token of the reference, given the plain prompt) and, with a grader,
        greedy `eval_accuracy`.
        """
        from unisd.evaluation.grading import grade_many
        from unisd.evaluation.likelihood import reference_nll

        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            parts = [
                self.evaluate(rows, ignore_keys, f"{metric_key_prefix}_{name}")
                for name, rows in dataset.items()
            ]
            return {key: value for part in parts for key, value in part.items()}
        if dataset is None:
            raise UserError("evaluate needs rows: give eval_dataset.")
        start = time.perf_counter()
        rows = prepare_rows(dataset, name="the evaluation data")
        mine = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        joins = bool(mine) or sharding.is_sharded(self.model)  # the other ranks' passes need all ranks
        nll, tokens = reference_nll(self.model, self.processing_class, mine) if joins else (0.0, 0)
        correct = 0
        if self.grader is not None:
            self.engine.sync()
            sampling = replace(
                self.sampling, max_new_tokens=self.args.eval_max_new_tokens or self.args.max_completion_length
            )
            prompts = [self.prompts.student(row) for row in mine]
            completions = on_all_ranks(
                self.accelerator, lambda: self.engine.generate(prompts, None, sampling) if joins else []
            )
            texts = [
                self.processing_class.decode(completion.ids, skip_special_tokens=True)
                for completion in completions
            ]
            correct = sum(map(bool, grade_many(self.grader, mine, texts)))
        self.engine.sleep()
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

    # -- checkpoints -------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        args = self.args
        if args.num_iterations == 1:
            return super()._get_train_sampler(train_dataset)
        per_step = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        return RepeatedSteps(
            len(self.rows), per_step, args.num_iterations, args.seed, lambda: int(self.state.epoch or 0)
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; a checkpoint also gets the teacher's state (before
        `trainer_state.json`, which completes it).
        """
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None:
            self.save_teacher(self.teacher, output_dir, STATE_FILE)
            for name, other in self.own_other_teachers().items():
                self.save_teacher(other, output_dir, f"teacher-{name}.safetensors")
            if self.args.num_iterations > 1:
                self.store.save(output_dir, self.args.should_save, self.accelerator.num_processes)

    def load_teachers(self, checkpoint: str | Path) -> None:
        super().load_teachers(checkpoint)
        for name, other in self.own_other_teachers().items():
            other.load(checkpoint, f"teacher-{name}.safetensors")

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """See :class:`unisd.training.fault_tolerant_trainer.FaultTolerantTrainer`.

        Raises `UserError` if there are no training rows.
        """
        if not self.rows:
            raise UserError("there are no training rows: give train_dataset.")
        checkpointed = (
            self.args.gradient_checkpointing
            and self.args.device.type == "cpu"
            and not sharding.is_sharded(self.model)
        )
        with heap.keep_freed_memory(self.args.device), ExitStack() as stack:
            if checkpointed:
                with suppress(UserError):  # layers that are not found
                    stack.enter_context(heap.outputs_in_own_blocks(self.backbone.blocks()))
            return super().train(resume_from_checkpoint, **kwargs)


def _collate(numbers: list[int]) -> dict[str, Tensor]:
    return {"row": torch.tensor(numbers)}
