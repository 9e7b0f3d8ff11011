"""UniSD: adapt a causal language model to a task by self-distillation (arXiv 2605.06597).

    from unisd import UniSDConfig, UniSDTrainer

The names below are the whole public interface, with :mod:`unisd.testing` for tests of plug-ins;
`unisd.reference` says in one page what a step does. The command is `unisd train`; `unisd train
--help` explains every option.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Benchmark": "unisd.tasks.benchmark",
    "Completion": "unisd.rollout.engine",
    "Engine": "unisd.rollout.engine",
    "Grade": "unisd.tasks.base",
    "Interruption": "unisd.training.guards",
    "Sampling": "unisd.rollout.engine",
    "StepScores": "unisd.methods.scores",
    "TargetInputs": "unisd.methods.scores",
    "Task": "unisd.tasks.base",
    "TermInputs": "unisd.methods.scores",
    "UniSDConfig": "unisd.config",
    "UniSDTrainer": "unisd.trainer",
    "UserError": "unisd.errors",
    "Verdict": "unisd.tasks.base",
    "compare": "unisd.run.python",
    "generate": "unisd.evaluation.generate",
    "get_task": "unisd.tasks",
    "load_model_and_tokenizer": "unisd.models.load",
    "load_rows": "unisd.data.rows",
    "prepare": "unisd.run.python",
    "register_target": "unisd.methods.targets",
    "register_term": "unisd.methods.registry",
    "register_weight": "unisd.methods.registry",
}
__all__ = sorted([*_PUBLIC, "__version__"])

if TYPE_CHECKING:  # `X as X`: a type checker takes the name as one of this package
    from unisd.config import UniSDConfig as UniSDConfig
    from unisd.data.rows import load_rows as load_rows
    from unisd.errors import UserError as UserError
    from unisd.evaluation.generate import generate as generate
    from unisd.methods.registry import register_term as register_term
    from unisd.methods.registry import register_weight as register_weight
    from unisd.methods.scores import StepScores as StepScores
    from unisd.methods.scores import TargetInputs as TargetInputs
    from unisd.methods.scores import TermInputs as TermInputs
    from unisd.methods.targets import register_target as register_target
    from unisd.models.load import load_model_and_tokenizer as load_model_and_tokenizer
    from unisd.rollout.engine import Completion as Completion
    from unisd.rollout.engine import Engine as Engine
    from unisd.rollout.engine import Sampling as Sampling
    from unisd.run.python import compare as compare
    from unisd.run.python import prepare as prepare
    from unisd.tasks import get_task as get_task
    from unisd.tasks.base import Grade as Grade
    from unisd.tasks.base import Task as Task
    from unisd.tasks.base import Verdict as Verdict
    from unisd.tasks.benchmark import Benchmark as Benchmark
    from unisd.trainer import UniSDTrainer as UniSDTrainer
    from unisd.training.guards import Interruption as Interruption


def __getattr__(name: str) -> Any:
    """Import on first use: `import unisd` itself must not pay for torch and transformers."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'unisd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
