"""Runs that a study's method must beat.

Controls are cells beside the design: they take part in no effect of a factor. Those of a teacher
are the method with another context; those without one are recipes of their own, on the study's
data, steps and batches. Fine-tuning gets three rates, since the method's was chosen too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from unisd import recipes
from unisd.errors import UserError
from unisd.options.method_table import MethodOptions

Options = dict[str, Any]

CONTEXTS: dict[str, Options] = {
    "reference-free": {"teacher_context": "plain"},
    "wrong-reference": {"teacher_context": "wrong", "contrastive_weight": 0.0},
    "other-solution": {"teacher_context": "other"},
}
"""The method with another context."""
RECIPES = ("sft", "rejection-sft")
"""Without a teacher."""
NAMES = (*CONTEXTS, *RECIPES)
RATES = {"sft": (1 / 3, 1.0, 3.0), "rejection-sft": (1.0,)}
"""Of the learning rate that the recipe has."""
OF_THE_METHOD = {field.name for field in fields(MethodOptions)} | {
    *("recipe", "learning_rate", "completion_source", "on_policy_share", "num_generations", "rollout_keep"),
    *("agreement_contexts", "negatives", "num_iterations"),
}
"""Options of `base` that a recipe without a teacher does not take over."""
PREFIX = "control "


def read(given: Any, where: str) -> dict[str, Options]:
    """The controls that a study asks for, by name, with options of their own.

    Raises:
        UserError: none of that name.
    """
    if given is None or given is False:
        return {}
    asked = dict.fromkeys(NAMES) if given is True else given
    if isinstance(asked, list):
        asked = dict.fromkeys(asked)
    if unknown := [name for name in asked if name not in NAMES]:
        raise UserError(f"{where}: unknown control {unknown[0]!r}: there are {', '.join(NAMES)}.")
    if wrong := [name for name, options in asked.items() if not isinstance(options, dict | None)]:
        raise UserError(f"{where}: control {wrong[0]} must be a mapping of options.")
    return {name: dict(options or {}) for name, options in asked.items()}


def expanded(controls: Mapping[str, Options], shared: Options, method: Options) -> list[tuple[str, Options]]:
    """The cells of controls on one task, by name, each with the options of its runs.

    Args:
        controls: as `read` gives them.
        shared: options of all runs of the study on that task.
        method: those of the method's own cell.
    """
    found: list[tuple[str, Options]] = []
    shared = {key: value for key, value in shared.items() if key not in OF_THE_METHOD}
    for name, own in controls.items():
        if name in CONTEXTS:
            found.append((PREFIX + name, {**method, **CONTEXTS[name], **own}))
            continue
        for label, rate in _rates(name, own, shared):
            options = {**shared, "recipe": name, **own, "learning_rate": rate}
            found.append((PREFIX + name + label, options))
    return found


def _rates(name: str, own: Options, shared: Options) -> list[tuple[str, Any]]:
    """Labels and learning rates of a control without a teacher."""
    given = own.get("learning_rate")
    if given is not None:
        listed = given if isinstance(given, list) else [given]
        return [(f" {rate:g}" if len(listed) > 1 else "", rate) for rate in listed]
    recipe = recipes.load(name)
    pocket = shared.get("model_name_or_path", "pocket") == "pocket"
    usual = (recipe.options | (recipe.pocket if pocket else {}))["learning_rate"]
    scales = RATES[name]
    return [
        (f" {usual * scale:.2g}" if len(scales) > 1 else "", float(f"{usual * scale:.3g}"))
        for scale in scales
    ]
