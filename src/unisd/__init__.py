"""UniSD: adapt a causal language model to a task by self-distillation (arXiv 2605.06597).

    from unisd import UniSDConfig, UniSDTrainer

The command is `unisd train`; `unisd train --help` explains every option.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "UniSDConfig": "unisd.config",
    "UniSDTrainer": "unisd.trainer",
    "UserError": "unisd.errors",
    "StepScores": "unisd.methods.scores",
    "register_weight": "unisd.methods.registry",
    "TargetInputs": "unisd.methods.scores",
    "register_target": "unisd.methods.targets",
}
__all__ = [
    "StepScores",
    "TargetInputs",
    "UniSDConfig",
    "UniSDTrainer",
    "UserError",
    "__version__",
    "register_target",
    "register_weight",
]

if TYPE_CHECKING:
    from unisd.config import UniSDConfig
    from unisd.errors import UserError
    from unisd.methods.registry import register_weight
    from unisd.methods.scores import StepScores, TargetInputs
    from unisd.methods.targets import register_target
    from unisd.trainer import UniSDTrainer


def __getattr__(name: str) -> Any:
    """Import on first use: `import unisd` itself must not pay for torch and transformers."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'unisd' has no attribute {name!r}")
