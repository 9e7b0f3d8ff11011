"""Progress of the training with live metrics."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback

from unisd.console import LINE_S, NotebookDisplay, aligned, in_notebook, live_console, make_progress

PLAIN_LINES = 20
"""Least progress lines of a run whose output is not a terminal."""


def metrics_text(logs: dict[str, float], steps_per_second: float) -> str:
    parts = [f"loss {logs['loss']:.4f}"] if "loss" in logs else []
    if "teacher/divergence" in logs:
        parts.append(f"divergence {logs['teacher/divergence']:.4f}")
    if "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.1e}")
    return "  ".join([*parts, f"{steps_per_second:.2f} steps/s"])


def _evaluation_text(metrics: dict[str, float]) -> str:
    """The values of an evaluation, accuracies in percent, and the seconds that it took."""
    parts = []
    for key, value in metrics.items():
        name = key.removeprefix("eval_")
        if name.endswith("accuracy"):
            parts.append(f"{name} {100 * value:.1f} %")
        elif name.endswith("runtime"):
            parts.append(f"{value:.0f} s")
        elif name != "epoch":
            parts.append(f"{name} {value:.4f}")
    return "  ".join(parts)


class ProgressDisplay(TrainerCallback):  # type: ignore[misc]
    """Progress of the training with its latest metrics: a bar on a terminal; in a notebook a line,
    and in its place at the end a table; else plain lines, 20 of them or one every `LINE_S`.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.notebook = in_notebook()
        self.lines: list[list[str]] = []
        self.progress: Progress | None = None
        self.bar: Any = None
        self.logs: dict[str, float] = {}
        self.started, self.told, self.first = 0.0, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first = time.perf_counter(), state.global_step
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        moving = live_console() if live_console().is_terminal else self.console
        self.progress = make_progress(moving, metrics=True)
        self.bar = self.progress.add_task(
            "training", total=state.max_steps, completed=state.global_step, metrics=""
        )
        self.progress.start()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            self.logs = dict(logs)
            self._show(state)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        if metrics and state.is_world_process_zero:
            text = f"evaluation at step {state.global_step}/{state.max_steps}  {_evaluation_text(metrics)}"
            if self.progress is not None:
                self.progress.console.print(text, markup=False, highlight=False)
            elif self.notebook:
                self._add(state, f"evaluation  {_evaluation_text(metrics)}")
            else:
                print(text, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress.update(self.bar, completed=state.global_step)

    def _show(self, state: Any) -> None:
        done, seconds = state.global_step - self.first, time.perf_counter() - self.started
        text = metrics_text(self.logs, done / seconds if seconds else 0.0)
        if self.progress is not None:
            self.progress.update(self.bar, completed=state.global_step, metrics=text)
        elif state.is_world_process_zero and not self.console.is_terminal:
            left = (state.max_steps - state.global_step) * seconds / max(done, 1)
            told = f"step {state.global_step}/{state.max_steps}  {text}  {left:.0f} s left"
            if self.notebook:
                NotebookDisplay.show(told)
            stride = max(1, -(-state.max_steps // PLAIN_LINES))
            if (
                state.global_step == 1
                or state.global_step % stride == 0
                or state.global_step == state.max_steps
                or seconds - self.told >= LINE_S
            ):
                self.told = seconds
                if self.notebook:
                    self._add(state, text)
                else:
                    print(told, flush=True)

    def _add(self, state: Any, text: str) -> None:
        """Keep a line for the table at the end."""
        self.lines.append([str(state.global_step), text])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        if self.lines:
            NotebookDisplay.show("\n".join(aligned(("step", "training"), self.lines)), stays=True)
            self.lines = []

    def close(self) -> None:
        """Also after an interruption: a live bar must give the terminal back."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
