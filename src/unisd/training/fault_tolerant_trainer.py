"""A `transformers.Trainer` that does not lose work: whole checkpoints, bad steps skipped, memory
that runs out survived.

What it decides by is in :mod:`unisd.training.guards` and :mod:`unisd.training.checkpoints`; here is
where a training loop asks them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers.trainer_utils import rotate_checkpoints

from unisd.config import UniSDConfig
from unisd.data.rendering import fix_date
from unisd.data.rows import Row
from unisd.distributed import zero
from unisd.distributed.collectives import on_all_ranks
from unisd.errors import OutOfMemory, RolloutError, UserError
from unisd.files import check_not_the_model
from unisd.kernels.lora import fast_maps, fused_lora
from unisd.memory import ROW_TOO_LARGE, is_out_of_memory, release_memory, smaller_until_it_fits
from unisd.methods.scores import StepScores
from unisd.models.adapters import without_adapter
from unisd.monitoring.alarms import Watch
from unisd.monitoring.metrics import StepMetrics
from unisd.rollout.replay import RepeatedSteps, RolloutStore
from unisd.teacher import Teacher
from unisd.training import checkpoints, record
from unisd.training.early_stopping import EarlyStopping, is_over
from unisd.training.gradient_shares import gradient_shares
from unisd.training.guards import FiniteGuard, pieces_of
from unisd.training.plan import planned_steps
from unisd.training.sharded_trainer import ShardedTrainer
from unisd.training.step import MicroBatch, Step

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
MEASURE = {"metric_for_best_model", "greater_is_better", "evaluation"}
"""What evaluations are compared by."""


@dataclass(frozen=True)
class Stateful:
    """What a checkpoint holds beside model and optimizer: how it is written into a folder, and
    read.

    All ranks call both.
    """

    save: Callable[[str], None]
    load: Callable[[str], None]


class FaultTolerantTrainer(ShardedTrainer):
    """The base of :class:`unisd.UniSDTrainer`, which sets what it is to save beside model and
    optimizer.
    """

    metrics: StepMetrics
    stateful: list[Stateful]
    rows: list[Row]

    def __init__(self, args: UniSDConfig, **kwargs: Any) -> None:
        self._base = record.fingerprint(kwargs["model"])  # while every process has a whole model
        self._base_name = str(without_adapter(kwargs["model"]).config._name_or_path)
        self._all_done = False  # the resumed checkpoint is that of the last step
        self._changed: set[str] = set()  # options that are otherwise than in the resumed checkpoint
        super().__init__(args=args, **kwargs)
        self.finite = FiniteGuard(args.max_skipped_steps, self.accelerator.num_processes)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStopping(args.early_stopping_patience))
        self.health = Watch(args.alarm_window)
        self.stop_reason: str | None = None
        self.began_at = 0  # the step of the checkpoint that a training went on from
        self._run_folder: str | None = None  # where the Trainer puts checkpoints while one is being built
        self._done: list[list[int]] = []  # parts of this step that are in the gradient
        self.most_rows: int | None = None  # per micro-batch, since memory ran out

    # -- memory ------------------------------------------------------------------------------------

    def begin_student_phase(self, step: Step, scores: StepScores) -> None:
        """Before the first micro-batch of a step: the state to come back to when memory runs
        out; and now and then, what each mechanism makes of the gradient.
        """
        self._done = []
        self.metrics.mark()
        every = self.args.diagnostics_gradient_steps
        if every is not None and self.state.global_step % every == 0:
            with self.metrics.timed("diagnostics"):
                shares = gradient_shares(self, step, scores)
            self.metrics.rewind()
            self.metrics.values |= shares

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """As in transformers; where memory runs out, the step's gradient is taken again, in smaller
        micro-batches.
        """
        with self.metrics.timed("student"):
            micro_batch: MicroBatch = inputs["micro_batch"]
            step, part = micro_batch.step, micro_batch.part
            del micro_batch
            try:
                loss = self._in_pieces(model, step, [part], num_items_in_batch, inputs)
                self._done.append(part)
                return loss
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._check_can_be_smaller(len(part), error)
            # The gradient may hold a share of the part that failed: all parts of this step so far
            # are done again.
            del inputs
            done = [*self._done, part]
            largest = min(self.most_rows or len(part), len(part))
            retry = partial(self._again, model, step, done, num_items_in_batch)
            loss, self.most_rows = smaller_until_it_fits(retry, max(1, largest // 2))
            self._done.append(part)
            logger.warning(
                "Memory ran out: micro-batches hold %d rows from now on; the gradient is the same.",
                self.most_rows,
            )
            return loss

    def _in_pieces(
        self,
        model: nn.Module,
        step: Step,
        parts: list[list[int]],
        items: Any,
        inputs: dict[str, Any] | None = None,
    ) -> Tensor:
        """Add the gradient of `parts` of the step; returns the loss of the last one.

        `inputs` are those of a single part, if at hand.
        """
        loss = torch.zeros((), device=self.args.device)
        for part in parts:
            loss = torch.zeros((), device=self.args.device)
            pieces = pieces_of(part, self.most_rows or max(len(part), 1)) or [part]
            for piece in pieces:
                at_hand = inputs is not None and piece == part
                with fast_maps(self.model), fused_lora(self.model):
                    loss += super().training_step(
                        model, inputs if at_hand else step.micro_batch(piece).inputs, items
                    )
        return loss

    def _again(
        self, model: nn.Module, step: Step, parts: list[list[int]], items: Any, most_rows: int
    ) -> Tensor:
        release_memory()
        model.zero_grad()
        self.metrics.rewind()
        self.most_rows = most_rows
        return self._in_pieces(model, step, parts, items)

    def _check_can_be_smaller(self, rows: int, error: BaseException) -> None:
        if self.most_rows == 1 or rows == 1:
            raise OutOfMemory(ROW_TOO_LARGE) from error
        # the other ranks wait inside their own backward pass
        if self.accelerator.num_processes > 1 or self.is_deepspeed_enabled:
            raise OutOfMemory(
                f"rank {self.accelerator.process_index} ran out of memory: halve per_device_train_batch_size,"
                " double gradient_accumulation_steps (the steps stay the same), and resume from the last"
                " checkpoint."
            ) from error

    # -- checkpoints -------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        args = self.args
        if args.num_iterations == 1:
            return super()._get_train_sampler(train_dataset)
        per_step = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        return RepeatedSteps(
            len(self.train_dataset),
            per_step,
            args.num_iterations,
            args.seed if args.data_seed is None else args.data_seed,
            lambda: int(self.state.epoch or 0),
            shuffled=args.train_sampling_strategy != "sequential",
        )

    def stateful_teacher(self, file: str, teacher: Teacher) -> Stateful:
        """A teacher, whose state a checkpoint holds in `file`."""
        return Stateful(partial(self.save_teacher, teacher, file=file), partial(teacher.load, file=file))

    def stateful_rollout(self, store: RolloutStore) -> Stateful:
        """The rollout in progress, which later steps use again."""
        ranks = self.accelerator.num_processes
        return Stateful(partial(store.save, is_writer=self.args.should_save, world_size=ranks), store.load)

    def _get_output_dir(self, trial: Any) -> str:
        return self._run_folder or str(super()._get_output_dir(trial))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; a checkpoint also gets the state of all that is `stateful` (before
        `trainer_state.json`, which completes it).
        """
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None:
            if self.args.should_save:
                record.write(output_dir, self._trained_with())
            for part in self.stateful:
                part.save(output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in transformers, but built aside and put in its place when it is whole
        (:mod:`unisd.training.checkpoints`).

        Raises:
            UserError: the disk is full; older checkpoints are as they were.
        """
        args, folder, name = self.args, self.args.output_dir, f"checkpoint-{self.state.global_step}"
        held_back = (args.push_to_hub, args.save_total_limit)
        try:
            if args.should_save:
                checkpoints.clear_staging(folder)
            self.accelerator.wait_for_everyone()
            args.push_to_hub, args.save_total_limit = False, None
            self._run_folder = str(checkpoints.staging_folder(folder))
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            self._place_best(name)
            if args.should_save:
                self.state.save_to_json(str(checkpoints.staging_folder(folder) / name / checkpoints.STATE))
                checkpoints.publish(folder, name)
        except Exception as error:
            checkpoints.clear_staging(folder)
            if checkpoints.disk_is_full(error):
                raise checkpoints.saving_failed(error, folder, name) from error
            raise
        finally:
            self._run_folder = None
            args.push_to_hub, args.save_total_limit = held_back
        self.accelerator.wait_for_everyone()
        if args.push_to_hub:
            self._push_from_checkpoint(str(Path(folder) / name))
        if args.should_save:  # only now: the older ones were the safety net
            rotate_checkpoints(
                folder, args.save_total_limit, best_model_checkpoint=self.state.best_model_checkpoint
            )

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the newest checkpoint beside the best, as rotation did: transformers removes it."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _place_best(self, name: str) -> None:
        """Name the best checkpoint by its place, not by where it was built: every rank may load it
        at the end.
        """
        best = f"checkpoint-{self.state.best_global_step}" if self.state.best_global_step else None
        if best is not None and (best == name or (Path(self.args.output_dir) / best).is_dir()):
            self.state.best_model_checkpoint = str(Path(self.args.output_dir) / best)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in transformers. `True` resumes from the newest *complete* checkpoint of `output_dir`.

        Raises:
            UserError: nothing to resume from, a broken checkpoint or one of another kind of run;
                and, after a checkpoint was saved, a run that cannot go on (see
                :mod:`unisd.training.guards`).
        """
        if self.deepspeed is not None:
            raise UserError("DeepSpeed's engine trains once: build a new trainer.")
        checkpoint = self._checkpoint_of(resume_from_checkpoint)
        self._changed, self._all_done = set(), False
        if checkpoint is not None:
            self._take_over(checkpoint)
        self.stop_reason = None
        try:
            output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        except RolloutError as error:
            raise UserError(f"{error} {self._save_finished_steps()}") from error
        except OutOfMemory as error:
            if self.accelerator.num_processes > 1:  # the others do not know of it
                raise
            raise UserError(f"{error} {self._save_finished_steps()}") from error
        if self.stop_reason is not None:
            raise UserError(self.stop_reason)
        return output

    def check_resume(self, checkpoint: str | Path) -> list[str]:
        """What this run has otherwise than its checkpoint, one line each; nothing is loaded.

        Raises:
            UserError: it is broken (but for checksums), or cannot be resumed by this run.
        """
        checkpoints.require_whole(checkpoint, contents=False)
        checkpoints.require_optimizer(checkpoint)
        stage = self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else None
        zero.require_resumable(checkpoint, stage, self.accelerator.num_processes)
        self._check_steps_left(checkpoint, checkpoints.step_of(checkpoint))
        lines, self._changed = record.differences(checkpoint, self._trained_with(), stage is not None)
        return lines

    def _take_over(self, checkpoint: str) -> None:
        """Say what has changed since the checkpoint, and load what is `stateful`."""
        lines = self.check_resume(checkpoint)
        if not self._changed & MEASURE:
            self._all_done |= is_over(checkpoint, self.args.early_stopping_patience)
        fix_date(self.processing_class, checkpoint)
        for part in self.stateful:
            part.load(checkpoint)
        if self.is_world_process_zero():
            for line in lines:
                logger.warning("resuming %s: %s", Path(checkpoint).name, line)
        if self.args.should_save:
            checkpoints.set_aside_after(self.args.output_dir, checkpoints.step_of(checkpoint))

    def _check_steps_left(self, checkpoint: str | Path, step: int) -> None:
        steps = planned_steps(self.args, len(self.rows))
        if step > steps:
            raise UserError(
                f"{checkpoint} is of step {step}, and this run ends at step {steps}: raise max_steps (or"
                " num_train_epochs), or resume from an earlier checkpoint."
            )
        self._all_done = step == steps

    def set_initial_training_values(self, *args: Any) -> tuple[Any, ...]:
        """As in transformers, which would take one step more of a run that is at its end."""
        epochs, *others = super().set_initial_training_values(*args)
        return (0 if self._all_done else epochs, *others)

    @cached_property
    def _data(self) -> dict[str, Any]:
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, list) else None
        return {"rows": record.rows_of(self.rows), "evaluation": record.rows_of(evaluated)}

    def _trained_with(self) -> dict[str, Any]:
        """What a checkpoint says of the run that wrote it (:mod:`unisd.training.record`)."""
        args = self.args
        return {
            "options": record.options_of(args),
            "adapter": record.adapter_of(self.model),
            "base": self._base,
            "base_name": self._base_name or "a model without a name",
            **self._data,
            "rows_per_step": self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
        }

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in transformers; options of the optimizer and of its schedule that were changed since
        take effect.
        """
        changed = self._changed & (record.OF_THE_OPTIMIZER | record.OF_THE_SCHEDULE | record.OF_THE_LENGTH)
        if checkpoint is None or not changed or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        built, rates = record.settings_of(self.optimizer), list(getattr(self.lr_scheduler, "base_lrs", ()))
        super()._load_optimizer_and_scheduler(checkpoint)
        record.take_effect(self.optimizer, self.lr_scheduler, built, rates)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.accelerator.scaler is not None:  # a run that goes on in bf16 needs none
            super()._load_scaler(checkpoint)

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """As in transformers; how often to log, save and evaluate is as this run says, also after a
        resume, and what was best by another measure is not.
        """
        found: tuple[int, int] = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        self.state.train_batch_size = self._train_batch_size
        if self._changed & MEASURE:
            self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        return found

    def _checkpoint_of(self, asked: str | bool | None) -> str | None:
        """The checkpoint to resume from, whole.

        One process finds out for all, since it reads every byte.
        """

        def find() -> str | None:
            if not self.accelerator.is_main_process:
                return None
            if asked is not True and not self.state.global_step:  # a second training is the same run's
                checkpoints.require_unused(self.args.output_dir, asked or None)
            check_not_the_model(Path(self.args.output_dir), self._base_name)
            if not asked:
                return None
            if asked is not True:
                checkpoints.require_whole(str(asked))
                return str(asked)
            newest = checkpoints.last_complete_checkpoint(self.args.output_dir, contents=True)
            if newest is None:
                raise UserError(
                    f"{self.args.output_dir} holds no complete checkpoint to resume from: start without"
                    " resuming."
                )
            return str(newest)

        found = [on_all_ranks(self.accelerator, find)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        return found[0]

    def _save_finished_steps(self) -> str:
        """A checkpoint of the last finished step, before the run ends in the middle of the next
        one; says where it is.
        """
        name = f"checkpoint-{self.state.global_step}"
        if self.state.global_step == 0:
            return "No step was finished yet."
        if checkpoints.problem_of(Path(self.args.output_dir) / name, contents=False) is not None:
            self._save_checkpoint(self.model, trial=None)
        return f"Step {self.state.global_step} is saved in {name}."

    @property
    def stopped_early(self) -> int | None:
        """The step at which `early_stopping_patience` has ended the training, if it did."""
        # By its type: transformers puts another one in its place where it restores callbacks.
        callbacks = (one for one in self.callback_handler.callbacks if isinstance(one, EarlyStopping))
        return next((one.stopped for one in callbacks), None)

    # -- bad steps ---------------------------------------------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        # In fp16 an overflow is how the loss scale is found: the scaler skips such steps itself.
        self.finite.grad_norm = 0.0 if self.accelerator.scaler is not None else whole
        return norm

    def watch_earlier(self, lines: Sequence[dict[str, Any]]) -> None:
        """Before the first step: a run begins in good health; a resumed one goes on from what it
        was, alarms included.
        """
        self.health = Watch(self.args.alarm_window)
        for line in lines:
            self.health.update(line["step"], line)

    def watch(self, step: int, values: dict[str, float], control: Any) -> None:
        """After a step, when its metrics are known: tell what looks wrong, and end the run where it
        must not go on.
        """
        raised = self.health.update(step, values) if self.args.alarms != "off" else []
        for alarm in raised:
            logger.warning("Step %d, %s: %s", step, alarm.name, alarm.text)
        reason = self.finite.too_many
        if reason is None and raised and self.args.alarms == "stop":
            reason = (
                f"stopped at step {step} by the alarm {raised[0].name!r} (alarms=stop): {raised[0].text} Look"
                " at the answers with `unisd chat`, and resume from an earlier checkpoint; the current"
                " state was saved."
            )
        if reason is not None:
            self.stop_reason = reason
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # after which the best alone may be saved
