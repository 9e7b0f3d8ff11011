"""Measure, or turn results into tables.

`python -m benchmarks CASE --json F`, where a case is loss, score, step, generate, main, memory,
growth, start, newcomer or run, and `python -m benchmarks table F... --output T`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

import torch

from benchmarks.cases import CASES
from benchmarks.measure import machine, versions
from benchmarks.options import Options
from benchmarks.shapes import SHAPES
from benchmarks.table import table
from experiments.pages import update


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    default = Options()
    for name, case in CASES.items():
        one = commands.add_parser(name, help=(case.__doc__ or "").splitlines()[0])
        one.add_argument("--json", type=Path, help="where the result goes; unset: it is only shown")
        one.add_argument("--shape", choices=sorted(SHAPES), default=default.shape)
        one.add_argument("--layers", type=int, help="cut the model's depth")
        one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        one.add_argument(
            "--repetitions",
            type=int,
            default=default.repetitions,
            help="most rounds over all implementations",
        )
        one.add_argument(
            "--seconds",
            type=float,
            default=default.seconds,
            help="no new round that would end later than this",
        )
        one.add_argument("--impls", nargs="+", help="only these rows")
        one.add_argument(
            "--full", action="store_true", help="also the slow extras that are left out on a CPU"
        )
        one.add_argument("--token_budget", type=int, help="tokens of ours's passes without gradient")
        for key in ("tokens", "prompt", "completion", "batch", "accumulation"):
            one.add_argument(f"--{key}", type=int, default=getattr(default, key))
        if name == "run":
            every = {"shape": "all", "completion": 0}  # unless one is named
            one.set_defaults(**every, device="cpu", repetitions=1, batch=4, accumulation=4)
    render = commands.add_parser("table", help="results as Markdown, between the markers of a page")
    render.add_argument("files", type=Path, nargs="+")
    render.add_argument("--output", type=Path, required=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run one command."""
    args = arguments(argv)
    if args.command == "table":
        args.output.parent.mkdir(parents=True, exist_ok=True)
        results = [json.loads(path.read_text(encoding="utf-8")) for path in args.files]
        update(args.output, "Speed and memory", table(results))
        return 0
    given = {key: value for key, value in vars(args).items() if key not in ("command", "json")}
    options = Options(
        **given | {"device": torch.device(args.device), "impls": args.impls and tuple(args.impls)}
    )
    log = logging.getLogger("unisd")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        rows, ratios = CASES[args.command](options)
    finally:
        log.setLevel(level)
    words = [arg for arg in (sys.argv[1:] if argv is None else argv)]
    result = {
        "bench": args.command,
        "machine": machine(options.device),
        "versions": versions(),
        "command": "python -m benchmarks " + " ".join(words),
        "settings": {key: str(value) if key == "device" else value for key, value in vars(options).items()},
        "rows": rows,
        "ratios": ratios,
    }
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        at = f" {row['axis']}={row['at']}" if "axis" in row else ""
        held = row.get("extra_memory_mb", row.get("peak_memory_mb"))
        memory = "" if held is None else f" {held:10.1f} MB"
        print(f"{row['impl'] + at:<28} {row.get('time_s', row.get('cpu_s')):10.3f} s{memory}")
    for name, value in ratios.items():
        print(f"{name:<36} {value:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
