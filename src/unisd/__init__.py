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
__all__ = [
    "Benchmark",
    "Completion",
    "Engine",
    "Grade",
    "Interruption",
    "Sampling",
    "StepScores",
    "TargetInputs",
    "Task",
    "TermInputs",
    "UniSDConfig",
    "UniSDTrainer",
    "UserError",
    "Verdict",
    "__version__",
    "compare",
    "generate",
    "get_task",
    "load_model_and_tokenizer",
    "load_rows",
    "prepare",
    "register_target",
    "register_term",
    "register_weight",
]

if TYPE_CHECKING:
    from unisd.config import UniSDConfig
    from unisd.data.rows import load_rows
    from unisd.errors import UserError
    from unisd.evaluation.generate import generate
    from unisd.methods.registry import register_term, register_weight
    from unisd.methods.scores import StepScores, TargetInputs, TermInputs
    from unisd.methods.targets import register_target
    from unisd.models.load import load_model_and_tokenizer
    from unisd.rollout.engine import Completion, Engine, Sampling
    from unisd.run.python import compare, prepare
    from unisd.tasks import get_task
    from unisd.tasks.base import Grade, Task, Verdict
    from unisd.tasks.benchmark import Benchmark
    from unisd.trainer import UniSDTrainer
    from unisd.training.guards import Interruption


def __getattr__(name: str) -> Any:
    """Import on first use: `import unisd` itself must not pay for torch and transformers."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'unisd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
