"""A trainer that measures: `evaluate` on held-out rows, and a log line that holds the step's
metrics.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from unisd.data.prompts import PromptBuilder
from unisd.data.rows import Row, holds_columns, prepare_rows
from unisd.errors import UserError
from unisd.evaluation.held_out import held_out
from unisd.rollout.engine import Completion, Engine, Sampling
from unisd.training.fault_tolerant_trainer import FaultTolerantTrainer
from unisd.training.preflight import reach_hub


def evaluation_rows(dataset: Any) -> list[Row] | dict[str, list[Row]]:
    """Rows to evaluate on, or such by name."""
    if isinstance(dataset, Mapping) and not holds_columns(dataset):
        return {
            str(name): prepare_rows(rows, name=f"the evaluation data {name!r}")
            for name, rows in dataset.items()
        }
    return prepare_rows(dataset, name="the evaluation data")


class EvaluatingTrainer(FaultTolerantTrainer):
    """The base of :class:`unisd.UniSDTrainer`, which sets who answers, how, and who grades."""

    prompts: PromptBuilder
    engine: Engine
    sampling: Sampling
    grader: Callable[[Row, str], Any] | None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mechanisms' metrics (means over the steps since the last line) to the Trainer's
        own log line.
        """
        if "loss" in logs:
            logs |= self.metrics.take_means()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """`eval_loss` (nats per token of the reference, given the plain prompt) and, with a grader,
        greedy `eval_accuracy`.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise UserError("evaluate needs rows: give eval_dataset.")
        rows = evaluation_rows(dataset)
        if isinstance(rows, dict):
            parts = [
                self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in rows.items()
            ]
            return {key: value for part in parts for key, value in part.items()}
        start = time.perf_counter()
        measured = (self.model, self.processing_class, self.accelerator, self.engine)
        found = held_out(rows, *measured, self._answers, self.grader)
        self.engine.sleep()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.metrics.phases["eval"] += metrics[f"{metric_key_prefix}_runtime"]
        self.log(dict(metrics))
        if self.is_in_train and metric_key_prefix.startswith("eval") and self.is_world_process_zero():
            self.metrics.evaluated(self.state.global_step, metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Say what does it instead: there are no labels, and logits are never whole."""
        raise UserError("predict is not supported: evaluate(rows) measures, and `unisd chat` answers.")

    def init_hf_repo(self, token: str | None = None) -> None:
        """As in transformers; a hub that refuses is a `UserError`."""
        reach_hub(partial(super().init_hf_repo, token))

    def _answers(self, rows: Sequence[Row]) -> list[Completion]:
        """Greedy answers, for an evaluation."""
        limit = self.args.eval_max_new_tokens or self.args.max_completion_length
        prompts = [self.prompts.student(row) for row in rows]
        return self.engine.generate(prompts, None, replace(self.sampling, max_new_tokens=limit))
