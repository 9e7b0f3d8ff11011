"""What processes owe each other: one writer of a file at a time, and no child that outlives its
parent. Light.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from unisd.errors import UserError

_LIBC: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
_PARENT_DEATH_SIGNAL = 1


def lock(path: Path, busy: str) -> IO[str]:
    """Hold the file (made if need be) until the returned one is closed, or this process ends in any
    way.

    Raises:
        UserError: with the text `busy`, where another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(busy) from None
    return file


def cores() -> int:
    """How many cores this process may use: those that it is held to, and its share of them."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # of a container: microseconds in each period, or max
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        own = min(own, max(1, round(int(quota) / int(period))))
    return own


@contextmanager
def alone_in(folder: Path, busy: str) -> Iterator[None]:
    """Hold a folder, without a file in it, where its file system can.

    Raises:
        UserError: with the text `busy`, where another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(busy) from None
        yield
    finally:
        os.close(descriptor)


def die_with_parent() -> None:
    """In a child, on Linux: be killed when the parent ends in any way, or two processes would do
    one thing after a restart.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
