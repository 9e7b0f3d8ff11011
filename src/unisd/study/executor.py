"""Who runs a study's commands: processes on this machine, or a Ray cluster.

An executor knows nothing of studies.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from unisd.errors import UserError
from unisd.processes import cores, die_with_parent

POLL_S = 0.1
GRACE_S = 10.0


@dataclass(frozen=True)
class Job:
    """A command, and the file that gets its output."""

    name: str
    command: tuple[str, ...]
    log: Path


@dataclass(frozen=True)
class Finished:
    """How a job ended: 0, an exit status, or minus the number of the signal that ended it."""

    name: str
    returncode: int


class Executor(Protocol):
    """Runs jobs, `slots` at once."""

    slots: int

    def submit(self, job: Job) -> None:
        """Start a job; the caller keeps to the slots."""

    def wait(self) -> Finished:
        """Block until a submitted job has ended."""

    def close(self) -> None:
        """End everything that still runs."""


def devices() -> int:
    """GPUs of this machine; without a driver's tool there are none, and torch need not be asked."""
    if not (shutil.which("nvidia-smi") or shutil.which("rocm-smi")):
        return 0
    import torch

    return int(torch.cuda.device_count())


class LocalExecutor:
    """Runs processes on this machine: one a GPU, or on a CPU one a core.

    They share the cores evenly, and end with this process.

    Args:
        slots: runs at once; None: as many as there are GPUs, else cores.
    """

    def __init__(self, slots: int | None = None) -> None:
        self.gpus = devices()
        self.slots = slots or self.gpus or cores()
        self.threads = max(1, cores() // self.slots)
        self._running: dict[str, tuple[subprocess.Popen[bytes], int]] = {}

    def submit(self, job: Job) -> None:
        used = {slot for _, slot in self._running.values()}
        slot = next(number for number in range(len(used) + 1) if number not in used)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
        }
        if self.gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(self.gpus)))).split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[slot % self.gpus]
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for us; we end our children
                preexec_fn=die_with_parent,
            )
        self._running[job.name] = (process, slot)

    def wait(self) -> Finished:
        while True:
            for name, (process, _) in self._running.items():
                if process.poll() is not None:
                    del self._running[name]
                    return Finished(name, process.returncode)
            time.sleep(POLL_S)

    def close(self) -> None:
        for process, _ in self._running.values():
            _signal_group(process, signal.SIGTERM)
        end = time.monotonic() + GRACE_S
        for process, _ in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            _signal_group(process, signal.SIGKILL)  # also what the job has started: a server, other ranks
            process.wait()
        self._running.clear()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


class RayExecutor:
    """Jobs as tasks of a Ray cluster (extra `ray`), whose machines must share this machine's files.

    Args:
        slots: runs at once; None: as many as the cluster has GPUs, else CPUs.
        address: of the cluster; None: a new one on this machine.
    """

    def __init__(self, slots: int | None = None, address: str | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise UserError('--executor ray needs ray: pip install "unisd[ray]".') from None
        self._ray: Any = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        self.slots = slots or gpus or int(resources["CPU"])
        share = max(1, int(resources["CPU"]) // self.slots)
        # We retry ourselves, so that every attempt is recorded.
        self._task: Any = ray.remote(num_cpus=share, num_gpus=1 if gpus else 0, max_retries=0)(_run_job)
        self._threads = share
        self._running: dict[Any, str] = {}

    def submit(self, job: Job) -> None:
        path = [str(Path(entry).resolve()) for entry in sys.path if entry]
        reference = self._task.remote(
            list(job.command), str(job.log.resolve()), str(Path.cwd()), path, self._threads
        )
        self._running[reference] = job.name

    def wait(self) -> Finished:
        ready, _ = self._ray.wait(list(self._running), num_returns=1)
        name = self._running.pop(ready[0])
        try:
            return Finished(name, int(self._ray.get(ready[0])))
        except self._ray.exceptions.RayError:  # the worker or its machine has gone
            return Finished(name, -signal.SIGKILL)

    def close(self) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._ours:
            self._ray.shutdown()


def _run_job(command: list[str], log: str, folder: str, path: list[str], threads: int) -> int:
    """On a worker: run the command in a process that ends with the worker."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with Path(log).open("ab") as file:
        return subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=die_with_parent,
            check=False,
        ).returncode


def make(kind: str, slots: int | None, address: str | None = None) -> Executor:
    """The executor called `kind`: local or ray."""
    return RayExecutor(slots, address) if kind == "ray" else LocalExecutor(slots)
