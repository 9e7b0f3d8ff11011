"""Holds the teacher's weights: a second value for every *trained* parameter.

They are put in place only while the teacher scores.

Under LoRA and QLoRA that is a copy of the adapter's factors (the base weights exist once); under
full fine-tuning it is one extra copy of the model. Swapping storage is exact: nothing is merged,
added or subtracted (method: trap 10). Of a model that is spread over processes, each has the values
of its own shards (:mod:`unisd.distributed.sharding`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unisd.distributed import shard_checkpoints, sharding
from unisd.errors import UserError

TOGETHER = 2**24
"""Most values of the weights that are worked on together: what this takes is not held at once of a
whole model.
"""
STATE_FILE = "teacher.safetensors"


class Teacher:
    """Weights of the teacher beside those of the student.

    Args:
        model: the student; its parameters with `requires_grad` are the ones that differ.
        kind: the schedule: `base` (initial weights, kept in the model's precision), `live` (the
            student's own), `ema` (kept in float32, because an update of 0.01 would vanish in
            bfloat16) or `restart` (a copy of the student, taken anew now and then).
        update_rate: weight of the student in an EMA update, 1 - beta of Eq. 3.
        sync_steps: EMA updates happen every so many optimizer steps.
        restart_steps: `restart` takes over the student's weights every so many steps.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str,
        update_rate: float = 0.02,
        sync_steps: int = 1,
        restart_steps: int | None = None,
    ) -> None:
        self.model = model
        self.kind = kind
        self.update_rate = update_rate
        self.sync_steps = sync_steps
        self.restart_steps = restart_steps
        self.parameters = (
            {name: p for name, p in model.named_parameters() if p.requires_grad} if kind != "live" else {}
        )
        self.state: dict[str, Tensor] = {
            name: sharding.local_shard(p).clone().to(torch.float32 if kind == "ema" else p.dtype)
            for name, p in self.parameters.items()
        }
        self._gathered: dict[str, Tensor] = {}  # of a sharded model: whole weights by name, until they change

    @torch.no_grad()
    def _follow_device(self) -> None:
        for name, p in self.parameters.items():
            if self.state[name].device != p.device:
                self.state[name] = self.state[name].to(p.device)

    @contextmanager
    def in_place(self) -> Iterator[dict[int, Tensor]]:
        """While active, the model computes with the teacher's weights.

        Yields them by `id` of the parameter.
        """
        self._follow_device()
        with sharding.values_in_place(self.model, self.parameters, self.state) as values:
            yield values

    def weight(self, parameter: Tensor | None) -> Tensor | None:
        """The teacher's value of one of the student's parameters, outside of `in_place`.

        That is the head's.

        Of a sharded model it is gathered where it is not at hand: then all ranks must ask.
        """
        if parameter is None:
            return None
        self._follow_device()
        if sharding.all_ranks_must_join(self.model):
            return self._whole_weight(parameter)
        for name, p in self.parameters.items():
            if p is parameter:
                return self.state[name].to(p.dtype)
        return parameter.detach()

    def _whole_weight(self, parameter: Tensor) -> Tensor:
        # By name: a gathered parameter is another object than the shard it came from.
        name = next(name for name, p in self.model.named_parameters() if p is parameter)
        if name not in self._gathered:
            own = self.parameters.get(name)
            value = parameter if own is None else sharding.as_dtensor(self.state[name].to(own.dtype), own)
            # what a forward pass has gathered is taken back
            self._gathered[name] = sharding.full_tensor(value).clone()
        return self._gathered[name]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the student after optimizer step number `step` (from 1).

        Eq. 3, phi <- beta phi + (1 - beta) theta, or a restart.
        """
        self._gathered.clear()
        if self.kind == "ema" and step % self.sync_steps == 0:
            self._follow_device()
            for names in self._groups():
                students = [sharding.local_shard(self.parameters[name]).float() for name in names]
                torch._foreach_lerp_([self.state[name] for name in names], students, self.update_rate)
        elif self.restart_steps is not None and step % self.restart_steps == 0:
            self._follow_device()
            for name, p in self.parameters.items():
                self.state[name].copy_(sharding.local_shard(p))

    def _groups(self) -> Iterator[list[str]]:
        """Names of weights that their device works on together, of `TOGETHER` values or one weight.

        An adapter has hundreds of them, each too small to keep a device busy.
        """
        names: list[str] = []
        for name, state in self.state.items():
            held = [self.state[other] for other in names]
            full = sum(other.numel() for other in held) + state.numel() > TOGETHER
            if held and (full or held[0].device != state.device):
                yield names
                names = []
            names.append(name)
        if names:
            yield names

    @torch.no_grad()
    def distance(self) -> Tensor:
        """Distance of student and teacher weights relative to the student's norm (0 for `live`).

        Left on the device.
        """
        self._follow_device()
        first = next(iter(self.parameters.values()), torch.zeros(()))
        apart, norm = torch.zeros(2, device=first.device)
        for names in self._groups():
            weights = [self.parameters[name] for name in names]
            values = [sharding.owned(sharding.local_shard(p), p).float() for p in weights]
            states = [
                sharding.owned(self.state[name], p).float() for name, p in zip(names, weights, strict=True)
            ]
            differences = torch._foreach_sub(states, values)
            apart = apart + torch.stack(torch._foreach_norm(differences)).square().sum().to(apart.device)
            norm = norm + torch.stack(torch._foreach_norm(values)).square().sum().to(norm.device)
        apart, norm = sharding.sum_over_ranks(torch.stack([apart, norm]), self.model)
        return torch.where(norm > 0, (apart / norm).sqrt(), 0.0)

    # -- checkpoints -------------------------------------------------------------------------------

    def _fingerprint(self) -> str:
        """Hash of a fixed teacher: a resumed run must meet the same one."""
        digest = hashlib.sha256()
        for name in sorted(self.state):
            flat = sharding.full_tensor(
                sharding.as_dtensor(self.state[name], self.parameters[name])
            ).flatten()
            digest.update(name.encode())
            digest.update(flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _laid_out(self) -> dict[str, Any]:
        """The weights as tensors that know how they are spread over the ranks.

        They share storage with the state.
        """
        return {name: sharding.as_dtensor(value, self.parameters[name]) for name, value in self.state.items()}

    def save(
        self, folder: str | Path, file: str = STATE_FILE, is_writer: bool = True, in_shards: bool = False
    ) -> None:
        """Write `teacher.safetensors` (or `file`).

        The weights where they change over time, else a fingerprint of the fixed ones.

        All ranks must call it if the model is sharded. in_shards: the weights go into a folder
        beside it, each rank writes its own.
        """
        moving = self.kind == "ema" or self.restart_steps is not None
        metadata = {"kind": self.kind, "fingerprint": "" if moving else self._fingerprint()}
        tensors = self._laid_out() if moving else {}
        if in_shards and tensors:
            shard_checkpoints.save_shards(tensors, Path(folder) / Path(file).stem)
            tensors = {}
        tensors = shard_checkpoints.whole_on_writer(tensors, is_writer)
        if is_writer:
            save_file(tensors, str(Path(folder) / file), metadata=metadata)

    def load(self, folder: str | Path, file: str = STATE_FILE) -> None:
        """Take over the state that `save` wrote.

        Raises:
            UserError: if the checkpoint was made with another kind of teacher, other weights, or
                none.
        """
        path = Path(folder) / file
        if not path.is_file():
            raise UserError(
                f"{folder} holds no {file}: it is not a checkpoint of a UniSD run that can be resumed."
            )
        self._gathered.clear()
        with safe_open(str(path), framework="pt") as opened:
            metadata = opened.metadata() or {}
            names = set(opened.keys())
        if metadata.get("kind") != self.kind:
            raise UserError(
                f"the checkpoint's teacher is {metadata.get('kind')!r}, this run's is {self.kind!r}: "
                "resume with the same teacher_model_kind."
            )
        if metadata.get("fingerprint"):
            if metadata["fingerprint"] != self._fingerprint():
                raise UserError(
                    "the checkpoint was trained against another base teacher: resume from the same initial"
                    " model."
                )
            return
        shards = path.with_suffix("")
        if shards.is_dir():
            shard_checkpoints.load_shards(self._laid_out(), shards)
            return
        if names != set(self.state):
            raise UserError(
                f"{path} belongs to other trained parameters: resume with the same model and LoRA options."
            )
        with safe_open(str(path), framework="pt") as opened:
            for name in names:
                part = sharding.part_like(opened.get_tensor(name), self.parameters[name])
                self.state[name] = part.to(self.state[name].device, self.state[name].dtype)
