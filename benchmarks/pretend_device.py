"""Count what a step asks of a device, without one: kernels that it launches, waits for it.

A tensor "on the device" wraps one of the CPU, and torch takes it for one of another kind of device
(the one that torch keeps for backends of others), so that the code runs as it would on a GPU and a
mixture of devices is an error as it is there. Everything below autograd passes one function, which
sees where each operand lies. Registering the device holds for the whole process.

What counts:

- an *operation*: one that computes or copies something on the device. Views, shapes and empty
  memory cost no kernel. One `_foreach_*` or fused optimizer call counts as one.
- a *wait*: what `torch.cuda.set_sync_debug_mode` tells of. A value that Python asks for (`item`,
  `bool`, `float`), a copy to or from the device that is not `non_blocking`, an operation whose
  shape depends on values (`nonzero`, a mask as an index, `unique`), an index that lies on the
  host, and `torch.accelerator.synchronize`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import optimizer as optimizers
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretend"
VALUE_DEPENDENT = (
    "nonzero",
    "masked_select",
    "unique",
    "unique2",
    "_unique",
    "_unique2",
    "unique_dim",
    "equal",
)
FREE = ("empty", "new_empty", "_unsafe_view", "lift", "_has_compatible", "_local_scalar_dense")


class _Module(_DummyBackendModule):
    """What torch asks of a backend beside its kernels."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: None

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class OnDevice(torch.Tensor):
    """A tensor that torch takes for one on the device."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, raw: torch.Tensor) -> None:
        self.raw = raw

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: OnDevice) -> None:
        self.raw = value.raw

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **kwargs: Any) -> Any:
        return self.cpu().numpy(**kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})[0]


def register() -> torch.device:
    """Make the device known to torch, once in a process."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    # `torch.tensor(values, device=...)`: the values on the host first, then a copy that is seen
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_swap_module_params_on_conversion(True)
    for known in (optimizers._foreach_supported_types, _foreach_utils._foreach_supported_types):
        if OnDevice not in known:
            known.append(OnDevice)
    torch.accelerator.is_available = lambda: True
    return torch.device(NAME, 0)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, bool, str | None]:
    """Compute on the CPU. Returns the result, whether it is on the device, and why that waits."""
    flat = tree_flatten((args, kwargs))[0]
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    given = [x for x in tensors if isinstance(x, OnDevice)]
    on_device, device = bool(given), kwargs.get("device")
    wait = _why_waits(func, args, kwargs, tensors, given)
    if device is not None:
        on_device = torch.device(device).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif func._schema.name == "aten::copy_":
        on_device = isinstance(args[0], OnDevice)
    elif func._schema.name == "aten::_local_scalar_dense":
        on_device = False
    raw_args, raw_kwargs = tree_map_only(OnDevice, lambda x: x.raw, (args, kwargs))
    out = func(*raw_args, **raw_kwargs)
    if on_device:
        same = {id(x.raw): x for x in given}
        out = tree_map_only(torch.Tensor, lambda x: same[id(x)] if id(x) in same else OnDevice(x), out)
    return out, on_device or bool(given), wait


def _why_waits(func: Any, args: Any, kwargs: Any, tensors: list[Any], given: list[Any]) -> str | None:
    name = func._schema.name.removeprefix("aten::")
    if name in ("_to_copy", "copy_") and args[0].numel() == 0:
        return None
    if name == "_to_copy":
        to = kwargs.get("device")
        there = bool(given) if to is None else torch.device(to).type == NAME
        if there != bool(given) and not kwargs.get("non_blocking"):
            return "copy to the device" if there else "copy to the host"
    elif name == "copy_":
        there, here = isinstance(args[0], OnDevice), isinstance(args[1], OnDevice)
        if there != here and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
            return "copy to the device" if there else "copy to the host"
    elif not given:
        return None
    elif name == "_local_scalar_dense":
        return "value"
    elif name in VALUE_DEPENDENT or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        return name
    elif name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
        found = [index for index in args[1] if index is not None]
        if any(index.dtype == torch.bool for index in found):
            return "mask as index"
        if any(not isinstance(index, OnDevice) and index.numel() for index in found):
            return "index on the host"
    return None


def _is_free(func: Any) -> bool:
    """Whether the operation launches no kernel: a view, or memory without values."""
    returns = func._schema.returns
    views = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    name = func._schema.name.removeprefix("aten::")
    return views or name.startswith(FREE)


class Counting(TorchDispatchMode):
    """Counts while `active`, apart by `phase` and by whether the `model` computes."""

    def __init__(self) -> None:
        super().__init__()
        self.active, self.inside, self.phase = False, 0, "before"
        self.operations: Counter[tuple[str, str]] = Counter()  # by phase, and "model" or "outside"
        self.waits: Counter[tuple[str, str]] = Counter()
        self.sites: Counter[tuple[str, str, str]] = Counter()  # of operations outside of the model
        self.wait_sites: Counter[tuple[str, str, str]] = Counter()
        torch.accelerator.synchronize = lambda *_: self._wait("synchronize")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, on_device, wait = _run(func, args, kwargs or {})
        if self.active:
            if wait is not None:
                self._wait(wait)
            results = [x for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)]
            works = not results or any(x.numel() for x in results)
            if on_device and works and not _is_free(func):
                where = "model" if self.inside else "outside"
                self.operations[self.phase, where] += 1
                if not self.inside:
                    self.sites[self.phase, _site(), func._schema.name.removeprefix("aten::")] += 1
        return out

    def _wait(self, why: str) -> None:
        if self.active:
            self.waits[self.phase, "model" if self.inside else "outside"] += 1
            self.wait_sites[self.phase, _site(), why] += 1

    def watch(self, decoder: torch.nn.Module, accelerator: Any) -> None:
        """Tell inside and outside of the model by its decoder's passes, forwards and backwards."""

        def enter(*_: Any) -> None:
            self.inside += 1
            if torch.is_grad_enabled() and self.phase == "score":
                self.phase = "student"

        def leave(_module: Any, _args: Any, output: Any) -> None:
            self.inside -= 1
            hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
            if torch.is_grad_enabled() and hidden.requires_grad:
                hidden.register_hook(back)

        def back(_grad: Any) -> None:
            self.inside += 1

        decoder.register_forward_pre_hook(enter)
        decoder.register_forward_hook(leave)
        backward = accelerator.backward

        def whole(*args: Any, **kwargs: Any) -> None:
            before = self.inside
            backward(*args, **kwargs)
            self.inside = before

        accelerator.backward = whole


def _site() -> str:
    """The innermost line of this project's packages, else of transformers, that is at work."""
    frame, other = sys._getframe(2), "torch"
    while frame is not None:
        path = frame.f_code.co_filename
        if "/src/unisd/" in path:
            return f"{path.split('/src/unisd/')[1]}:{frame.f_lineno} {frame.f_code.co_name}"
        if other == "torch" and ("/transformers/" in path or "/accelerate/" in path):
            other = f"{path.rsplit('/', 2)[-2]}/{path.rsplit('/', 1)[-1]} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return other
