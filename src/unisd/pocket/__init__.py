"""The pocket world: four small procedural skills, and a causal LM that lives in them.

It has about one million parameters.

`BASE_DIR` is a transformers model directory (weights, tokenizer with chat template, model card).
"""

from __future__ import annotations

from pathlib import Path

BASE_DIR = Path(__file__).parent / "base"

__all__ = ["BASE_DIR"]
