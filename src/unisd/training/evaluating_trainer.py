"""A trainer that measures: `evaluate` on held-out rows, and a log line that holds the step's
metrics.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from unisd.config import UniSDConfig
from unisd.console import in_notebook, make_console
from unisd.data.prompts import PromptBuilder
from unisd.data.rows import Row, holds_columns, prepare_rows
from unisd.data.thoughts import completion_text
from unisd.errors import UserError
from unisd.evaluation.generate import Prompt, check_sampling, encode_prompts, within_context
from unisd.evaluation.held_out import Predictions, held_out
from unisd.monitoring.progress import ProgressDisplay
from unisd.rollout.engine import Completion, Engine, Sampling
from unisd.rollout.sources import check_written
from unisd.training.fault_tolerant_trainer import FaultTolerantTrainer
from unisd.training.preflight import check_evaluated, reach_hub


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

    def __init__(self, args: UniSDConfig, **kwargs: Any) -> None:
        super().__init__(args=args, **kwargs)
        shown = any(isinstance(one, ProgressDisplay) for one in self.callback_handler.callbacks)
        if in_notebook() and not args.disable_tqdm and not shown:
            self.remove_callback(DEFAULT_PROGRESS_CALLBACK)  # several frames a second
            self.add_callback(ProgressDisplay(make_console()))

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
        # In a training they are the trainer's own, which were looked at when it was built.
        if eval_dataset is not None and not self.is_in_train:
            check_evaluated(self, rows, "the evaluation data")
        metrics = self._held_out(rows, metric_key_prefix).metrics
        self.log(dict(metrics))
        if self.is_in_train and metric_key_prefix.startswith("eval") and self.is_world_process_zero():
            self.metrics.evaluated(self.state.global_step, metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> Predictions:
        """Greedy answers to rows, as `unisd eval` has them: texts in place of logits.

        Grades and `test_accuracy` with the trainer's grader, `test_loss` where rows have
        references. All ranks must call.

        Raises:
            UserError: bad rows, or a prompt that leaves no room for an answer.
        """
        rows = prepare_rows(test_dataset, name="the test data", needs_reference=False)
        check_evaluated(self, rows, "the test data")
        found = self._held_out(rows, metric_key_prefix, asked=True)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, found.metrics)
        return found

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int | None = None, temperature: float = 0.0
    ) -> list[str]:
        """Answers of the model as it is to prompts (texts or chat messages), in their order.

        All ranks must call.

        Args:
            max_new_tokens: most tokens of an answer; None: as `evaluate` has it.
            temperature: 0: greedy; else samples, which the config's `seed` repeats.

        Raises:
            UserError: a single prompt, a bad one, or one that leaves no room for an answer.
        """
        limit = self.args.eval_max_new_tokens or self.args.max_completion_length
        limit = limit if max_new_tokens is None else max_new_tokens
        check_sampling(limit, temperature)
        ids = encode_prompts(self.model, self.processing_class, prompts)
        limit = within_context(self.model, ids, limit)
        keys = [(self.args.seed, 0, i, 0) for i in range(len(ids))] if temperature > 0 else None
        self.engine.sync()
        written = self.engine.generate(ids, keys, Sampling(limit, temperature or 1.0))
        self.engine.sleep()
        check_written(written, len(ids), limit)
        return [completion_text(self.processing_class, one.ids) for one in written]

    def _held_out(self, rows: Sequence[Row], prefix: str, asked: bool = False) -> Predictions:
        """Measure rows by the model's own answers; metrics begin with `prefix`."""
        start = time.perf_counter()
        measured = (self.model, self.processing_class, self.accelerator, self.engine)
        found = held_out(rows, *measured, self._answers, self.grader, asked)
        self.engine.sleep()
        seconds = time.perf_counter() - start
        self.metrics.phases["eval"] += seconds
        metrics = {f"{prefix}_{name}": value for name, value in found.metrics.items()}
        return found._replace(metrics={**metrics, f"{prefix}_runtime": seconds})

    def init_hf_repo(self, token: str | None = None) -> None:
        """As in transformers; a hub that refuses is a `UserError`."""
        reach_hub(partial(super().init_hf_repo, token))

    def _answers(self, rows: Sequence[Row]) -> list[Completion]:
        """Greedy answers, for an evaluation."""
        limit = self.args.eval_max_new_tokens or self.args.max_completion_length
        prompts = [self.prompts.student(row) for row in rows]
        written = self.engine.generate(prompts, None, replace(self.sampling, max_new_tokens=limit))
        check_written(written, len(prompts), limit)
        return written
