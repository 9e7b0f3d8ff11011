"""Put on the last locks from inside: limits of resources, and another user.

The user is another one where the sandbox was made by root.
"""

from __future__ import annotations

import os
import resource
from typing import Any


def confine(limits: dict[str, Any]) -> None:
    """Let go of the standard streams, and lower this process's limits for good.

    The limits are CPU seconds, bytes, processes and the user.
    """
    nothing = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    os.close(nothing)
    cpu, memory, files, processes = (
        int(limits[name]) for name in ("cpu_s", "memory", "file_size", "processes")
    )
    for which, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, files),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, processes),
    ):
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # Over the soft limit of CPU comes a signal that tells why it ended; the hard one, a second
        # later, kills.
        resource.setrlimit(
            which, (value, value + 1 if which == resource.RLIMIT_CPU and value != hard else value)
        )
    user = limits["user"]
    if user is not None:  # root's processes are not counted, so that only another user's can be bounded
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
