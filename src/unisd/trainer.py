"""Carry out UniSD's Algorithm 1 on top of `transformers.Trainer`.

Between the two stands a base that loses no work (:mod:`unisd.training.fault_tolerant_trainer`).
`get_batch_samples` hands over all micro-batches of an optimizer step, so lines 1-3 (rollout,
scores, weights) run there once for the whole step and leave one frozen `Step`; `compute_loss` is
line 4 (one student forward per micro-batch), and a callback is line 5 (teacher update).

Shapes: B rows of the step, T longest completion, N loss tokens of a micro-batch, H hidden size.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from unisd.backbone import Backbone
from unisd.config import UniSDConfig
from unisd.data.rows import Row
from unisd.distributed.collectives import gather_scores, on_all_ranks
from unisd.distributed.sharding import all_ranks_must_join
from unisd.errors import UserError
from unisd.files import METRICS
from unisd.kernels.cpu_memory import training_memory
from unisd.losses.chunked import chunked_loss
from unisd.losses.plain import plain_loss
from unisd.memory import smaller_until_it_fits
from unisd.methods.scores import StepScores
from unisd.models.tokens import eos_ids, pad_id
from unisd.monitoring.metrics import StepMetrics
from unisd.monitoring.observer import Observer, Probes
from unisd.rollout.engine import Completion, Engine, Sampling
from unisd.rollout.replay import RolloutStore
from unisd.rollout.sources import CompletionSource
from unisd.rollout.verdicts import Judge
from unisd.scoring.findings import TeacherStates
from unisd.scoring.passes import Passes
from unisd.scoring.requests import RequestBuilder, ScoreRequest
from unisd.scoring.scorer import Scorer, teacher_head
from unisd.training import preflight
from unisd.training.coefficients import (
    DeferredWeights,
    idle_weights,
    loss_coefficients,
    most_uncertain,
    once,
    with_rollout,
)
from unisd.training.evaluating_trainer import EvaluatingTrainer, evaluation_rows
from unisd.training.plan import Plan, check_data_serves
from unisd.training.setup import (
    RowNumbers,
    build_prompts,
    build_teacher,
    by_file,
    chosen_engine,
    collate_numbers,
    load_student,
    other_teachers,
    pass_layout,
    training_rows,
)
from unisd.training.step import Layout, MicroBatch, Step, group_by_length, padding_rows
from unisd.training.step_callback import StepCallback

logger = logging.getLogger(__name__)


class UniSDTrainer(EvaluatingTrainer):
    """Self-distils a causal LM.

    Args:
        model: a path or hub id, or a causal LM (may be PEFT-wrapped or quantised).
        args: options; default `UniSDConfig()`.
        train_dataset: rows as `unisd.load_rows` takes them; a stream is read for `max_steps`.
        eval_dataset: rows for `evaluate`, or a dict of such.
        processing_class: the tokenizer; default: the model's own.
        callbacks: as in `transformers.Trainer`.
        optimizers: the same.
        peft_config: trains an adapter instead of all weights.
        grader: `(row, completion text) -> bool`, a share from 0 to 1, or a `Grade`; `evaluate` then
            reports greedy accuracy as well as the reference's likelihood.
        engine: writes the completions; default: vLLM with `use_vllm`, else transformers' `generate`
            on the student itself. Or a function that takes this default and returns another engine,
            such as an environment with tools.
        probe_dataset: rows for retention: the likelihood of the untrained model's own answers to
            them is measured (`diagnostics_probe_steps`).

    Raises:
        UserError: bad rows, rows over a length limit, agreement without contexts, contrast without
            negatives.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        args: UniSDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        grader: Callable[[Row, str], Any] | None = None,
        engine: Engine | Callable[[Engine], Engine] | None = None,
        probe_dataset: Any = None,
    ) -> None:
        args = args if args is not None else UniSDConfig()
        preflight.check_machine(args)
        # before the model, which an adapter changes in place
        self.rows: list[Row] = [] if train_dataset is None else training_rows(train_dataset, args)
        student, processing_class = load_student(model, args, processing_class, peft_config)
        self.prompts = build_prompts(args, processing_class, student)
        self.grader, self.plan = grader, Plan.of(args, engine)
        if self.rows:
            check_data_serves(self.plan, self.rows)
        if args.feature_layers and args.gradient_checkpointing:
            raise UserError("feature_layers cannot be read under gradient_checkpointing: unset one of them.")
        eval_dataset = None if eval_dataset is None else evaluation_rows(eval_dataset)
        self._inspect_model(student, args, processing_class)
        super().__init__(
            model=student,
            args=args,
            data_collator=collate_numbers,
            train_dataset=RowNumbers(len(self.rows)) if self.rows else None,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # ours is normalised over the whole step already
        self._build_scorer()
        self._build_rollout(student, engine)
        self._build_monitoring(probe_dataset)
        self.add_callback(StepCallback(self))
        if self.rows:
            preflight.check_ready(self)

    # -- set-up ------------------------------------------------------------------------------------

    def _inspect_model(self, student: Any, args: UniSDConfig, tokenizer: Any) -> None:
        self.backbone = Backbone(student)
        self.backbone.check_layers(args.feature_layers or ())
        self.backbone.freeze_the_rest()
        wanted = (self.prompts, self.plan.needs, self.plan.sources, *self.backbone.context)
        self.request_builder = RequestBuilder(args, *wanted)
        self.eos_ids = eos_ids(student, tokenizer)
        self.pad_id = pad_id(student, tokenizer)

    def _build_scorer(self) -> None:
        args, plan = self.args, self.plan
        # While every rank has a whole model, and before the teacher takes its copy.
        layout = pass_layout(self.backbone, args, self.pad_id)
        self.place_model()
        self.packed = layout.packed
        self.teacher = build_teacher(self.model, args)
        self.other_teachers = other_teachers(self.teacher, plan.sources, args)
        self.teachers = by_file(self.teacher, self.other_teachers)
        self.stateful = [self.stateful_teacher(*item) for item in self.teachers.items()]
        self.scorer = Scorer(
            Passes(self.backbone, layout, self.accelerator.autocast),
            {"teacher": self.teacher} | {k: t for k, t in self.other_teachers.items() if k != "rollout"},
            args.divergence_spec,
            needs=plan.needs,
            target=plan.target,
            sources=plan.sources,
        )

    def _build_rollout(self, student: Any, engine: Engine | Callable[[Engine], Engine] | None) -> None:
        args, ends = self.args, (self.eos_ids, self.pad_id)
        self.engine = chosen_engine(
            engine, args, self.plan, student, self.accelerator, *ends, lambda: self.state.global_step
        )
        self.sampling = Sampling(
            args.max_completion_length, args.temperature, args.top_p, args.top_k, args.min_p
        )
        judge = Judge(self.grader, args.verdict_seconds) if self.grader and self.plan.judged else None
        author = self.other_teachers.get("rollout", self.teacher)
        self.completions = CompletionSource(
            args, self.rows, self.prompts, self.engine, author, self.sampling, self.eos_ids, judge
        )
        self.store = RolloutStore(args.num_iterations)
        if args.num_iterations > 1:
            self.stateful.append(self.stateful_rollout(self.store))

    def _build_monitoring(self, probe_dataset: Any) -> None:
        args, tokenizer = self.args, self.processing_class
        path = Path(args.output_dir) / METRICS
        self.metrics = StepMetrics(path, args.device, self.accelerator.num_processes)
        # of the student's passes with gradient; the scorer counts its own
        self.tokens: Counter[str] = Counter()
        self._said_idle = False
        looked_at = (self.model, tokenizer, self.prompts, self.engine, self.sampling, self.scorer)
        probes = Probes(args, probe_dataset, *looked_at, is_writer=self.is_world_process_zero())
        self.observer = Observer(args, self.accelerator, self.metrics, tokenizer, self.grader, probes)

    # -- lines 1-3: everything that a step knows before its first gradient -------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Do lines 1-3 for a whole optimizer step; return its micro-batches for the student."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        G = self.args.num_generations
        rows = torch.cat([batch["row"] for batch in batches]).tolist()
        numbers = [(row, g) for row in rows for g in range(G)]
        completions = self._rollout(numbers)
        requests = self._requests(numbers, completions, fill=G * padding_rows(self, len(self.rows)))
        scores, states = self._score(requests, numbers, completions, device)
        step, everywhere = self._weigh(requests, scores, states, device)
        preflight.check_carries_loss(self, everywhere, completions)
        step = self._observe(step, everywhere, numbers, completions)
        with self.metrics.timed("score"):
            parts = group_by_length(requests, [G * len(batch["row"]) for batch in batches])
            micro_batches = [step.micro_batch(part).inputs for part in parts]
        self.begin_student_phase(step, everywhere)
        return micro_batches, int(everywhere.mask.sum())  # not None: the Trainer would divide again

    def _rollout(self, numbers: Sequence[tuple[int, int]]) -> list[Completion]:
        """Line 1: what is written to the step's rows on this rank, given as (row, generation)."""
        step, store = self.state.global_step, self.store
        with self.metrics.timed("rollout"):
            if store.is_fresh(step):
                completions = on_all_ranks(self.accelerator, lambda: self.completions.complete(numbers, step))
                store.keep(numbers, completions, step)
            else:
                completions = store.completions(numbers, step)
            versions = [c.version for c in completions if c.version is not None]
            if versions:
                self.metrics.values["rollout/weights_version"] = float(min(versions))
            if store.is_fresh(step):  # parts of the rollout's time
                self.metrics.values |= {f"step_time/{k}": s for k, s in self.completions.seconds.items()}
        return completions

    def _requests(
        self, numbers: Sequence[tuple[int, int]], completions: Sequence[Completion], fill: int = 0
    ) -> list[ScoreRequest]:
        """The prompts that the completions are scored under; the last `fill` of them carry no
        loss.
        """
        requests, step = [], self.state.global_step
        carried = self.completions.carry_loss(numbers, completions)
        outcomes = self.completions.outcomes(numbers, completions)
        for i, (number, _) in enumerate(numbers):
            found = (completions[i], carried[i] and i < len(numbers) - fill, step, outcomes[i])
            request, overlong = self.request_builder.of(self.rows[number], number, *found)
            requests.append(request)
            self.metrics.add(overlong_views=float(overlong))
            written = len(request.completion)
            self.tokens.update(trained=len(request.student) + written if written else 0, completion=written)
        return requests

    def _score(
        self,
        requests: list[ScoreRequest],
        numbers: Sequence[tuple[int, int]],
        completions: Sequence[Completion],
        device: torch.device,
    ) -> tuple[StepScores, TeacherStates]:
        """Line 2: all views; where memory runs out, in smaller passes, with the same scores."""
        args, scorer, passes = self.args, self.scorer, self.scorer.passes

        def within(budget: int) -> tuple[StepScores, TeacherStates]:
            # A smaller budget stays. Checkpointing, perhaps switched on since, means scarce memory.
            once_each = not args.gradient_checkpointing
            passes.layout = replace(passes.layout, token_budget=budget, merge_once=once_each)
            return scorer.score(requests, device, progress=progress, choose_rows=choose_rows)

        # A collective, which a retry of one rank alone must not repeat: it uses the first answer.
        share, accelerator = args.agreement_uncertain_share, self.accelerator
        choose = once(lambda entropy_B: most_uncertain(entropy_B, share, accelerator))
        choose_rows, progress = choose if share < 1 else None, self._progress()
        together = "token_budget" if all_ranks_must_join(self.model) else None
        remedy = "a single row does not fit into memory: lower max_completion_length, or shorten the rows."
        what, budget = "scoring passes (in tokens)", passes.layout.token_budget
        with self.metrics.timed("score"):
            (scores, states), _ = smaller_until_it_fits(
                within, budget, least=64, what=what, remedy=remedy, together=together
            )
        return with_rollout(scores, self.plan, self.store, numbers, completions), states

    def _progress(self) -> float:
        """The share of the run's optimizer steps that are done."""
        return float(self.state.global_step / max(self.state.max_steps, 1))

    def _weigh(
        self, requests: list[ScoreRequest], scores: StepScores, states: TeacherStates, device: torch.device
    ) -> tuple[Step, StepScores]:
        """Line 3: weights, normalisers and clip, which are those of all ranks' rows.

        Returns what the step knows of this rank's rows, and the scores of all ranks.
        """
        args, metrics = self.args, self.metrics
        with metrics.timed("score"):
            head = teacher_head(self.backbone, self.teacher)
            own, everywhere = gather_scores(self.accelerator, scores)
            found = loss_coefficients(args, self.plan, everywhere)
            metrics.values |= found.metrics
            if not self._said_idle and (idle := idle_weights(found, everywhere, args)):
                logger.warning("step %d: %s", self.state.global_step + 1, idle)
                self._said_idle = True
            target = self.scorer.target_without_states(self._progress())
        found = found.of_rows(own, scores.mask.shape[1])
        step = Step(
            rows=requests,
            scores=scores,
            states=states,
            weights_BT=found.weights_BT,
            coefficient_BT=found.divergence_BT,
            terms=[(term, found.terms[term.name]) for term in self.plan.terms],
            token_clip=found.token_clip,
            clipped_BT=found.clipped_BT,
            teacher_head=head,
            target=target,
            deferred=DeferredWeights.of(self.plan, scores, found.divergence_BT),
            layout=Layout(self.packed, self.pad_id, self.backbone.head_module.in_features, device),
        )
        return step, everywhere

    def _observe(
        self,
        step: Step,
        everywhere: StepScores,
        numbers: Sequence[tuple[int, int]],
        completions: Sequence[Completion],
    ) -> Step:
        """What is told of the step before its loss; with diagnostics, the step with marks of its
        tokens.
        """
        finished, rows = self.state.global_step, [self.rows[number] for number, _ in numbers]
        pending = None if step.deferred is None else partial(step.deferred.metrics, self.accelerator)
        with self.metrics.timed("score"):
            self.observer.before_loss(completions, everywhere, step.token_clip, pending)
            self.observer.record(
                finished + 1, self.state.max_steps, rows, completions, step.scores, step.weights_BT
            )
        if not self.args.diagnostics:
            return step
        with self.metrics.timed("diagnostics"):
            width = step.scores.mask.shape[1]
            return replace(step, marks=self.observer.diagnose(rows, step.rows, completions, finished, width))

    # -- line 4: the student's loss ----------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Do line 4: the loss of a micro-batch, normalised over the whole step and all ranks."""
        args, micro_batch = self.args, inputs["micro_batch"]
        assert isinstance(micro_batch, MicroBatch)
        options = (args.feature_layers or (), args.router_aux_loss_coef > 0)
        captured = self.backbone.forward(model, micro_batch.batch, *options)
        assert captured.final is not None
        student_NH = micro_batch.at_loss_tokens(captured.final)
        loss_inputs = micro_batch.loss_inputs(student_NH, self.backbone.head(), args.divergence_spec)
        # accelerate autocasts the model's forward alone; the loss computes as the scores were taken
        with self.accelerator.autocast():
            if args.loss_implementation == "plain":
                output = plain_loss(loss_inputs)
            else:
                output = chunked_loss(loss_inputs, args.loss_chunk_tokens)
        if micro_batch.hidden_terms:
            pairs = micro_batch.hidden_pairs(student_NH, captured, args.feature_layers or ())
            output = output.with_hidden_terms(micro_batch.hidden_terms, pairs)
        self.finite.see(micro_batch.row_N, output.divergence_N, output.student_logp_N)
        self.observer.after_loss(micro_batch, loss_inputs, output)
        # DDP averages gradients over ranks, but this loss is already a share of one global sum.
        loss = output.loss * self.accelerator.num_processes
        if captured.aux_loss is not None:
            loss = loss + args.router_aux_loss_coef * micro_batch.share * captured.aux_loss
        self.metrics.add(loss=loss.detach())
        return (loss, None) if return_outputs else loss

    # -- around the steps --------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """See :class:`unisd.training.fault_tolerant_trainer.FaultTolerantTrainer`.

        Raises `UserError` if there are no training rows.
        """
        if not self.rows:
            raise UserError("there are no training rows: give train_dataset.")
        checkpointed = self.backbone.blocks if self.args.gradient_checkpointing else None
        with training_memory(self.model, self.args.device, checkpointed):
            return super().train(resume_from_checkpoint, **kwargs)
