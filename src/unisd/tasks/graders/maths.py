"""Compare mathematical expressions, by math-verify (`pip install unisd[math]`).

For golds that are no plain numbers: \\frac{\\sqrt{3}}{2}, x^2 + 1, (0, 1]. The work is done in one
process, which is ended when an expression takes too long, so that none hangs.
"""

from __future__ import annotations

import importlib.util
import json
import selectors
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from unisd.data.thoughts import answer_of
from unisd.errors import UserError
from unisd.tasks.base import Grade
from unisd.tasks.graders.base import TAIL, AliasGrader

SECONDS = 30  # for one answer, with the start of the process


class Math(AliasGrader):
    """Whether the expression that a completion ends in equals one of gold's."""

    name = "math"
    takes = "a mathematical expression"
    remedy = "give a number or LaTeX, or a list of those that are right"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def read_one(self, value: object) -> str:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError('the grader math needs the package math-verify: pip install "unisd[math]".')
        text = str(value)
        if isinstance(value, bool) or self._ask(gold=[text], completion=None).get("unread") != []:
            raise self.refuse(value)
        return text

    def grade(self, completion: str, gold: tuple[str, ...]) -> Grade:
        text = answer_of(completion)[-TAIL:]
        if not text.strip():
            return Grade(False, None, "no answer found")
        found = self._ask(gold=list(gold), completion=text.encode("utf-8", "replace").decode())
        if "error" in found:
            return Grade(False, None, f"cannot be compared ({found['error']})", how="expression")
        if found["extracted"] is None:
            return Grade(False, None, "no answer found")
        correct = bool(found["correct"])
        return Grade(correct, found["extracted"], "" if correct else "wrong", how="expression")

    def _ask(self, **question: Any) -> dict[str, Any]:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                worker = str(Path(__file__).with_name("maths_worker.py"))
                self._process = subprocess.Popen(
                    [sys.executable, "-P", worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            process = self._process
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
                with selectors.DefaultSelector() as selector:
                    selector.register(process.stdout, selectors.EVENT_READ)
                    line = process.stdout.readline() if selector.select(SECONDS) else ""
                answer: dict[str, Any] = json.loads(line)
            except (OSError, ValueError):  # it took too long, or has died
                self.close()
                return {"error": "it takes too long"}
            return answer

    def close(self) -> None:
        """End the process; another one starts when it is needed."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


math = Math()
