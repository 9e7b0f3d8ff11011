"""Carries out what README tells a newcomer to type, in its order: the seconds of each command.

In an empty folder, on the embedded model and a file of sums. What installs and what tests the
installation is left out.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.options import Options, Ratios, Rows

README = Path(__file__).resolve().parents[1] / "README.md"
QUESTION = b"What is 3 plus 4?\n"


def typed(page: Path) -> list[str]:
    """Every `unisd` command of a page's blocks, without its remark; the embedded model in it."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    found = re.findall(r"^(?:.*&& )?(unisd .*?)(?:\s+#.*)?$", "".join(blocks), re.M)
    return [command.replace("MODEL", "pocket") for command in found]


def write_sums(path: Path) -> None:
    """Rows of a newcomer's own: problems, solutions that the teacher reads, and answers."""
    pairs = [(a, b) for a in range(2, 10) for b in range(2, 5)]
    rows = [
        {
            "prompt": f"What is {a} plus {b}?",
            "privileged_context": f"{a} and {b} make {a + b}.",
            "completion": f"{a + b}",
        }
        for a, b in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def carry_out(commands: Iterable[str], folder: Path) -> Rows:
    """Run commands in a folder, one after the other; a row of seconds for each.

    Raises:
        RuntimeError: a command failed.
    """
    write_sums(folder / "rows.jsonl")
    rows = []
    for command in commands:
        words = [sys.executable, "-m", *shlex.split(command)]
        before, start = os.times(), time.perf_counter()
        done = subprocess.run(
            words, cwd=folder, input=QUESTION, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        after, seconds = os.times(), time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout.decode()[-2000:]}")
        used = after.children_user + after.children_system - before.children_user - before.children_system
        rows.append({"impl": command, "time_s": seconds, "cpu_s": used, "repetitions": 1})
    return rows


def newcomer(o: Options) -> tuple[Rows, Ratios]:
    """Seconds of every command of README, in order, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        return carry_out(typed(README), Path(folder)), {}
