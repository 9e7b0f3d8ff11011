"""In a notebook progress is one line of the running cell, and the saved notebook holds its last
frame.
"""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import PrinterCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from unisd import console
from unisd import testing as tiny
from unisd.console import NotebookDisplay, make_console, show_progress
from unisd.monitoring.progress import PLAIN_LINES, ProgressDisplay


class ZMQInteractiveShell:
    """The kernel, by the name that it is known by."""

    execution_count = 1


class Notebook:
    """What IPython's display keeps: of each display the frames that were sent."""

    def __init__(self) -> None:
        self.kernel, self.now = ZMQInteractiveShell(), 0.0
        self.displays: list[list[str]] = []

    def display(self, frame: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw and display_id
        frames = [frame["text/plain"]]
        self.displays.append(frames)
        return SimpleNamespace(update=lambda frame, raw: frames.append(frame["text/plain"]))

    @property
    def stored(self) -> list[str]:
        """What a saved notebook holds."""
        return [frames[-1] for frames in self.displays]


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Notebook:
    found = Notebook()
    package, part = ModuleType("IPython"), ModuleType("IPython.display")
    package.get_ipython = lambda: found.kernel  # type: ignore[attr-defined]
    part.display = found.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", part)
    monkeypatch.setattr(builtins, "get_ipython", package.get_ipython, raising=False)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: found.now))
    for name, value in (("_cell", None), ("_handle", None), ("_shown", -1.0)):
        monkeypatch.setattr(NotebookDisplay, name, value)
    return found


def test_one_frame_a_second_in_one_display(notebook: Notebook, capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("answering", "grading"):
        with show_progress(what, 600) as advance:
            for _ in range(600):  # ten times a second, for a minute
                notebook.now += 0.1
                advance(1)
    assert notebook.stored == ["grading: 600 of 600"]
    assert 100 < len(notebook.displays[0]) <= 122  # a minute each, and silent at first
    notebook.kernel.execution_count = 2
    with show_progress("answering", 1, shown=True) as advance:
        advance(1)
    assert notebook.stored == ["grading: 600 of 600", "answering: 1 of 1"]
    with show_progress("unseen", 10) as advance:  # over before anybody waits for it
        advance(10)
    assert len(notebook.displays) == 2 and capsys.readouterr() == ("", "")


def test_training_ends_in_a_table_that_stays(notebook: Notebook, capsys: pytest.CaptureFixture[str]) -> None:
    shown = ProgressDisplay(make_console())
    state = SimpleNamespace(global_step=0, max_steps=200, is_world_process_zero=True)
    shown.on_train_begin(None, state, None)
    for step in range(1, 201):
        notebook.now += 0.1
        state.global_step = step
        shown.on_log(None, state, None, {"loss": 1 / step, "learning_rate": 1e-5})
        if step == 100:
            shown.on_evaluate(None, state, None, {"eval_loss": 0.5, "eval_accuracy": 0.25})
    assert len(notebook.displays) == 1 and len(notebook.displays[0]) <= 21
    assert notebook.stored[0].startswith("step ")
    shown.on_train_end(None, state, None)
    table = notebook.stored[0].splitlines()
    assert table[0].split() == ["step", "training"] and len(table) <= PLAIN_LINES + 3
    assert table[1].startswith("1 ") and table[-1].startswith("200   loss 0.0050")
    assert any("evaluation  loss 0.5000  accuracy 25.0 %" in line for line in table)
    with show_progress("answering", 1, shown=True) as advance:
        advance(1)
    assert notebook.stored == ["\n".join(table), "answering: 1 of 1"]
    assert capsys.readouterr() == ("", "")


def test_a_trainer_in_a_notebook_shows_this_alone(notebook: Notebook, tmp_path: Path) -> None:
    def shown(**options: Any) -> list[type]:
        found = tiny.trainer(tmp_path, **options).callback_handler.callbacks
        kinds = (ProgressDisplay, PrinterCallback, DEFAULT_PROGRESS_CALLBACK)
        return [type(one) for one in found if isinstance(one, kinds)]

    assert shown(disable_tqdm=False) == [ProgressDisplay]
    assert shown() == [PrinterCallback]  # as it was asked for


def test_a_command_that_a_notebook_starts_writes_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output is a terminal to it, of which the notebook stores whatever was written."""
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True, write=len, flush=int))
    assert make_console().is_terminal
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    assert not make_console().is_terminal
