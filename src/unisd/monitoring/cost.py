"""Accounts for a run: tokens by use, time by phase, memory, floating-point operations, energy.

Floating-point operations are estimated as 2 per weight and token of a forward pass, 2 more for the
gradient of the activations and 2 per *trained* weight for its own gradient (attention's own
products are left out). Energy is measured by codecarbon where that is installed (extra `energy`),
else estimated as in arXiv 2605.06597: hours x devices x TDP / 1000 x 0.7 x 1.2 kWh (70 % load, 20 %
overhead).
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections import Counter
from typing import Any

import torch
from accelerate.utils import gather_object

from unisd.config import UniSDConfig
from unisd.memory import ModelSize
from unisd.models.adapters import without_adapter
from unisd.scoring.views import TEACHER

LOAD, OVERHEAD = 0.7, 1.2
FORMULA = "hours x devices x TDP/1000 x 0.7 x 1.2"
PRIMARY = "primary"  # what the files of a run call the teacher's own view
MECHANISM_OF_VIEW = {"auxiliary": "agreement", "negative": "contrast", "student": "clip"}
"""Which mechanism asks for a view; the other ones but `primary` are sources of the target
(`teacher/plain`, `base/full`, ...).

The student's extra pass may also serve a reliability weight of one's own.
"""


def account(
    counts: dict[str, int],
    size: ModelSize,
    phases: dict[str, float],
    devices: int,
    *,
    head_only_embedding: bool,
    peak_bytes: int,
    peak_of: str,
    energy: dict[str, Any],
) -> dict[str, Any]:
    """The `cost` block of `results.json`.

    Args:
        counts: tokens by use, of all ranks.
        phases: seconds by phase; training is rollout, score, student and update.
        head_only_embedding: input and output embedding are one matrix (or there is none to
            subtract).
        energy: as `energy_of` returns it.
    """
    trained = counts.get("trained", 0)
    views = {
        name.removeprefix("scored_"): count for name, count in counts.items() if name.startswith("scored_")
    }
    scored = sum(views.values())
    forward = 2 * (size.parameters - (0 if head_only_embedding else size.vocabulary * size.hidden))
    flops = {
        "rollout": forward * (counts.get("generated", 0) + counts.get("prefilled", 0)),
        "score": forward * scored,
        "student": trained * (2 * forward + 2 * size.trained),
    }
    total = sum(flops.values())
    seconds = sum(phases.get(name, 0.0) for name in ("rollout", "score", "student", "update"))
    hours = seconds / 3600 * devices
    kwh = energy.get("kwh")
    return {
        "tokens": {
            "generated": counts.get("generated", 0),
            "prefilled": counts.get("prefilled", 0),
            "scored": scored,
            "scored_by_view": views,
            "trained": trained,
            "completion": counts.get("completion", 0),
        },
        "train_s": seconds,
        "devices": devices,
        "device_hours": hours,
        "million_tokens_per_device_hour": trained / 1e6 / hours if hours else None,
        "peak_memory_bytes": peak_bytes,
        "peak_memory_of": peak_of,
        "flops_estimated": {**flops, "total": total},
        "energy": {
            **energy,
            "kwh_per_million_tokens": kwh / (trained / 1e6) if kwh is not None and trained else None,
        },
        "by_mechanism": _by_mechanism(views, forward, total, phases),
    }


def _by_mechanism(
    views: dict[str, int], forward: int, total: int, phases: dict[str, float]
) -> dict[str, dict[str, float]]:
    """What each mechanism adds to the scoring of the teacher, and the teacher's update.

    Args:
        views: tokens scored by view.
        forward: operations of a token's forward pass.
        total: operations of the training.
    """
    scored = sum(views.values())
    tokens_of: Counter[str] = Counter()
    for view in views.keys() - {PRIMARY}:
        tokens_of[MECHANISM_OF_VIEW.get(view, "target")] += views[view]
    found: dict[str, dict[str, float]] = {
        mechanism: {
            "tokens_scored": tokens,
            "flops": forward * tokens,
            "share_of_flops": forward * tokens / max(total, 1),
            "seconds_estimated": tokens / scored * phases.get("score", 0.0),
        }
        for mechanism, tokens in sorted(tokens_of.items())
    }
    if phases.get("update"):
        found["ema"] = {
            "tokens_scored": 0,
            "flops": 0,
            "share_of_flops": 0.0,
            "seconds_estimated": phases["update"],
        }
    return found


def energy_of(
    seconds: float, devices: int, tdp_w: float | None, measured_kwh: float | None = None
) -> dict[str, Any]:
    """Estimate the energy of the training phases, unless it was measured; needs a TDP.

    Returns `{"kwh", "method", "tdp_w"}`.
    """
    if measured_kwh is not None:
        return {"kwh": measured_kwh, "method": "codecarbon", "tdp_w": tdp_w}
    if tdp_w is None:
        return {"kwh": None, "method": f"unknown: {FORMULA} needs device_tdp", "tdp_w": None}
    kwh = seconds / 3600 * devices * tdp_w / 1000 * LOAD * OVERHEAD
    return {"kwh": kwh, "method": FORMULA, "tdp_w": tdp_w}


def driver_tdp() -> float | None:
    """The power limit of the first NVIDIA GPU in watts, or None."""
    if not torch.cuda.is_available():
        return None
    command = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return float(answer.splitlines()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def peak_memory() -> tuple[int, str]:
    """The most memory in use so far, in bytes, and of what."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated()), "tensors on the GPU"
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, the others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "the whole process"


class Energy:
    """Measures training with codecarbon where it is installed; else nothing is measured."""

    def __init__(self) -> None:
        self.kwh: float | None = None
        self._tracker: Any = None

    def __enter__(self) -> Energy:
        try:
            from codecarbon import OfflineEmissionsTracker
        except ImportError:
            return self
        # The country sets the carbon intensity only, which is not used here.
        self._tracker = OfflineEmissionsTracker(
            country_iso_code="USA", save_to_file=False, log_level="error", allow_multiple_runs=True
        )
        self._tracker.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._tracker is not None:
            self._tracker.stop()
            self.kwh = float(self._tracker.final_emissions_data.energy_consumed)


def cost_of(
    trainer: Any, config: UniSDConfig, phases: dict[str, float], tdp_w: float | None, kwh: float | None
) -> dict[str, Any]:
    """The cost of a finished training, summed over ranks."""
    scored = {
        PRIMARY if view == TEACHER.name else view: count
        for view, count in trainer.scorer.passes.tokens.items()
    }
    counts = trainer.tokens + Counter({f"scored_{view}": count for view, count in scored.items()})
    counts["generated"], counts["prefilled"] = trainer.completions.generated, trainer.completions.prefilled
    if config.world_size > 1:
        counts = sum(gather_object([counts]), Counter())
    model = trainer.model
    core = without_adapter(model)
    inside, out = core.get_input_embeddings(), core.get_output_embeddings()
    tied = out is None or inside.weight is out.weight
    seconds = sum(phases.get(name, 0.0) for name in ("rollout", "score", "student", "update"))
    peak, peak_of = peak_memory()
    return account(
        dict(counts),
        ModelSize.of(model),
        phases,
        config.world_size,
        head_only_embedding=tied,
        peak_bytes=peak,
        peak_of=peak_of,
        energy=energy_of(seconds, config.world_size, tdp_w if tdp_w is not None else driver_tdp(), kwh),
    )
