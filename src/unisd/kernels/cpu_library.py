"""Measure once on a machine which library multiplies many rows faster on its CPU.

Rules by processor have been wrong: oneDNN makes twice as much as MKL on some processors with
AVX512, as much on others, and less for small weights with AVX2. The two round differently, so that
what was found is kept in the cache for all later runs on the machine, which then compute the same
to the bit.
"""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from unisd.errors import UserError
from unisd.files import cache_dir

CHOSEN = "UNISD_CPU_LIBRARY"
"""The variable that says `mkl` or `onednn`, and nothing is measured."""
THIN, LARGE = 128, 2**21
"""The least size of a product of a thin one (of an adapter) at most, and the entries of a weight
that is large: beyond the cache of a core.
"""
MEASURED = {"thin": (64, 256, 576), "small": (128, 576, 1536), "large": (128, 896, 4864)}
"""Rows, inputs and outputs that stand for a kind: gradients of an adapter with r = 64, an MLP of a
135M model, one of a 0.5B model.
"""
REPETITIONS = 4
MARGIN = 0.95
"""What oneDNN may take of MKL's time at most: it pads rows, and compiles a kernel a shape."""

Product = Callable[[Tensor, Tensor], Tensor]


def faster_than_mkl(product: Product, rows: int, weight_OI: Tensor) -> bool:
    """Whether `product(x [N,I], weight [O,I])` takes clearly less time than MKL's of its kind.

    Measured at the first product of its kind with so many threads, and read from the cache
    afterwards; a machine without a writable cache measures nothing, and says yes.

    Raises:
        UserError: `UNISD_CPU_LIBRARY` is neither mkl nor onednn.
    """
    if chosen := os.environ.get(CHOSEN):
        if chosen not in ("mkl", "onednn"):
            raise UserError(f"{CHOSEN}={chosen}: say mkl or onednn, or unset it.")
        return chosen == "onednn"
    thin = min(rows, *weight_OI.shape) <= THIN
    kind = "thin" if thin else "large" if weight_OI.numel() >= LARGE else "small"
    return _kept(product, kind, torch.get_num_threads())


@lru_cache
def _kept(product: Product, kind: str, threads: int) -> bool:
    file = cache_dir() / "cpu" / f"{_machine()}-{threads}-{kind}.json"
    with suppress(OSError):
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            _write_first(file, json.dumps(_measured(product, kind)))
        with suppress(ValueError, KeyError):
            found = json.loads(file.read_text(encoding="utf-8"))
            return bool(found["onednn_s"] < MARGIN * found["mkl_s"])
    return True


def _write_first(file: Path, text: str) -> None:
    """Write the file whole, unless another process was first: then that one's holds."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent, encoding="utf-8") as written:
        written.write(text)
        written.flush()
        with suppress(FileExistsError):
            os.link(written.name, file)


def _measured(product: Product, kind: str) -> dict[str, float]:
    """Seconds of the fastest product by each library, which take turns."""
    with torch.inference_mode():
        rows, inputs, outputs = MEASURED[kind]
        x_NI, weight_OI = torch.ones(rows, inputs), torch.ones(outputs, inputs)
        if kind == "thin":  # gradients multiply what lies the other way round
            x_NI, weight_OI = torch.ones(inputs, rows).T, torch.ones(inputs, outputs).T
        ways: dict[str, Callable[[], Tensor]] = {
            "mkl_s": lambda: x_NI @ weight_OI.T,
            "onednn_s": lambda: product(x_NI, weight_OI),
        }
        best = dict.fromkeys(ways, float("inf"))
        for turn in range(REPETITIONS):
            for name, multiply in ways.items():
                start = time.perf_counter()
                multiply()
                if turn:  # the first compiles a kernel, and wakes the threads
                    best[name] = min(best[name], time.perf_counter() - start)
    return best


def _machine() -> str:
    """The processor, what torch uses of it, and torch: a part of a file's name."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        name = next(iter(re.findall(r"^model name\s*: (.*)$", told, re.M)), name)
    limits = [os.environ.get(limit, "") for limit in ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")]
    whole = "-".join(
        [name, torch.backends.cpu.get_cpu_capability(), *filter(None, limits), torch.__version__]
    )
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", whole)
