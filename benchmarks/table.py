"""Results as one Markdown page."""

from __future__ import annotations

from typing import Any

HEAD = """# Speed and memory

Each block is one run of one command: all implementations in one process on the same tensors, in turn, medians over the rounds.
Extra memory is the peak above what the process held before the call. Ratios are of medians inside that run; below 1 is ours ahead
(for `time_vs_limit`, how far the bare passes are away). `plain` and `limit` are `benchmarks/plain.py` and `benchmarks/limit.py`.
"""


def table(results: list[dict[str, Any]]) -> str:
    """The page of several results, in the order given."""
    return "\n".join([HEAD, *(_block(result) for result in results)])


def _block(result: dict[str, Any]) -> str:
    place, versions, settings = result["machine"], result["versions"], result.get("settings", {})
    where = f"{place['device']}, {place['processor']}, {place['cores']} core(s), {place['threads']} thread(s)"
    shape = settings.get("shape", "") + (f" cut to {settings['layers']} layers" if settings.get("layers") else "")
    lines = [
        f"## {result['bench']}" + (f": {shape}" if shape and result["bench"] != "main" else ""),
        "",
        f"`{result['command']}`",
        f"({where}; {', '.join(f'{name} {number}' for name, number in versions.items())})",
        "",
    ]
    along = any("axis" in row for row in result["rows"])
    planned = any("predicted_mb" in row for row in result["rows"])
    titles = [
        "implementation",
        *(["along", "passed tokens"] if along else []),
        "time (s)",
        "extra memory (MB)",
        *(["predicted (MB)"] if planned else []),
        "rounds",
    ]
    lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in result["rows"]:
        place_of = [f"{row['axis']} = {row['at']}", str(row["passed_tokens"])] if along else []
        rate = [f"{row['tokens_per_s']:.0f}" if "tokens_per_s" in row else ""] if rates else []
        memory = [f"{row[key]:.0f}" for key in ("extra_memory_mb", "predicted_mb") if key in row]
        cells = [row["impl"], *place_of, f"{row['time_s']:.2f}", *memory, *rate, str(row.get("repetitions", 1))]
        lines.append(f"| {' | '.join(cells)} |")
    if result["ratios"]:
        lines += ["", "| ratio | |", "|---|---|", *(f"| {name} | {value:.2f} |" for name, value in result["ratios"].items())]
    return "\n".join([*lines, ""])
