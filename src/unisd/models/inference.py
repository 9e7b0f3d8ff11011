"""A model or an adapter by its folder, ready to answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unisd.errors import UserError


def load_any(name: str, dtype: str = "auto", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A model (an adapter folder gets its base beneath it) ready for inference, and its
    tokenizer.
    """
    import torch

    from unisd.console import loading
    from unisd.models.load import load_model_and_tokenizer

    with loading(f"model {name}"):
        model, tokenizer, _ = load_model_and_tokenizer(name, dtype=dtype, trust_remote_code=trust_remote_code)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model.to(device or "cpu").eval(), tokenizer


def opened(model: Any, tokenizer: Any = None) -> tuple[Any, Any]:
    """A model by its name or folder, or one that is loaded, and its tokenizer.

    Raises:
        UserError: it cannot be opened, or a loaded one has no tokenizer beside it.
    """
    if isinstance(model, (str, Path)):
        loaded, own = load_any(str(model))
        return loaded, tokenizer or own
    if model is None or tokenizer is None:
        raise UserError("the model or its tokenizer is missing: give both, or the model's folder or hub id.")
    return model, tokenizer
