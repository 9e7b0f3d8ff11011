"""The grader `math`: what it says without its library, and that it neither hangs nor raises."""

import importlib.util
import sys
import textwrap
import threading

import pytest

from unisd.errors import UserError
from unisd.tasks.graders import GRADERS
from unisd.tasks.graders.maths import Math


def test_without_the_library_it_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r'the grader math needs the package math-verify: pip install "unisd\[math\]"'
    ):
        GRADERS["math"]("\\boxed{2}", "2")


@pytest.fixture
def grader(tmp_path, monkeypatch):
    """The grader with a stand-in for its library, which compares texts and sleeps when told to."""
    (tmp_path / "math_verify.py").write_text(
        textwrap.dedent(
            """
            import os, time

            def parse(text, parsing_timeout):
                if "sleep" in text:
                    time.sleep(60)
                if "die" in text:
                    os._exit(3)
                if "raise" in text:
                    raise ArithmeticError("no")
                return [text.strip("$")] if any(map(str.isdigit, text)) else []

            def verify(gold, answer, timeout_seconds):
                return bool(answer) and gold[0] == answer[-1]
            """
        )
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "math_verify", raising=False)
    monkeypatch.setattr("unisd.tasks.graders.maths.SECONDS", 2)
    made = Math()
    yield made
    made.close()


@pytest.mark.long
def test_it_grades_in_any_thread_and_survives_what_takes_too_long(grader):
    found = []
    thread = threading.Thread(target=lambda: found.append(grader("2", "2")))
    thread.start()
    thread.join()
    assert found[0].correct and found[0].how == "expression"
    assert not grader("3", "2").correct and grader("4", ["3", "4"]).correct
    assert grader("no answer", "2").outcome == "unanswered"
    assert grader("<think>2", "2").outcome == "unanswered"
    assert grader("raise 1", "2").reason == "cannot be compared (ArithmeticError)"
    assert grader("sleep 1", "2").reason == "cannot be compared (it takes too long)"
    assert grader("die 1", "2").reason == "cannot be compared (it takes too long)"
    assert grader("2", "2").correct
    with pytest.raises(UserError, match="gold 'x' is not a mathematical expression: give a number or LaTeX"):
        grader("2", "x")
