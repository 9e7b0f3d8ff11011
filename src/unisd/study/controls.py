"""Runs that a study's method must beat.

Controls are cells beside the design: they take part in no effect of a factor. Those of a teacher
are the method with another context; those without one are recipes of their own, on the study's
data, steps and answers a step. Fine-tuning gets three rates, since the method's was chosen too.
`sft-graft` is no run: those of fine-tuning also measure parts of their change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from unisd import recipes
from unisd.errors import UserError
from unisd.models.adapters import is_adapter
from unisd.options.method_table import MethodOptions

Options = dict[str, Any]

CONTEXTS: dict[str, Options] = {
    "reference-free": {"teacher_context": "plain"},
    "wrong-reference": {"teacher_context": "wrong", "contrastive_weight": 0.0},
    "other-solution": {"teacher_context": "other", "agreement_contexts": "random"},
}
"""The method with another context."""
FINE_TUNED, GRAFTED = "sft", "sft-graft"
RECIPES = (FINE_TUNED, "rejection-sft")
"""Without a teacher."""
NAMES = (*CONTEXTS, FINE_TUNED, GRAFTED, "rejection-sft")
SCALES, PARTS = "graft_scales", [0.25, 0.5, 0.75]
RATES = {"sft": (1 / 3, 1.0, 3.0), "rejection-sft": (1.0,)}
"""Of the learning rate that the recipe has."""
OF_THE_METHOD = {field.name for field in fields(MethodOptions)} | {
    *("recipe", "learning_rate", "completion_source", "on_policy_share", "num_generations", "rollout_keep"),
    *("agreement_contexts", "negatives", "num_iterations"),
}
"""Options of `base` that a recipe without a teacher does not take over."""
PREFIX = "control "


def read(given: Any, where: str, base: Options) -> dict[str, Options]:
    """The controls that a study asks for, by name, with options of their own.

    All of them, where one process trains a model that is no adapter; else all but `sft-graft`.

    Raises:
        UserError: none of that name.
    """
    if given is None or given is False:
        return {}
    alone = base.get("accelerate_config") is None and not is_adapter(str(base.get("model_name_or_path", "")))
    asked = dict.fromkeys(name for name in NAMES if alone or name != GRAFTED) if given is True else given
    if isinstance(asked, list):
        asked = dict.fromkeys(asked)
    if unknown := [name for name in asked if name not in NAMES]:
        raise UserError(f"{where}: unknown control {unknown[0]!r}: there are {', '.join(NAMES)}.")
    if wrong := [name for name, options in asked.items() if not isinstance(options, dict | None)]:
        raise UserError(f"{where}: control {wrong[0]} must be a mapping of options.")
    found = {name: dict(options or {}) for name, options in asked.items()}
    if further := found.get(GRAFTED, {}).keys() - {SCALES}:
        raise UserError(
            f"{where}: control {GRAFTED} takes only {SCALES}, as its runs are those of {FINE_TUNED}: give"
            f" {min(further)} to that."
        )
    if GRAFTED in found:
        if not alone:
            raise UserError(
                f"{where}: control {GRAFTED} needs one process and a model that is not an adapter:"
                " leave it out."
            )
        found[GRAFTED] = {SCALES: _numbers(found[GRAFTED].get(SCALES), where)}
    return found


def _numbers(given: Any, where: str) -> list[float]:
    """The parts of the change, from what a file says."""
    try:
        return [float(one) for one in (given if isinstance(given, list) else [given] if given else PARTS)]
    except (TypeError, ValueError):
        raise UserError(f"{where}: {SCALES} of control {GRAFTED} must be numbers, not {given!r}.") from None


def expanded(controls: Mapping[str, Options], shared: Options, method: Options) -> list[tuple[str, Options]]:
    """The cells of controls on one task, by name, each with the options of its runs.

    Args:
        controls: as `read` gives them.
        shared: options of all runs of the study on that task.
        method: those of the method's own cell.
    """
    found: list[tuple[str, Options]] = []
    shared = {key: value for key, value in shared.items() if key not in OF_THE_METHOD}
    parts = controls.get(GRAFTED)
    if parts is not None:
        controls = {**controls, FINE_TUNED: controls.get(FINE_TUNED, {})}
    for name, own in controls.items():
        if name in CONTEXTS:
            found.append((PREFIX + name, {**method, **CONTEXTS[name], **own}))
        for label, rate in _rates(name, own, shared) if name in RECIPES else ():
            options = {**shared, "recipe": name}
            options |= _as_many_answers({**options, **own}, method) | own | {"learning_rate": rate}
            if name == FINE_TUNED and parts is not None:
                options[SCALES] = parts[SCALES]
            found.append((PREFIX + name + label, options))
    return found


def parts_of(name: str, options: Options) -> dict[float, str]:
    """The cells that the runs of a control bring beside their own: names by the part of the change.

    Args:
        name: of the control's own cell.
        options: of its runs.
    """
    if options.get("recipe") != FINE_TUNED or not name.startswith(PREFIX + FINE_TUNED):
        return {}
    rate = name.removeprefix(PREFIX + FINE_TUNED).strip()
    of = f" of {rate}" if rate else ""
    return {scale: f"{PREFIX}{GRAFTED} {scale:g}{of}" for scale in options.get(SCALES) or ()}


def _as_many_answers(options: Options, method: Options) -> Options:
    """What a recipe must change to see as many answers a step as the method.

    Raises:
        UserError: the recipe draws several answers of a prompt, and the method's do not divide so.
    """
    answers = _setting(method, "per_device_train_batch_size") * _setting(method, "num_generations")
    of_one_prompt = _setting(options, "num_generations")
    generations = math.gcd(of_one_prompt, answers)
    if generations == 1 < of_one_prompt:
        raise UserError(
            f"control {options['recipe']} draws {of_one_prompt} answers per prompt, and the method has"
            f" {answers} in a micro-batch: give per_device_train_batch_size an even number, or leave it out."
        )
    wanted = {"num_generations": generations, "per_device_train_batch_size": answers // generations}
    wanted |= {name: _setting(method, name) for name in ("gradient_accumulation_steps",)}
    return {name: value for name, value in wanted.items() if _setting(options, name) != value}


def _setting(options: Options, name: str) -> int:
    """What a run's options and their recipe say; one where nobody does."""
    return int(options.get(name) or _of_the_recipe(options).get(name, 1))


def _of_the_recipe(options: Options) -> Options:
    recipe = recipes.load(options.get("recipe", recipes.DEFAULT))
    pocket = options.get("model_name_or_path", "pocket") == "pocket"
    return recipe.options | (recipe.pocket if pocket else {})


def _rates(name: str, own: Options, shared: Options) -> list[tuple[str, Any]]:
    """Labels and learning rates of a control without a teacher."""
    given = own.get("learning_rate")
    if given is not None:
        listed = given if isinstance(given, list) else [given]
        return [(f" {rate:g}" if len(listed) > 1 else "", rate) for rate in listed]
    usual = _of_the_recipe({**shared, "recipe": name})["learning_rate"]
    scales = RATES[name]
    return [
        (f" {usual * scale:.2g}" if len(scales) > 1 else "", float(f"{usual * scale:.3g}"))
        for scale in scales
    ]
