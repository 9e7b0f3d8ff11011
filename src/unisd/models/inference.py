"""A model or an adapter by its folder, ready to answer."""

from __future__ import annotations

from typing import Any


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
