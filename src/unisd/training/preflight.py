"""Find out before a run what would end it late, or let it run for nothing.

What a run only does at its first step, its first evaluation or its first save is done once on a
small scale: rows are checked, optimizer and schedule are built, and everything but the weights is
saved to a folder that is removed. No trace is left: neither of files nor of random numbers nor of
the optimizer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer import TRAINING_ARGS_NAME

from unisd.config import UniSDConfig
from unisd.data.privilege import BUILT
from unisd.data.prompts import encode_completion
from unisd.data.rows import Row
from unisd.distributed.collectives import on_all_ranks
from unisd.errors import UserError, by_caller, nearest, one_line
from unisd.kernels.devices import shares_host
from unisd.methods.scores import StepScores
from unisd.models.generation import mend_generation_config
from unisd.rollout.engine import Completion
from unisd.training.plan import planned_steps

if TYPE_CHECKING:
    from unisd.trainer import UniSDTrainer

logger = getLogger(__name__)

IN_BACKWARD = ("lomo", "adalomo", "layerwise")
"""Parts of the names of optimizers that move weights while a backward pass still runs."""
ENOUGH_ANSWERS = 8
"""Answers of a first step of which none carries loss by more than chance."""


def check_machine(args: UniSDConfig) -> None:
    """Before the model is loaded: raise `UserError` for an option that the device cannot serve.

    Or that several processes cannot: how they share an epoch's rows is relied on (`rows_to_fill`,
    `planned_steps`).
    """
    if not isinstance(args, UniSDConfig):
        raise UserError(f"args is {type(args).__name__}: give a UniSDConfig.")
    if args.fp16 and shares_host(args.device):
        raise UserError("fp16 has no effect on a CPU: unset it, or set bf16.")
    if args.diagnostics_gradient_steps is not None and (args.world_size > 1 or args.deepspeed):
        raise UserError(
            "diagnostics_gradient_steps compares whole gradients, in one process and without DeepSpeed: unset"
            " it, or measure a short run on one device."
        )
    shares = args.accelerator_config
    if args.world_size > 1 and (shares.split_batches or shares.dispatch_batches or not shares.even_batches):
        raise UserError(
            "accelerator_config: several processes get a step's rows in one way: leave out split_batches,"
            " dispatch_batches and even_batches."
        )


def check_ready(trainer: UniSDTrainer) -> None:
    """When everything is built: raise `UserError` for the first thing that would end the run late.

    All ranks must call.
    """
    args = trainer.args
    trainer.request_builder.check(trainer.rows)
    trainer.completions.check()
    if args.teacher_context == "plain" and _teaches_nothing(args):
        logger.warning(
            "teacher_context=plain: student and teacher read the same, with the same weights at the"
            " start, so that nothing is learned."
        )
    if args.uses_reference or args.teacher_context in BUILT:
        trainer.prompts.check_generation_prefix(trainer.rows[0])
    _check_references_carry_loss(trainer)
    evaluated = trainer.eval_dataset if trainer.eval_dataset is not None else []
    parts = evaluated if isinstance(evaluated, dict) else {"": evaluated}
    for name, rows in parts.items():
        check_evaluated(trainer, rows, f"the evaluation data {name!r}" if name else "the evaluation data")
    check_evaluated(trainer, trainer.observer.probes.rows, "the probe set")
    _check_trained(trainer.model)
    _check_full_batch(args, len(trainer.rows))
    trainer._get_train_sampler()  # of num_iterations, which needs whole steps
    if args.eval_on_start and trainer.eval_dataset is None:
        remedy = by_caller("set eval_strategy", "give eval_dataset")
        raise UserError(f"eval_on_start has no rows: {remedy}.")
    if trainer.plan.judged and trainer.grader is None:
        raise UserError(
            "the answers are to be judged (rollout_contexts, rollout_keep or a weight asks for it), but"
            f" nothing judges them: give {by_caller('--grader, or a task that grades', 'grader')}."
        )
    check_best_metric(args, trainer.eval_dataset, trainer.grader is not None)
    given, schedule = trainer.optimizer, trainer.lr_scheduler
    own = trainer.cuts_weights or trainer.is_deepspeed_enabled  # optimizers of shards are built already
    if given is not None and not own:
        _check_optimizes(given, trainer.model)
    if not own and schedule is not None and getattr(schedule, "optimizer", given) is not given:
        raise UserError(
            "the schedule in optimizers belongs to another optimizer: give (optimizer, its schedule)."
        )
    if not trainer.is_deepspeed_enabled:  # its engine builds both, by a file of its own
        _try_optimizer(trainer)
        _try_schedule(trainer)
    on_all_ranks(trainer.accelerator, lambda: _try_saving(trainer) if args.should_save else None)


def _teaches_nothing(args: UniSDConfig) -> bool:
    """Whether a teacher that is told nothing has nothing else to tell."""
    told = args.rollout_contexts or args.target or args.contrastive_weight or args.terms
    return not told and args.distillation_mode != "nll"


def check_evaluated(trainer: UniSDTrainer, rows: Sequence[Row], name: str) -> None:
    """Raise `UserError` for the first row that an evaluation could not ask, by its number."""
    args = trainer.args
    cap = args.eval_max_new_tokens or args.max_completion_length
    trainer.request_builder.check_evaluated(rows, name, trainer.eos_ids, cap)


# ------------------------------------------------------------------------------ nothing to train on


def _check_references_carry_loss(trainer: UniSDTrainer) -> None:
    args = trainer.args
    skipped = args.num_loss_tokens_to_skip
    if not skipped or args.completion_source != "reference":
        return
    tokenizer, ends = trainer.prompts.tokenizer, trainer.eos_ids
    answers = ((str(row["completion"]), ends, row["prompt"]) for row in trainer.rows)
    if all(len(encode_completion(tokenizer, *answer)) <= skipped for answer in answers):
        raise UserError(
            f"num_loss_tokens_to_skip={skipped} leaves no token of any reference with a loss: lower it."
        )


def check_carries_loss(trainer: Any, scores: StepScores, completions: Sequence[Completion]) -> None:
    """After a rollout: say that no token of a step carries loss; end a run that begins so.

    Args:
        scores: of all ranks.
        completions: of this rank.
    """
    args, step = trainer.args, trainer.state.global_step
    answers = len(scores.mask)
    if scores.mask.any() or not answers:
        return
    cut, by_options = sum(completion.truncated for completion in completions), True
    if args.mask_truncated_completions and cut:
        why = (
            f"{cut} of {len(completions)} answers ran into max_completion_length={args.max_completion_length}"
            ", and mask_truncated_completions leaves them out: raise it, or unset that"
        )
    elif args.num_loss_tokens_to_skip:
        why = f"no answer is longer than num_loss_tokens_to_skip={args.num_loss_tokens_to_skip}: lower it"
    else:
        why, by_options = "no answer was kept: look at what the model writes, with `unisd chat`", False

    def refuse() -> None:  # by what this rank has seen; then all end
        if step == 0 and by_options and answers >= ENOUGH_ANSWERS:
            raise UserError(f"no token of the first step carries loss: {why}.")

    on_all_ranks(trainer.accelerator, refuse)
    logger.warning("Step %d: no token carries loss: %s.", step + 1, why)


def _check_trained(model: Any) -> None:
    if any(p.requires_grad for p in model.parameters()):
        return
    if hasattr(model, "peft_config"):
        raise UserError(
            "nothing is trainable: the adapter is frozen: open it with PeftModel.from_pretrained(...,"
            " is_trainable=True)."
        )
    raise UserError(
        "nothing is trainable: all weights are frozen: call model.requires_grad_(True), or give peft_config."
    )


def _check_optimizes(optimizer: Any, model: Any) -> None:
    """An optimizer that was given moves what is trained."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = [p for p in model.parameters() if p.requires_grad]
    missing = [p for p in trained if id(p) not in held]
    if len(missing) == len(trained):
        raise UserError(
            "the optimizer in optimizers holds none of the weights that are trained: build it from"
            " trainer.model's weights (with peft_config: wrap the model first, and give no peft_config)."
        )
    if missing:
        logger.warning(
            "The optimizer in optimizers leaves %d of %d trained tensors as they are.",
            len(missing),
            len(trained),
        )


def _check_full_batch(args: UniSDConfig, rows: int) -> None:
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch:
        raise UserError(
            f"dataloader_drop_last leaves no batch: there are {rows} rows, and a batch has {batch}: unset it,"
            " or lower per_device_train_batch_size."
        )


# ----------------------------------------------------------------------------------- the best model


def check_best_metric(args: UniSDConfig, evaluation: Any, graded: bool) -> None:
    """Raise `UserError` if no evaluation reports `metric_for_best_model`, with the nearest name."""
    wanted = args.metric_for_best_model
    evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
    if wanted is None:
        return
    if not evaluates:
        raise UserError(
            f"metric_for_best_model={wanted} needs evaluations during training: set eval_strategy, or unset"
            " it."
        )
    parts = [f"{name}_" for name in evaluation] if isinstance(evaluation, dict) else [""]
    measured = ("loss", "accuracy", "runtime") if graded else ("loss", "runtime")
    names, metric = [f"{part}{name}" for part in parts for name in measured], wanted.removeprefix("eval_")
    if metric in names:
        return
    close = nearest(metric, names, cutoff=0.3)
    known = ", ".join(names)
    grader = "; accuracy needs a grader" if "acc" in wanted and not graded else ""
    hint = f"did you mean {close}?" if close else "choose one of these."
    raise UserError(
        f"metric_for_best_model={wanted} is not among what an evaluation reports ({known}{grader}): {hint}"
    )


# --------------------------------------------------------------------------- optimizer and schedule


def _try_optimizer(trainer: UniSDTrainer) -> None:
    """Build the optimizer that the options name, and drop it: training builds its own."""
    args = trainer.args
    name = str(getattr(args.optim, "value", args.optim))
    if any(part in name for part in IN_BACKWARD):
        raise UserError(
            f"optim={name} changes weights within the backward pass, before a step's gradient is"
            " complete and checked: use another one."
        )
    if trainer.optimizer is not None:
        return
    try:
        trainer.create_optimizer()
    except (ImportError, ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"optim={name} cannot be built: {one_line(error)} (see optim, optim_args and"
            " optim_target_modules)."
        ) from None
    finally:
        trainer.optimizer = None


def _try_schedule(trainer: UniSDTrainer) -> None:
    """Build the schedule on an optimizer of its own, which it would change, and drop it."""
    if trainer.lr_scheduler is not None:
        return
    args = trainer.args
    scratch = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    created = trainer._created_lr_scheduler
    try:
        trainer.create_scheduler(planned_steps(args, len(trainer.rows)), scratch)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"lr_scheduler_type={name} cannot be built: {one_line(error)}: set lr_scheduler_kwargs, as in"
            " '{\"min_lr\": 1e-6}'."
        ) from None
    finally:
        trainer.lr_scheduler, trainer._created_lr_scheduler = None, created


# ------------------------------------------------------------------------------------------- saving


def _try_saving(trainer: UniSDTrainer) -> None:
    """Save everything but the weights that a checkpoint holds, to a folder that is removed."""
    model: Any = trainer.model
    written: list[Any] = [trainer.processing_class]
    if hasattr(model, "peft_config"):
        written += model.peft_config.values()
    else:
        if note := mend_generation_config(model):
            logger.warning("%s", note)
        written += [model.config, model.generation_config] if model.can_generate() else [model.config]
    try:
        with tempfile.TemporaryDirectory(prefix="unisd-") as folder:
            for part in written:
                part.save_pretrained(folder)
            torch.save(trainer.args, Path(folder) / TRAINING_ARGS_NAME)
    except Exception as error:  # of a dozen libraries' kinds: of tokenizers, configs, pickle
        raise UserError(
            f"what is trained could not be saved: {one_line(error)}: fix the files of model or tokenizer"
            " before training."
        ) from error


# ------------------------------------------------------------------------------------------ the hub


def reach_hub(ask: Callable[[], Any]) -> Any:
    """Ask the hub something; what keeps it from answering is a `UserError`."""
    try:
        return ask()
    except Exception as error:  # the library raises a dozen kinds, all about network or rights
        raise UserError(
            f"push_to_hub: the hub refuses or cannot be reached: {one_line(error)}: log in with `hf auth"
            " login`, or unset push_to_hub."
        ) from None


def check_hub(args: UniSDConfig) -> None:
    """Without making a repository: raise `UserError` if the hub does not know who is asking."""
    from huggingface_hub import HfApi

    if args.push_to_hub and args.process_index == 0:
        reach_hub(lambda: HfApi().whoami(token=args.hub_token))
