"""What the evaluations during training decided: which model is kept, and when to stop."""

from __future__ import annotations

from typing import Any

from unisd.trainer import UniSDTrainer

Results = dict[str, Any]


def _metric(trainer: UniSDTrainer) -> str:
    return f"eval_{str(trainer.args.metric_for_best_model).removeprefix('eval_')}"


def chosen(trainer: UniSDTrainer, rows: int) -> Results | None:
    """Which model load_best_model_at_end has kept, and by what; its step is None if none was.

    Args:
        rows: how many were held out to choose on.
    """
    state = trainer.state
    if not trainer.args.load_best_model_at_end:
        return None
    found = state.best_model_checkpoint is not None
    return {
        "step": state.best_global_step if found else None,
        "metric": _metric(trainer),
        "value": state.best_metric if found else None,
        "rows": rows,
    }


def stopped(trainer: UniSDTrainer) -> Results | None:
    """At which step early_stopping_patience has ended the training; None if it has not."""
    if trainer.stopped_early is None:
        return None
    return {
        "by": "early_stopping_patience",
        "step": trainer.stopped_early,
        "of": trainer.state.max_steps,
        "metric": _metric(trainer),
        "best": trainer.state.best_metric,
        "evaluations": trainer.args.early_stopping_patience,
    }


def lines(results: Results) -> list[str]:
    """Say what was decided, one line each."""
    return [line for line in (_stopped_line(results), _chosen_line(results)) if line is not None]


def _stopped_line(results: Results) -> str | None:
    found = results["stopped"]
    if found is None:
        return None
    kept = (
        ""
        if results["chosen"]
        else "; the model is that of this step (load_best_model_at_end keeps the best)"
    )
    return (
        f"stopped at step {found['step']} of {found['of']}: {found['metric']} was no better than"
        f" {found['best']:.4g} in {found['evaluations']} evaluations in a row (early_stopping_patience){kept}"
    )


def _chosen_line(results: Results) -> str | None:
    found = results["chosen"]
    if found is None:
        return None
    if found["step"] is None:
        return "load_best_model_at_end: no evaluation took place, so the model is that of the last step"
    return (
        f"chosen: the model of step {found['step']} of {results['steps']}, by {found['metric']}"
        f" {found['value']:.4g} on {found['rows']} validation rows"
    )
