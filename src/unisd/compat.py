"""What has another name in another version of transformers.

From 5.24 on the argument `past_key_values` of models is `cache`, and the training arguments
`gradient_checkpointing*` are `activation_checkpointing*`: the old ones are not read any more once
the arguments are built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

CACHE = ("cache", "past_key_values")
NEW_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """The name by which a model's `forward` takes a cache of keys and values, if it does."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE if name in parameters), None)


def fill_new_names(args: Any) -> None:
    """Give training arguments that are being built their value by the name that is read.

    Nothing is deprecated then, so nothing is warned of. A value that the new name has comes first.
    """
    for old, new in NEW_NAMES.items():
        if getattr(args, new, False) is None:
            setattr(args, new, getattr(args, old))


def set_argument(args: Any, name: str, value: Any) -> None:
    """Change a training argument that is built, by every name that it has."""
    setattr(args, name, value)
    if hasattr(args, NEW_NAMES.get(name, "")):
        setattr(args, NEW_NAMES[name], value)
