"""Keep freed memory of a process on a CPU for the next activations, where glibc allocates it.

Blocks that are mapped anew cost a page fault for every 4 KiB, a sixth of the time of a pass; blocks
of the heap cost nothing when they are used again. But what stays in the heap while its neighbours
come and go holds their room: above all the inputs of checkpointed layers, kept from the forward
pass to the backward pass. They get mappings of their own (`own_block`), and so do the few blocks
that are so large that the heap would seldom have room for them: what is free in it goes back first
(`passing_block`).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unisd.distributed.sharding import is_sharded
from unisd.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # options of `mallopt`
KEEP_THRESHOLDS = 2**31 - 1, 2**31 - 1
"""Blocks of so many bytes are mapped; a free end of the heap of so many goes back: neither ever."""
USUAL = 32 << 20, 64 << 20
"""The same two where glibc's own rule arrives, once large blocks were freed; a rule that is set
cannot be unset.
"""
LARGE = 32 << 20
"""Bytes for a passing use before which what is free in the heap goes back, as the two would lie
side by side.
"""

_libc = ctypes.pythonapi
_PRIVATE: dict[str, Any] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
)


def _map_from(size: int, trim: int) -> None:
    _libc.mallopt(M_MMAP_THRESHOLD, size)
    _libc.mallopt(M_TRIM_THRESHOLD, trim)


@contextmanager
def keep_freed_memory(device: torch.device) -> Iterator[None]:
    """On a CPU with glibc: freed memory stays in the process until the end, and then goes back.

    A threshold in MALLOC_MMAP_THRESHOLD_ or GLIBC_TUNABLES is left alone.
    """
    chosen = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    if device.type != "cpu" or chosen or not hasattr(_libc, "gnu_get_libc_version"):
        yield
        return
    _map_from(*KEEP_THRESHOLDS)
    try:
        yield
    finally:
        _map_from(*USUAL)
        give_back()


@contextmanager
def training_memory(
    model: Any, device: torch.device, checkpointed: Callable[[], nn.ModuleList] | None
) -> Iterator[None]:
    """How memory is used while `model` is trained: freed memory is kept, and outputs of
    checkpointed blocks lie apart.

    checkpointed: finds these blocks; None: activations are not recomputed.
    """
    with keep_freed_memory(device), ExitStack() as stack:
        if checkpointed is not None and device.type == "cpu" and not is_sharded(model):
            with suppress(UserError):  # blocks that are not found
                stack.enter_context(outputs_in_own_blocks(checkpointed()))
        yield


def give_back() -> None:
    """Hand what is free in the heap back to the system, where the allocator can.

    When used again, it costs page faults.
    """
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def give_back_unchanged(tensor: Tensor) -> None:
    """Hand the pages of a tensor that are still those of its file back to the system.

    Weights of safetensors are such pages. When used again, they come from the system's cache of
    the file. A tensor that was changed, or is of no file, is left alone; so are all but on Linux.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE)
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE
    if end <= first:
        return
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
            pages = np.frombuffer(os.pread(file.fileno(), 8 * (end - first), 8 * first), dtype=np.uint64)
    except OSError:
        return
    held, swapped, of_file = (pages >> np.uint64(bit) & np.uint64(1) for bit in (63, 62, 61))
    # What was written to is a page of the process alone: it would come back as it was in the file.
    if len(pages) == end - first and not swapped.any() and bool((of_file >= held).all()):
        start, length = first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def own_block(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Make an empty tensor on the CPU in a mapping of its own.

    The heap would put it between others wherever there is room.

    Raises:
        MemoryError: there is none.
    """
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    try:
        return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, **_PRIVATE), dtype=dtype).view(*shape)
    except OSError as error:
        raise MemoryError(f"no mapping of {count * dtype.itemsize} bytes: {error}") from error


def passing_block(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Make a block of its own, for something short.

    A large one takes the place of what is free in the heap.

    Raises:
        MemoryError: there is none.
    """
    if math.prod(shape) * dtype.itemsize >= LARGE:
        give_back()
    return own_block(shape, dtype)


@contextmanager
def outputs_in_own_blocks(layers: nn.ModuleList) -> Iterator[None]:
    """Give what checkpointed `layers` hand on blocks of its own, while active.

    It is the input of the next layer, where a gradient will come. Before every eighth what is free
    in the heap goes back: of the room that one layer has left, a part does not fit the blocks of
    the next.
    """

    def make_room(_module: nn.Module, _args: Any) -> None:
        give_back()

    def hand_on(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        handed_on = output[0] if isinstance(output, tuple) else output
        copy = own_block(handed_on.shape, handed_on.dtype).copy_(handed_on)
        return (copy, *output[1:]) if isinstance(output, tuple) else copy

    with ExitStack() as hooks:
        for layer in layers[::8]:
            hooks.callback(layer.register_forward_pre_hook(make_room).remove)
        for layer in layers:
            hooks.callback(layer.register_forward_hook(hand_on).remove)
        yield
