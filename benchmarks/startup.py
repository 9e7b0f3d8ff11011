"""Measures what a command costs before it works: CPU seconds of processes of their own.

CPU seconds, because what a person waits for besides depends on what else the machine does.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile

from benchmarks.options import Function, Options, Ratios, Rows
from unisd.cli.main import COMMANDS

FIRST = {
    "train": [],
    "probe": [],
    "prepare": [],
    "eval": [],
    "study": [],
    "contamination": ["pocket"],
    "chat": ["pocket", "--prompt", "Hi"],
    "grade": ["pocket", "--completions", "none.jsonl"],
    "judge": ["none", "--judge_url", "http://127.0.0.1:1"],
    "merge": ["none"],
    "report": ["."],
    "recipes": [],
    "completion": ["bash"],
}
"""Every command as it is started for its first line; that the files are not there it says later."""


def start(o: Options) -> tuple[Rows, Ratios]:
    """CPU seconds of help and of a misspelt flag, to the first line, and of a dry run."""
    calls: dict[str, Function] = {}
    for name in COMMANDS:
        calls[f"help: {name}"] = lambda name=name: whole(name, "--help")  # type: ignore[misc]
        calls[f"typo: {name}"] = lambda name=name: whole(name, "--sede", "3")  # type: ignore[misc]
    for name, flags in FIRST.items():
        words = (name, *flags)
        calls[f"first line: {name}"] = lambda words=words: to_first_line(*words)  # type: ignore[misc]
    calls["dry run"] = lambda: whole("train", "--dry_run")
    rows = []
    for name, call in o.chosen(calls).items():
        found = [call() for _ in range(o.repetitions)]
        rows.append(
            {
                "impl": name,
                "cpu_s": statistics.median(found),
                "cpus_s": found,
                "repetitions": len(found),
            }
        )
    return rows, {}


def _process(folder: str, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "unisd", *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _ended(process: subprocess.Popen[bytes]) -> float:
    """Wait for a process; its own CPU seconds, user and system."""
    assert process.stdout is not None
    process.stdout.read()
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


def whole(*words: str) -> float:
    """A command from start to end."""
    with tempfile.TemporaryDirectory() as folder:
        return _ended(_process(folder, *words))


def to_first_line(*words: str) -> float:
    """A command until it has written a line, where it is killed."""
    with tempfile.TemporaryDirectory() as folder:
        process = _process(folder, *words)
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError(f"{words} wrote no line")
        process.kill()
        return _ended(process)
