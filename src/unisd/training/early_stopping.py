"""Stops a training whose evaluations do not get better any more, also across resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback

from unisd.training.checkpoints import STATE


class EarlyStopping(EarlyStoppingCallback):  # type: ignore[misc]
    """transformers' callback with `early_stopping_patience` of the config.

    A resumed run goes on counting where it was; `stopped` is the step that it stopped at.
    """

    stopped: int | None = None
    _began = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over what a checkpoint has counted, for as long as the measure is the same."""
        name = type(self).__name__
        goes_on = state.global_step > 0 and state.best_metric is not None
        self.early_stopping_patience = args.early_stopping_patience
        self.early_stopping_patience_counter = _counted(state.stateful_callbacks) if goes_on else 0
        state.stateful_callbacks[name] = self.state()  # a checkpoint without one has no place for it
        self._began = state.global_step
        self.stopped = state.global_step if self._is_over else None

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        if state.global_step == self._began:  # eval_on_start: nothing was trained since the last one
            return
        name = args.metric_for_best_model
        if f"eval_{name.removeprefix('eval_')}" not in metrics:  # of another part of the rows
            return
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if self._is_over:
            self.stopped = state.global_step

    @property
    def _is_over(self) -> bool:
        return bool(self.early_stopping_patience_counter >= self.early_stopping_patience)


def _counted(states: Any) -> int:
    """The evaluations without a better value, in the callbacks' states of a checkpoint."""
    saved = states.get(EarlyStopping.__name__) or {}
    return int(saved.get("attributes", {}).get("early_stopping_patience_counter", 0))


def is_over(checkpoint: str | Path, patience: int | None) -> bool:
    """Whether a run with this checkpoint has stopped early, so that it takes no further step."""
    if patience is None:
        return False
    state = json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))
    return _counted(state.get("stateful_callbacks") or {}) >= patience
