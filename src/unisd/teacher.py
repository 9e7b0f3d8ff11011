"""The teacher's weights: a second value for every *trained* parameter, put in place only while the teacher scores.

Under LoRA and QLoRA that is a copy of the adapter's factors (the base weights exist once); under full fine-tuning it is one extra copy
of the model. Swapping storage is exact: nothing is merged, added or subtracted (method: trap 10).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unisd.errors import UserError

STATE_FILE = "teacher.safetensors"


class Teacher:
    """Weights of the teacher beside those of the student.

    Args:
        model: the student; its parameters with `requires_grad` are the ones that differ.
        kind: the schedule: `base` (initial weights, kept in the model's precision), `live` (the student's own), `ema` (kept in
            float32, because an update of 0.01 would vanish in bfloat16) or `restart` (a copy of the student, taken anew now and then).
        update_rate: weight of the student in an EMA update, 1 - beta of Eq. 3.
        sync_steps: EMA updates happen every so many optimizer steps.
        restart_steps: `restart` takes over the student's weights every so many steps.
    """

    def __init__(
        self, model: nn.Module, kind: str, update_rate: float = 0.02, sync_steps: int = 1, restart_steps: int | None = None
    ) -> None:
        self.kind = kind
        self.update_rate = update_rate
        self.sync_steps = sync_steps
        self.restart_steps = restart_steps
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad} if kind != "live" else {}
        self.state: dict[str, Tensor] = {
            name: p.detach().clone().to(torch.float32 if kind == "ema" else p.dtype) for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def _follow_device(self) -> None:
        for name, p in self.parameters.items():
            if self.state[name].device != p.device:
                self.state[name] = self.state[name].to(p.device)

    @contextmanager
    def in_place(self) -> Iterator[dict[int, Tensor]]:
        """While active, the model computes with the teacher's weights. Yields them by `id` of the parameter."""
        self._follow_device()
        kept = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, p in self.parameters.items():
                p.data = self.state[name].to(p.dtype)
            yield {id(p): p.data for p in self.parameters.values()}
        finally:
            for name, p in self.parameters.items():
                p.data = kept[name]

    def weight(self, parameter: Tensor | None) -> Tensor | None:
        """The teacher's value of one of the student's parameters (the head's), for use outside of `in_place`."""
        if parameter is None:
            return None
        self._follow_device()
        for name, p in self.parameters.items():
            if p is parameter:
                return self.state[name].to(p.dtype)
        return parameter.detach()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step` (from 1): Eq. 3, phi <- beta phi + (1 - beta) theta, or a restart."""
        if self.kind == "ema" and step % self.sync_steps == 0:
            self._follow_device()
            for name, p in self.parameters.items():
                self.state[name].lerp_(p.detach().float(), self.update_rate)
        elif self.restart_steps is not None and step % self.restart_steps == 0:
            self._follow_device()
            for name, p in self.parameters.items():
                self.state[name].copy_(p.detach())

    @torch.no_grad()
    def distance(self) -> Tensor:
        """Distance of student and teacher weights relative to the student's norm (0 for `live`), left on the device."""
        self._follow_device()
        apart, norm = torch.zeros(()), torch.zeros(())
        for name, p in self.parameters.items():
            value = p.float()
            apart = apart.to(p.device) + (self.state[name].float() - value).square().sum()
            norm = norm.to(p.device) + value.square().sum()
        return torch.where(norm > 0, (apart / norm).sqrt(), 0.0)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _fingerprint(self) -> str:
        """Hash of a fixed teacher: a resumed run must meet the same one."""
        digest = hashlib.sha256()
        for name in sorted(self.state):
            flat = self.state[name].flatten()
            digest.update(name.encode())
            digest.update(flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path, file: str = STATE_FILE) -> None:
        """Write `teacher.safetensors` (or `file`): the weights where they change over time, else a fingerprint of the fixed ones."""
        moving = self.kind == "ema" or self.restart_steps is not None
        tensors = {name: value.contiguous().cpu() for name, value in self.state.items()} if moving else {}
        metadata = {"kind": self.kind, "fingerprint": "" if moving else self._fingerprint()}
        save_file(tensors, str(Path(folder) / file), metadata=metadata)

    def load(self, folder: str | Path, file: str = STATE_FILE) -> None:
        """Take over the state that `save` wrote.

        Raises:
            UserError: if the checkpoint was made with another kind of teacher, other weights, or none.
        """
        from safetensors import safe_open

        path = Path(folder) / file
        if not path.is_file():
            raise UserError(f"{folder} holds no {file}: it is not a checkpoint of a UniSD run that can be resumed.")
        with safe_open(str(path), framework="pt") as opened:
            metadata = opened.metadata() or {}
        if metadata.get("kind") != self.kind:
            raise UserError(
                f"the checkpoint's teacher is {metadata.get('kind')!r}, this run's is {self.kind!r}: "
                "resume with the same teacher_model_kind."
            )
        if metadata.get("fingerprint"):
            if metadata["fingerprint"] != self._fingerprint():
                raise UserError("the checkpoint was trained against another base teacher: resume from the same initial model.")
            return
        tensors = load_file(str(path))
        if set(tensors) != set(self.state):
            raise UserError(f"{path} belongs to other trained parameters: resume with the same model and LoRA options.")
        for name, value in tensors.items():
            self.state[name] = value.to(self.state[name].device, self.state[name].dtype)
