"""What a trainer is built of: the student, how its rows are read, and its teachers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoTokenizer, ProcessorMixin

from unisd.backbone import Backbone, quiet_routers
from unisd.batching import collate
from unisd.config import UniSDConfig
from unisd.data.prompts import PromptBuilder
from unisd.data.rendering import fix_date, set_options
from unisd.data.rows import Row, load_rows, prepare_rows
from unisd.errors import UserError
from unisd.kernels.attention import disable_cudnn_sdpa, packing_pays
from unisd.kernels.devices import shares_host
from unisd.memory import default_token_budget
from unisd.methods.targets import Source
from unisd.models.adapters import check_adapter, is_adapter, keep_new_tokens, make_trainable, without_adapter
from unisd.models.load import can_checkpoint, load_model_and_tokenizer, with_adapter
from unisd.models.saving import check_as_saved
from unisd.models.tokens import embedded_tokens, known_tokens, mark_defined, mark_ends
from unisd.rollout.engine import Engine
from unisd.rollout.transformers_engine import TransformersEngine
from unisd.rollout.vllm.build import build_engine as vllm_engine
from unisd.scoring.passes import PassLayout
from unisd.scoring.prefix_sharing import can_share
from unisd.teacher import STATE_FILE, Teacher
from unisd.training.plan import Plan

logger = logging.getLogger(__name__)


class RowNumbers(Dataset[int]):
    """The dataset as the data loader sees it: row numbers.

    The rows themselves stay in the trainer.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def collate_numbers(numbers: list[int]) -> dict[str, Tensor]:
    """A batch of the data loader."""
    return {"row": torch.tensor(numbers)}


def load_student(
    model: str | Path | nn.Module, args: UniSDConfig, tokenizer: Any, peft_config: Any
) -> tuple[Any, Any]:
    """The model to train, with an adapter if asked, and its tokenizer."""
    model = str(model) if isinstance(model, Path) else model
    student: Any = model
    if isinstance(model, str):
        # bfloat16 weights cannot hold updates of 1e-5; an adapter is float32 on whatever base.
        adapted = peft_config is not None or is_adapter(model)
        student, own_tokenizer, _ = load_model_and_tokenizer(model, dtype="auto" if adapted else "float32")
        tokenizer = tokenizer or own_tokenizer
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = tokenizer.tokenizer
    disable_cudnn_sdpa(args.device)
    check_adapter(student, peft_config)
    if args.gradient_checkpointing and not can_checkpoint(student):
        kind = type(without_adapter(student)).__name__
        raise UserError(f"gradient_checkpointing: a {kind} cannot compute its layers again: unset it.")
    if isinstance(model, str) and hasattr(student, "peft_config"):
        make_trainable(student)
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(student.config._name_or_path)
    if args.disable_dropout:
        disable_dropout(student)
    mark_defined(student, tokenizer)
    _join_ends(student, tokenizer, args)
    if peft_config is not None:
        if student is model:
            check_as_saved(student)
        student = with_adapter(student, peft_config, args.seed, args.gradient_checkpointing)
    if hasattr(student, "peft_config"):
        keep_new_tokens(student)
    if any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in student.parameters()):
        logger.warning(
            "Trained weights of 16 bits lose updates of 1e-5: load the model in float32 (bf16=True"
            " computes in bf16)."
        )
    return student, tokenizer


def _join_ends(student: Any, tokenizer: Any, args: UniSDConfig) -> None:
    """Several tokens that mean stop count as one, but where no teacher is asked."""
    ends = mark_ends(student, tokenizer, args.merge_stop_tokens and args.divergence_spec.mode != "nll")
    if ends:
        names = " ".join(map(str, tokenizer.convert_ids_to_tokens(ends)))
        logger.warning("%d tokens mean stop (%s): they count as one.", len(ends), names)


def disable_dropout(model: nn.Module) -> None:
    """Switch a model's own dropout off, and the noise of its routers.

    That of an adapter stays, and so does the config.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in model.named_modules():
        if any(name.startswith(f"{layer}.") and ".base_layer" not in name for layer in layers):
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for attribute, value in vars(module).items():
            if "dropout" in attribute and isinstance(value, float):  # of attention, given to a kernel
                setattr(module, attribute, 0.0)
        if any("jitter_noise" in attribute for attribute in vars(module)):
            module.register_forward_pre_hook(_as_in_evaluation)


def _as_in_evaluation(module: nn.Module, _args: Any) -> None:
    """A router that draws experts, or adds noise, does so in training mode (PhiMoE, Mixtral)."""
    module.training = False


def check_routers(backbone: Backbone, coefficient: float, pad_id: int) -> None:
    """Say, or refuse, what becomes of the load-balancing loss of a mixture of experts.

    Raises `UserError` where it is asked for and the model has none.
    """
    kind = type(backbone.causal_lm).__name__
    if coefficient == 0:
        if quiet_routers(backbone.model):
            logger.warning(
                "%s was saved with output_router_logits: its load-balancing loss is not part of the"
                " training (router_aux_loss_coef=0.001 adds it).",
                kind,
            )
        return
    try:
        with torch.no_grad():
            batch = collate([[pad_id] * 4], False, pad_id, backbone.head_module.weight.device)
            found = backbone.forward(backbone.causal_lm, batch, aux_loss=True).aux_loss
    except (TypeError, AttributeError):
        found = None
    if not isinstance(found, Tensor):
        raise UserError(
            f"router_aux_loss_coef={coefficient:g}: {kind} computes no load-balancing loss: unset it."
        )


def training_rows(dataset: Any, args: UniSDConfig) -> list[Row]:
    """The rows to train on; of a stream as many as `max_steps` need."""
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = -(-args.max_steps // args.num_iterations)
    if isinstance(dataset, (str, Path)):
        return load_rows(dataset, needs_reference=args.uses_reference)
    return prepare_rows(
        dataset,
        name="the training data",
        needs_reference=args.uses_reference,
        of_stream=steps * per_step if args.max_steps > 0 else None,
    )


def build_prompts(args: UniSDConfig, tokenizer: Any, student: Any) -> PromptBuilder:
    """The prompts of student and teachers, by the run's options."""
    set_options(tokenizer, args.chat_template_kwargs)
    fix_date(tokenizer)
    rows = embedded_tokens(student)
    prompts = PromptBuilder(
        tokenizer,
        args.teacher_prompt_layout,
        args.teacher_prompt_template,
        args.auxiliary_prompt_template,
        args.teacher_context,
        args.teacher_chat_template_kwargs,
        rows if known_tokens(tokenizer) > rows else None,
    )
    if not prompts.is_chat:
        logger.warning("The tokenizer has no chat template: prompts are taken as plain text.")
    return prompts


def pass_layout(backbone: Backbone, args: UniSDConfig, pad_id: int) -> PassLayout:
    """How the model reads rows: what is exact for it, and pays on its device.

    Checked on the model itself, while every rank has a whole one. Raises `UserError` for a head
    that cannot be reproduced, and a packing that is not exact.
    """
    packed = backbone.check(pad_id, args.packing)
    check_routers(backbone, args.router_aux_loss_coef, pad_id)
    # The model may lie elsewhere still.
    share_prefixes = packed and shares_host(args.device) and can_share(backbone)
    named = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    dtype = named or backbone.head_module.weight.dtype
    pays = packing_pays(args.device, dtype, backbone.tells_rows, backbone.model.num_parameters())
    if args.packing == "auto" and not pays:
        packed = False
    return PassLayout(
        packed,
        pad_id,
        args.token_budget or default_token_budget(args.device),
        layers=tuple(args.feature_layers or ()),
        share_prompts=args.num_generations > 1 and backbone.can_continue(pad_id),
        share_prefixes=share_prefixes,
    )


def build_engine(
    args: UniSDConfig,
    plan: Plan,
    student: Any,
    accelerator: Accelerator,
    eos_ids: Sequence[int],
    pad_id: int,
    step: Callable[[], int],
) -> Engine:
    """The engine that the options name: vLLM, or transformers' `generate` on the student itself."""
    if args.use_vllm:
        return vllm_engine(args, student, accelerator, eos_ids, step)
    return TransformersEngine(
        student, eos_ids, pad_id, args.rollout_batch_size, tells_logps=plan.rollout_logps
    )


def chosen_engine(
    given: Engine | Callable[[Engine], Engine] | None, args: UniSDConfig, plan: Plan, student: Any, *rest: Any
) -> Engine:
    """The engine that was given, the one that the options name, or what a function makes of it."""
    if given is None or not hasattr(given, "generate"):
        engine = build_engine(args, plan, student, *rest)
        return engine if given is None else given(engine)
    return cast(Engine, given)


def build_teacher(model: nn.Module, args: UniSDConfig) -> Teacher:
    """The teacher of a run, by its options."""
    return Teacher(
        model,
        args.teacher_model_kind,
        args.teacher_update_rate,
        args.teacher_sync_steps,
        args.teacher_restart_steps,
    )


def other_teachers(teacher: Teacher, sources: Sequence[Source], args: UniSDConfig) -> dict[str, Teacher]:
    """Weights beside the teacher's: those that the target's sources name (a fixed teacher is the
    initial model already), and those that write the answers of `refresh_rollouts_every`.
    """
    others: dict[str, Teacher] = {}
    named = {source.weights for source in sources}
    if "base" in named:
        others["base"] = teacher if teacher.kind == "base" else Teacher(teacher.model, "base")
    if "step" in named:
        others["step"] = Teacher(teacher.model, "restart", restart_steps=args.target_reference_steps)
    if args.refresh_rollouts_every is not None:
        others["rollout"] = Teacher(teacher.model, "restart", restart_steps=args.refresh_rollouts_every)
    return others


def by_file(teacher: Teacher, others: Mapping[str, Teacher]) -> dict[str, Teacher]:
    """The teachers that have weights of their own, by the file that holds them in a checkpoint."""
    own = {f"teacher-{name}.safetensors": other for name, other in others.items() if other is not teacher}
    return {STATE_FILE: teacher} | own
