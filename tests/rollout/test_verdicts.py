"""Verdicts on a step's completions: what a grader may return, and graders that misbehave."""

from __future__ import annotations

import logging
import math
import random
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from unisd import UserError
from unisd.rollout.verdicts import Judge, as_verdict, tells_reference
from unisd.tasks.base import Grade, Verdict, as_grade

ROWS = [
    {"id": str(i), "prompt": f"{i}?", "privileged_context": f"reference number {i} is this one"}
    for i in range(6)
]


def test_what_a_grader_may_return() -> None:
    assert as_verdict(True) == Verdict(1.0, True) and as_verdict(0) == Verdict(0.0, False)
    assert as_verdict(0.25) == Verdict(0.25, False) and as_verdict(1.0) == Verdict(1.0, True)
    assert as_verdict(Grade(False, "7", feedback="too low")) == Verdict(0.0, False, "too low")
    assert as_verdict(given := Verdict(0.5, True, "half")) == given
    for right in (np.bool_(True), Grade(np.bool_(True)), Verdict(1.0, np.bool_(True)), Verdict(1.0, 1)):
        assert as_verdict(right).passed is True and as_grade(right).correct is True
    nonsense = (math.nan, math.inf, -0.1, 1.1, "right", "True", [1], None, {"score": 1.0}, 85.0, (True, ""))
    objects = (
        Verdict(math.nan, True),
        Verdict(1.0, "no"),
        Grade("no"),
        Grade(True, score=7),
        Verdict(0, False, {"a": 1}),
    )
    for value in (*nonsense, *objects):
        with pytest.raises(UserError, match="a bool, a score from 0 to 1, a Grade or a Verdict is needed"):
            as_verdict(value)
    half = as_grade(Verdict(0.5, True, "half"))
    assert (half.share, half.correct, half.feedback) == (0.5, True, "half") and as_grade(0.5).share == 0.5


def test_verdicts_come_in_order_and_several_at_once() -> None:
    together, lock, most = 0, threading.Lock(), 0

    def slow(row: dict[str, Any], text: str) -> Verdict:
        nonlocal together, most
        with lock:
            together, most = together + 1, max(most, together + 1)
        time.sleep(0.02 * (6 - int(row["id"])))
        with lock:
            together -= 1
        return Verdict(int(row["id"]) / 10, False, text)

    found = Judge(slow, workers=3).verdicts(ROWS, [f"answer {i}" for i in range(6)])
    assert found == [Verdict(i / 10, False, f"answer {i}") for i in range(6)] and most == 3


def test_graders_that_misbehave_are_told_and_cost_their_own_verdict_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def grade(row: dict[str, Any], text: str) -> Any:
        if row["id"] in "05":
            raise ValueError("no such city")
        if row["id"] == "1":
            time.sleep(60)
        return {"2": math.nan, "3": None}.get(row["id"], True)

    judge = Judge(grade, limit_s=0.2, workers=2)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        found = judge.verdicts(ROWS, [""] * 6)
    assert time.monotonic() - start < 5
    assert found == [None, None, None, None, Verdict(1.0, True), None]
    assert judge.failures == {"raises": 2, "hangs": 1, "nonsense": 1}
    said = [record.getMessage() for record in caplog.records]
    assert sorted(text.partition(",")[0] for text in said) == [
        "The grader gave nan",
        "The grader gave no verdict within 0.2 s",
        "The grader raised ValueError: no such city",
    ]
    assert all("for row" in text for text in said)


def test_feedback_never_holds_the_reference() -> None:
    generator = random.Random(0)
    for _ in range(500):
        words = [generator.choice(["one", "two", "three", "four", "five", "six", "seven"]) for _ in range(9)]
        row = {"id": "r", "privileged_context": " ".join(words), "answer": words[0]}
        noise = generator.choice(["It is wrong: ", "", "Expected "]) + generator.choice(
            [" ".join(words).upper(), ", ".join(words), "\n" + words[0] + "\nwas wanted"]
        )
        assert tells_reference(noise, row)
        [verdict] = Judge(lambda row, text, noise=noise: Verdict(0.0, False, noise)).verdicts([row], ["x"])
        assert verdict == Verdict(0.0, False)
    kept = "argument city is wrong; 3 of 4 calls are right"
    [verdict] = Judge(lambda row, text: Verdict(0.75, False, kept)).verdicts([row], ["x"])
    assert verdict == Verdict(0.75, False, kept)


def test_a_grader_that_exits_costs_its_own_verdict_only(caplog: pytest.LogCaptureFixture) -> None:
    def grade(row: Any, text: str) -> bool:
        if text == "answer 2":
            sys.exit(1)
        return True

    judge = Judge(grade, workers=2)
    found = judge.verdicts(ROWS, [f"answer {i}" for i in range(6)])
    assert [verdict is None for verdict in found] == [i == 2 for i in range(6)]
    assert "raised SystemExit" in caplog.text


def test_nobody_goes_on_in_the_background_of_an_interrupted_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def grade(row: Any, text: str) -> bool:
        asked.append(text)
        time.sleep(0.05)
        return True

    def interrupted(self: Any, timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unisd.rollout.verdicts._Worker.join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Judge(grade, workers=1).verdicts(ROWS, [f"answer {i}" for i in range(6)])
    time.sleep(0.3)
    assert len(asked) <= 2
