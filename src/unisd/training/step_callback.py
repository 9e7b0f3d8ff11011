"""Line 5 of the algorithm: what follows an optimizer step, and what is looked at just before it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

if TYPE_CHECKING:
    from unisd.trainer import UniSDTrainer


logger = logging.getLogger(__name__)


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Skips a step whose gradient is not finite, moves the teachers on, and closes the step's
    metrics and records.
    """

    def __init__(self, trainer: UniSDTrainer) -> None:
        self.trainer = trainer
        self.skipping = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop lines of steps that a resumed run does again, and watch the others again."""
        metrics = self.trainer.metrics
        self.trainer.began_at = state.global_step
        if self.trainer.is_world_process_zero():
            self.trainer.observer.samples.forget_after(state.global_step)
        lines = [metrics.forget_after(state.global_step) if self.trainer.is_world_process_zero() else []]
        if args.world_size > 1:
            broadcast_object_list(lines)
        self.trainer.watch_earlier(lines[0])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A gradient that is not finite must not reach the weights: without gradients the optimizer
        does nothing at all.
        """
        trainer = self.trainer
        with trainer.metrics.timed("student"):  # the first question to the device since its passes
            self.skipping = trainer.finite.is_bad(state.global_step + 1, trainer.metrics.sum_of("loss"))
        if self.skipping:
            logger.warning("Skipped %s.", trainer.finite.message)
            trainer.model.zero_grad(set_to_none=True)
        trainer.metrics.values["guard/skipped_steps"] = float(trainer.finite.skipped)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.metrics.values["learning_rate"] = float(kwargs["optimizer"].param_groups[0]["lr"])
        with self.trainer.metrics.timed("update"):
            for teacher in self.trainer.teachers.values():
                # A restart comes at its step also where the student has stayed as it was.
                if not self.skipping or teacher.restart_steps is not None:
                    teacher.update(state.global_step + 1)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave what was saved last: transformers ends a broken epoch as if it were whole."""
        if self.trainer.stop_reason is not None:
            control.should_evaluate = control.should_save = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.observer.after_last_loss()
        if trainer.teacher.kind != "live":
            trainer.metrics.add(weight_distance=trainer.teacher.distance())
        values = trainer.metrics.finish(state.global_step, trainer.is_world_process_zero())
        trainer.watch(state.global_step, values, control)
        trainer.observer.samples.write()
