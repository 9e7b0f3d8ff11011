"""Turn results into Markdown: one block per result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.whole_run import PHASES
from unisd.console import markdown_table

Row = dict[str, Any]


def _phase(name: str) -> tuple[str, str, Callable[[Row], str]]:
    """A column of wall and CPU seconds."""
    return f"{name} (s)", f"{name}_s", lambda row: f"{row[f'{name}_s']:.1f} / {row[f'{name}_cpu_s']:.1f}"


# title, the key that calls for it, how a row fills it
COLUMNS: list[tuple[str, str, Callable[[Row], str]]] = [
    ("implementation", "impl", lambda row: str(row["impl"])),
    ("along", "axis", lambda row: f"{row['axis']} = {row['at']}"),
    ("passed tokens", "passed_tokens", lambda row: str(row["passed_tokens"])),
    ("time (s)", "time_s", lambda row: f"{row['time_s']:.2f}"),
    ("CPU (s)", "cpu_s", lambda row: f"{row['cpu_s']:.2f}"),
    ("extra memory (MB)", "extra_memory_mb", lambda row: f"{row['extra_memory_mb']:.0f}"),
    ("peak memory (MB)", "peak_memory_mb", lambda row: f"{row['peak_memory_mb']:.0f}"),
    *map(_phase, (*PHASES, "other")),
    ("tokens", "tokens", lambda row: str(row["tokens"])),
    ("predicted (MB)", "predicted_mb", lambda row: f"{row['predicted_mb']:.0f}"),
    ("tokens/s", "tokens_per_s", lambda row: f"{row['tokens_per_s']:.0f}" if "tokens_per_s" in row else ""),
    ("TFLOP/s", "tflop_per_s", lambda row: f"{row['tflop_per_s']:.3f}" if "tflop_per_s" in row else ""),
    ("MFU", "mfu", lambda row: f"{row['mfu']:.0%}" if "mfu" in row else ""),
    ("rounds", "impl", lambda row: str(row.get("repetitions", 1))),
]


def table(results: list[dict[str, Any]]) -> str:
    """Write the blocks of several results, in the order given."""
    return "\n".join(_block(result) for result in results)


def _block(result: dict[str, Any]) -> str:
    place, versions, settings = result["machine"], result["versions"], result.get("settings", {})
    where = f"{place['device']}, {place['processor']}, {place['cores']} core(s), {place['threads']} thread(s)"
    shape = settings.get("shape", "") + (
        f" cut to {settings['layers']} layers" if settings.get("layers") else ""
    )
    lines = [
        f"## {result['bench']}"
        + (f": {shape}" if shape and result["bench"] not in ("main", "run", "start", "newcomer") else ""),
        "",
        f"`{result['command']}`",
        f"({where}; {', '.join(f'{name} {number}' for name, number in versions.items())})",
        "",
    ]
    if "note" in result:
        lines += [result["note"], ""]
    columns = [(title, write) for title, key, write in COLUMNS if any(key in row for row in result["rows"])]
    lines += markdown_table(
        [title for title, _ in columns], [[write(row) for _, write in columns] for row in result["rows"]]
    )
    if result["ratios"]:
        lines += [
            "",
            *markdown_table(
                ("ratio", ""), [(name, f"{value:.2f}") for name, value in result["ratios"].items()]
            ),
        ]
    return "\n".join([*lines, ""])
