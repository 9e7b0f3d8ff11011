"""How time and memory grow with contexts, completion length, vocabulary and rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.measure import interleave
from benchmarks.options import Options, Ratios, Rows
from benchmarks.settings import Star
from benchmarks.shapes import build, examples
from benchmarks.steps import passed_tokens, star_steps

AXES: dict[str, list[int]] = {
    "K": [0, 2, 4, 8],
    "completion": [32, 64, 128, 256],
    "vocabulary": [8_000, 32_000, 128_000],
    "rows": [2, 4, 8, 16],
}


def growth(o: Options) -> tuple[Rows, Ratios]:
    """Measure a UniSD* step of ours and the bare passes along four axes.

    K, completion length, vocabulary and rows (try `--shape llama-32k --layers 4`).

    Beside each time stands the number of tokens that pass the model, counted once per forward
    without gradient and three times for the student's. `slope_*` is the cost of one more token over
    that of the bare limit; `memory_growth_vocabulary` the extra memory at the largest vocabulary
    over that at the smallest.
    """
    rows: Rows = []
    ratios: Ratios = {}
    found: dict[str, list[tuple[int, float, float, float]]] = {axis: [] for axis in AXES}
    for axis, values in AXES.items():
        for value in values:
            at = {"K": 3, "completion": 64, "rows": 4} | ({} if axis == "vocabulary" else {axis: value})
            base = build(
                o.shape if axis != "vocabulary" else f"{o.shape}:{value}", o.device, o.dtype, o.layers
            )
            data = examples(
                base.config.vocab_size,
                at["rows"],
                (o.prompt, o.prompt),
                (at["completion"],) * 2,
                contexts=at["K"],
            )
            steps = star_steps(base, data, Star(), o.batch)
            samples = interleave(
                {name: steps[name]() for name in ("ours", "limit")}, o.device, o.repetitions, o.seconds / 16
            )
            tokens = passed_tokens(data)
            for name, sample in samples.items():
                rows.append(sample.row(name) | {"axis": axis, "at": value, "passed_tokens": tokens})
            a, b = (samples[name].row(name) for name in ("ours", "limit"))
            found[axis].append((tokens, a["time_s"], b["time_s"], a["extra_memory_mb"]))
    for axis in ("K", "completion", "rows"):
        ratios[f"slope_{axis}_vs_limit"] = slope([(t, a) for t, a, _, _ in found[axis]]) / slope(
            [(t, b) for t, _, b, _ in found[axis]]
        )
        ratios[f"r2_{axis}"] = linearity([(t, a) for t, a, _, _ in found[axis]])
    ratios["memory_growth_vocabulary"] = found["vocabulary"][-1][3] / max(found["vocabulary"][0][3], 1e-9)
    return rows, ratios


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope."""
    x, y = (torch.tensor(v, dtype=torch.float64) for v in zip(*points, strict=True))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def linearity(points: Sequence[tuple[float, float]]) -> float:
    """Squared correlation: 1 where the cost is linear."""
    x, y = (torch.tensor(v, dtype=torch.float64) for v in zip(*points, strict=True))
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1] ** 2)
