"""Which freed memory a process on a CPU keeps, where glibc is its allocator: all of it, or, where memory is scarce, what is used again.

glibc takes ever larger blocks from its heap (up to 32 MiB, after the first that was freed), where the few that stay, such as the inputs
of checkpointed layers, hold the room of all others: a step at the shape of a 0.5B model held twice of what it needed. Mapped blocks go
back to the system when freed, and cost a page fault for every 4 KiB when they are asked for again, a seventh of the time of
a pass. So a run with gradient checkpointing maps its large blocks, but for passes without gradient, which leave next to nothing behind.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # options of `mallopt`
FRUGAL = 1 << 20, 128 << 10
"""Blocks of so many bytes are mapped; a free end of the heap of so many goes back."""
KEEP = 2**31 - 1, 2**31 - 1  # neither ever
USUAL = 32 << 20, 64 << 20
"""The same two where glibc's own rule arrives, once large blocks were freed; a rule that is set cannot be unset."""

_libc = ctypes.pythonapi
_mapping = False


def _map_from(size: int, trim: int) -> None:
    _libc.mallopt(M_MMAP_THRESHOLD, size)
    _libc.mallopt(M_TRIM_THRESHOLD, trim)


@contextmanager
def training(device: torch.device, frugal: bool) -> Iterator[None]:
    """On a CPU with glibc: freed activations leave the process at once (`frugal`), or stay in it for the next ones until the end.

    A threshold in MALLOC_MMAP_THRESHOLD_ or GLIBC_TUNABLES is left alone.
    """
    global _mapping
    chosen = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    if device.type != "cpu" or chosen or not hasattr(_libc, "gnu_get_libc_version"):
        yield
        return
    _map_from(*(FRUGAL if frugal else KEEP))
    _mapping = frugal
    try:
        yield
    finally:
        _map_from(*USUAL)
        _mapping = False
        _libc.malloc_trim(0)


@contextmanager
def keep_what_is_freed() -> Iterator[None]:
    """For passes without gradient: their buffers are used again and again, and go back at the end. Nothing where nothing is mapped."""
    global _mapping
    if not _mapping:
        yield
        return
    _map_from(*KEEP)
    _mapping = False
    try:
        yield
    finally:
        _map_from(*FRUGAL)
        _mapping = True
        _libc.malloc_trim(0)
