"""The one setting of UniSD* that all implementations are measured in: the recipe `unisd-star`."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass


def scratch_folder() -> str:
    """An output folder that goes with the process: a benchmark keeps nothing."""
    folder = tempfile.mkdtemp(prefix="unisd-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class Star:
    """Options of the recipe, by their symbols."""

    alpha: float = 0.0
    temperature: float = 0.7
    gamma: float = 0.01
    quantile: float = 0.95
    contrast: float = 0.01
    margin: float = 0.1
    feature: float = 0.01
    token_clip: float = 10.0
    ema_rate: float = 0.02
    learning_rate: float = 2e-5
