"""What the trackers of a run get at its end, by stand-ins of their documented interfaces."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from tests.helpers.report import judged, record
from unisd.cli.main import main
from unisd.files import read_lines
from unisd.report.run_page import read_json
from unisd.run.trackers import MAX_CELL, MAX_ROWS, Trackers, told

STATE = SimpleNamespace(is_world_process_zero=True)
CALLS: list[tuple[Any, ...]] = []


class Writer:
    """`SummaryWriter`."""

    def __init__(self, log_dir: str | None = None) -> None:
        CALLS.append(("open",))

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **_: CALLS.append((name, *args))


class Library:
    """The module `wandb` or `trackio`."""

    def __init__(self) -> None:
        self.run = SimpleNamespace(summary={})
        self.Table = lambda columns, data: {"columns": columns, "data": data}

    def __getattr__(self, name: str) -> Any:
        return lambda *args: CALLS.append((name, *args))


def made(kind: type, **values: Any) -> Any:
    callback = kind.__new__(kind)
    vars(callback).update(values)
    return callback


@pytest.fixture
def found(tmp_path: Path) -> Any:
    CALLS.clear()
    folder = judged(tmp_path / "run", [True, False] * 60)
    results, answers = (read_json(folder / name) for name in ("results.json", "answers.json"))
    answers["task"]["examples"][0]["after"]["text"] = "<b>|x\n" + "y" * 3000
    return told(results, answers, read_lines(folder / "samples.jsonl"), {"agreement": None, "seed": 1})


def test_each_tracker_gets_tables_before_it_is_closed(found: Any) -> None:
    library = Library()
    tensorboard = made(TensorBoardCallback, tb_writer=Writer())
    wandb = made(WandbCallback, _wandb=library, _log_model=SimpleNamespace(is_enabled=False))
    trackio = made(TrackioCallback, _trackio=Library(), _initialized=True, _space_id=None)
    with Trackers([object(), tensorboard, wandb, trackio]) as trackers:
        for callback in (tensorboard, wandb, trackio):
            callback.on_train_end(None, STATE, None)
        assert CALLS == [("open",)], "the end of the training closes nothing"
        trackers.tell(lambda: found)
    names = [name for name, *_ in CALLS]
    assert names == ["open", *["add_text"] * 3, "add_hparams", "log", "log", "close", "finish"]
    texts = {name: text for kind, name, text, *_ in (c for c in CALLS if c[0] == "add_text")}
    assert texts["unisd/results"].startswith("| measure | before | after | change |")
    assert "&lt;b&gt;\\|x<br>y" in texts["unisd/answers"] and "<b>" not in texts["unisd/answers"]
    (options, figures) = next(rest for name, *rest in CALLS if name == "add_hparams")
    assert options == {"agreement": "None", "seed": 1}
    assert figures["unisd/task_accuracy"] == 0.5 == library.run.summary["unisd/task_accuracy"]
    for logged in (call[1] for call in CALLS if call[0] == "log"):
        answers = logged["unisd/answers"]
        assert len(answers["data"]) <= MAX_ROWS and len(answers["data"][0]) == len(answers["columns"])
        assert len(answers["data"][0][6]) == MAX_CELL + 3
        assert logged["unisd/samples"]["data"] == [
            [1, "row-1", "a prompt", "a reference", "an answer" * 6, True]
        ]


def test_a_tracker_that_fails_costs_only_itself(found: Any, caplog: pytest.LogCaptureFixture) -> None:
    closed = made(TensorBoardCallback, tb_writer=None)
    broken = made(WandbCallback, _wandb=SimpleNamespace(run=1), _log_model=SimpleNamespace(is_enabled=False))
    fine = made(TrackioCallback, _trackio=Library(), _initialized=True, _space_id=None)
    with caplog.at_level(logging.WARNING):
        Trackers([closed, broken, fine]).tell(lambda: found)
    assert "WandbCallback did not take the results" in caplog.text and [name for name, *_ in CALLS] == ["log"]


class Stand(TensorBoardCallback):
    def __init__(self) -> None:
        self.tb_writer, self.logging_dir, self._SummaryWriter = None, None, Writer


@pytest.mark.long
def test_a_run_tells_its_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Stand)
    CALLS.clear()
    options = {
        "max_steps": 1,
        "max_eval_rows": 2,
        "retention_rows": 2,
        "recipe": "sdft",
        "max_completion_length": 8,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    folder = ["--output_dir", str(tmp_path / "run"), "--report_to", "tensorboard"]
    assert main(["train", *flags, *folder, "--per_device_train_batch_size", "2"]) == 0
    texts = {call[1] for call in CALLS if call[0] == "add_text"}
    assert {"unisd/results", "unisd/answers", "unisd/samples"} <= texts
    assert CALLS[-1] == ("close",) and record()["step"] == 1
