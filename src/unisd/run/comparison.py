"""Compares the logits of two models on a few short prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROUNDING = 1e-3
"""Two ways to compute the same logits in float32 differ by less than this share of the largest."""
PROMPTS = (
    "What is 17 + 25? Answer with the number alone.",
    "Name three animals that live in the sea, and say in one sentence what each of them eats.",
)
TOKENS = 32  # of a prompt at most


@dataclass(frozen=True)
class Difference:
    """Of the logits of two models."""

    largest: float
    among: float  # the largest logit
    same_choice: float  # share of the positions where the likeliest token is the same
    positions: int

    @classmethod
    def of(cls, one_NV: Tensor, other_NV: Tensor) -> Difference:
        same = one_NV.argmax(-1) == other_NV.argmax(-1)
        return cls(
            float((one_NV - other_NV).abs().max()),
            float(other_NV.abs().max()),
            float(same.float().mean()),
            len(same),
        )

    @property
    def is_rounding(self) -> bool:
        return self.largest <= ROUNDING * self.among  # false where anything is nan

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.largest:.2g} (the largest is {self.among:.3g}), and the"
            f" most likely token is the same at {self.same_choice:.1%} of {self.positions} positions"
        )


@torch.no_grad()
def logits_of(model: Any, prompts: list[list[int]]) -> Tensor:
    """Those `[N,V]` of all prompts' positions."""
    rows = [model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].float() for prompt in prompts]
    return torch.cat(rows)


def prompts_for(model: Any, tokenizer: Any, trained: Any = None) -> list[list[int]]:
    """Two texts, two rows of any tokens, and one of those whose embeddings alone were trained."""
    reserved = {*tokenizer.all_special_ids}
    reserved |= {
        value
        for key, value in model.config.to_dict().items()
        if key.endswith("_token_id") and type(value) is int
    }
    usable = sorted({*range(min(len(tokenizer), model.get_input_embeddings().weight.shape[0]))} - reserved)
    drawn = torch.randint(len(usable), (2, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = [
        token
        for part in (trained.values() if isinstance(trained, dict) else [trained or []])
        for token in part
    ]
    rows = [tokenizer(text)["input_ids"] for text in PROMPTS]
    rows += [[usable[number] for number in row] for row in drawn]
    return [row[:TOKENS] for row in (*rows, tokens) if row]
