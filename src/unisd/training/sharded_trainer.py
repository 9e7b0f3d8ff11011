"""A `transformers.Trainer` whose model may be sharded, by FSDP2 or DeepSpeed: how it is set up and
what its checkpoints hold.

See :mod:`unisd.distributed.sharding`; without either this is the Trainer itself. DeepSpeed's engine
keeps the optimizer in files of its own.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from unisd.backbone import quiet_routers
from unisd.distributed import shard_checkpoints, sharding
from unisd.models.adapters import without_adapter
from unisd.models.saving import complete
from unisd.teacher import Teacher

logger = logging.getLogger(__name__)

SHARDS = "shards"
"""The folder of a checkpoint in which each rank has written its own part of model and optimizer."""


def weights_without_gradient(model: nn.Module) -> list[str]:
    """The names of trained weights that a few tokens leave without a gradient, by one pass."""
    was_training = model.training
    model.eval()
    ids = torch.arange(4, device=without_adapter(model).device)[None]
    with torch.enable_grad():
        model(input_ids=ids, use_cache=False, **quiet_routers(model)).logits.float().sum().backward()
    found = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()
    model.train(was_training)
    return found


class ShardedTrainer(Trainer):  # type: ignore[misc]
    """The base of :class:`unisd.training.fault_tolerant_trainer.FaultTolerantTrainer`."""

    def __init__(self, model: Any, **options: Any) -> None:
        config = vars(model.config)
        kept = {name: config[name] for name in ("use_cache",) if name in config}
        super().__init__(model=model, **options)
        # The Trainer switches the cache off here and in all that it saves; our passes say which.
        config.pop("use_cache", None)
        config.update(kept)

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers.

        Raises `UserError` for a way of spreading weights that is not supported.
        """
        super().create_accelerator_and_postprocess()
        sharding.set_up(self)

    @property
    def cuts_weights(self) -> bool:
        """Whether every rank holds a part of the weights only."""
        return bool(
            self.is_fsdp_enabled
            or (self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3)
        )

    @property
    def _in_shards(self) -> bool:
        """Whether each rank writes its own part of a checkpoint (else it holds the files of an
        unsharded run).
        """
        return self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def place_model(self) -> None:
        """Spread the model over the ranks where they hold a part each, before the teacher takes its
        copy.
        """
        if self.cuts_weights:
            sharding.shard(self)
        elif self.is_deepspeed_enabled and not getattr(without_adapter(self.model), "is_quantized", False):
            # transformers leaves that to the engine, which is built for training only.
            self._move_model_to_device(self.model, self.args.device)

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; DDP looks for weights without a gradient where there are."""
        if self.args.world_size > 1 and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            handler = self.accelerator.ddp_handler
            names = [] if handler.find_unused_parameters else weights_without_gradient(model)
            if names:
                logger.warning(
                    "%d trained weights get no gradient from every text (%s, ...): DDP looks for them in each"
                    " step (ddp_find_unused_parameters).",
                    len(names),
                    names[0],
                )
                handler.find_unused_parameters = True
        return super()._wrap_model(model, *args, **kwargs)

    # -- saving: all ranks must call ---------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; but for checkpoints in shards, one whole model or adapter is
        written.
        """
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if _internal_call and self._in_shards:  # the weights are written with the optimizer's state
            if self.args.should_save and self.processing_class is not None:
                self.processing_class.save_pretrained(str(folder))
            return
        sharding.reshard(self.model)
        tensors: dict[str, Tensor] = self.model.state_dict(keep_vars=True)
        if hasattr(self.model, "peft_config"):
            tensors = {name: value for name, value in tensors.items() if value.requires_grad}
        state = shard_checkpoints.whole_on_writer(tensors, self.args.should_save)
        if self.args.should_save:
            self._save(str(folder), state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            complete(Path(output_dir or self.args.output_dir), self.model)

    def save_teacher(self, teacher: Teacher, folder: str, file: str) -> None:
        """Write the teacher's state into a checkpoint, as the model's is written."""
        if self.args.should_save or self.cuts_weights:
            teacher.save(folder, file, self.args.should_save, self._in_shards)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder = Path(output_dir)
        if self._in_shards:
            optimizer = shard_checkpoints.optimizer_state(self.model, self.optimizer)
            shard_checkpoints.save_shards(
                {"model": shard_checkpoints.weights(self.model), "optimizer": optimizer}, folder / SHARDS
            )
        else:
            state = shard_checkpoints.whole_optimizer_state(self.optimizer, self.args.should_save)
            if self.args.should_save:
                torch.save(state, folder / OPTIMIZER_NAME)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)

    # -- resuming ----------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if (folder / SHARDS).is_dir():
            shard_checkpoints.load_shards({"model": shard_checkpoints.weights(self.model)}, folder / SHARDS)
        elif hasattr(self.model, "peft_config") and not self.is_fsdp_enabled:
            shard_checkpoints.require_adapter(self.model, folder)
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:  # not as in transformers, which passes over names that it does not know
            shard_checkpoints.load_model(self.model, folder)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        folder = None if checkpoint is None else Path(checkpoint)
        if folder is None or not (self.is_fsdp_enabled or (folder / SHARDS).is_dir()):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if (folder / SHARDS).is_dir():
            shard_checkpoints.load_optimizer_shards(self.model, self.optimizer, folder / SHARDS)
        else:
            state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
            shard_checkpoints.load_optimizer_state(self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
