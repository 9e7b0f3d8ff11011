"""Tasks by name: `get_task("gsm8k")`.

Importing this package is light; a task's module is imported when it is asked for. A package outside
this one adds a task by the entry point group `unisd.tasks`:

    [project.entry-points."unisd.tasks"]
    mytask = "my_package.tasks:MyTask"
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import yaml

from unisd.errors import UserError
from unisd.tasks.base import Grade, Row, Task

__all__ = ["Grade", "Row", "Task", "get", "get_task", "names"]

ENTRY_POINT_GROUP = "unisd.tasks"

_BUILT_IN: dict[str, str] = {
    "pocket": "unisd.pocket.task:PocketTask",
    "new_facts": "unisd.tasks.new_facts:NewFactsTask",
    "general": "unisd.tasks.general:General",
    "gsm8k": "unisd.tasks.gsm8k:GSM8KTask",
    "scienceqa": "unisd.tasks.scienceqa:ScienceQATask",
    "cos_e": "unisd.tasks.cos_e:CosETask",
    "medmcqa": "unisd.tasks.medmcqa:MedMCQATask",
    "gpqa": "unisd.tasks.gpqa:GPQATask",
    "mbpp": "unisd.tasks.mbpp:MBPPTask",
    "humaneval": "unisd.tasks.humaneval:HumanEvalTask",
    "toolalpaca": "unisd.tasks.toolalpaca:ToolAlpacaTask",
    "jsonl": "unisd.tasks.jsonl:JsonlTask",
}


def _external() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def names() -> list[str]:
    """Names of all tasks, sorted: the built-in ones and those of installed packages."""
    return sorted({*_BUILT_IN, *_external()})


def check_name(name: str) -> None:
    """Raise `UserError` for a name that no task has, with the nearest known ones."""
    if name not in _BUILT_IN and name not in _external():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known tasks: {', '.join(names())}"
        raise UserError(f"unknown task {name!r}: {hint}")


def get_task(name: str, **options: Any) -> Task:
    """Build the task called `name` with its own `options`; a built-in one wins over an entry point.

    Raises `UserError` for an unknown name (with the nearest known ones) or options the task does
    not know.
    """
    check_name(name)
    factory: Any
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        factory = getattr(importlib.import_module(module), attribute)
    else:
        factory = _external()[name].load()
    return _build(name, factory, options)


get = get_task  # `tasks.get(...)` where the package itself is imported


def from_flags(
    name: str,
    data_files: Sequence[str] | None = None,
    task_options: Sequence[str] | None = None,
    grader: str | None = None,
    **others: Any,
) -> Task:
    """The task of a command line.

    `task_options` are `name=value` texts, values as in YAML; others that are None don't count.

    Raises `UserError` as `get_task`.
    """
    given = {key: value for key, value in others.items() if value is not None}
    for part in task_options or []:
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"--task_options {part!r} is not of the form name=value")
        try:
            given[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(
                f"--task_options {part!r}: {value!r} is not a YAML value; put text in quotes"
            ) from None
    if data_files:
        given["data_files"] = list(data_files)
    if grader is not None:
        given["grader"] = grader
    return get_task(name, **given)


def _build(name: str, factory: Any, options: dict[str, Any]) -> Task:
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        accepted = [p.name for p in inspect.signature(factory).parameters.values()]
        raise UserError(f"task {name}: {error}; its options are: {', '.join(accepted) or 'none'}") from None
    task = factory(**options)
    if not isinstance(task, Task):
        raise UserError(f"task {name}: {type(task).__name__} is not a unisd.tasks.Task; make it a subclass")
    return task
