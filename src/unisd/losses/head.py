"""How hidden states become logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unisd.kernels.cpu_linear import linear
from unisd.methods.divergence import LOWEST_LOGIT, at_least_float32, log_probs

SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Names of the factor that logits are multiplied with."""


def softcap_and_scale(config: Any) -> tuple[float | None, float]:
    """What a model does to its logits, by the names that configurations have for it."""
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    divides = not config.model_type.startswith("hyperclovax")  # Granite's name for a factor
    if scaling := getattr(config, "logits_scaling", None):
        return softcap, 1.0 / float(scaling) if divides else float(scaling)
    # of Cohere, Falcon-H1 and Muse Glimmer
    factors = (getattr(config, name, None) for name in SCALES)
    return softcap, next((float(factor) for factor in factors if factor), 1.0)


@dataclass(frozen=True, eq=False)
class Head:
    """How hidden states become logits: `softcap(scale * (hidden @ weight.T + bias))`."""

    weight: Tensor  # [V,H]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0  # Cohere: logit_scale; Granite: 1 / logits_scaling
    softcap: float | None = None  # Gemma-2: cap * tanh(x / cap)
    # several tokens that end an answer: one outcome, which stands in the column of the first
    ends: tuple[int, ...] = ()

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [N,V] in float32 (float64 stays); the product runs in the weight's dtype, or in
        autocast's.
        """
        return self.shape_logits(self.project(hidden_NH))

    def project(self, hidden_NH: Tensor) -> Tensor:
        """The linear part [N,V] in float32 or more, before scale and softcap."""
        return at_least_float32(self.matmul(hidden_NH))

    def matmul(self, hidden_NH: Tensor) -> Tensor:
        """The same in the weight's precision."""
        return linear(hidden_NH.to(self.weight.dtype), self.weight, self.finite_bias)

    @property
    def finite_bias(self) -> Tensor | None:
        """The bias [V] in the weight's precision, -inf raised to a number (0 * -inf is NaN)."""
        if self.bias is None:
            return None
        lowest = max(LOWEST_LOGIT, torch.finfo(self.weight.dtype).min)
        return self.bias.to(self.weight.dtype).clamp(min=lowest)

    def shape_logits(self, logits_NV: Tensor) -> Tensor:
        """Scale and softcap of the projected hidden states."""
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV

    # ---------------------------------------------------------- of what the logits are the logits

    def log_probs(self, hidden_NH: Tensor, temperature: float) -> Tensor:
        """log softmax(logits / temperature) [N,V], all ends as one outcome."""
        return self.with_one_end(log_probs(self.logits(hidden_NH), temperature))

    def outcomes(self, tokens_N: Tensor) -> Tensor:
        """The column that holds each token's probability: for an end, the first one's."""
        for end in self.ends[1:]:
            tokens_N = tokens_N.masked_fill(tokens_N == end, self.ends[0])
        return tokens_N

    def with_one_end(self, logp_NV: Tensor) -> Tensor:
        """A copy of log-probabilities in which the first end has those of all, the others none."""
        if not self.ends:
            return logp_NV
        ends = torch.tensor(self.ends, device=logp_NV.device)
        together_NE = torch.full_like(logp_NV[:, : len(ends)], LOWEST_LOGIT)
        together_NE[:, 0] = logp_NV[:, ends].logsumexp(-1)
        return logp_NV.index_copy(-1, ends, together_NE)

    def join_ends(self, x_NV: Tensor, factor: float = 1.0) -> Tensor | None:
        """The same in place, of anything whose softmax is taken after `factor`.

        Returns each end's share [N,E] of all; None where nothing was joined.
        """
        if not self.ends:
            return None
        each_NE = at_least_float32(torch.stack([x_NV[:, end] for end in self.ends], -1)) * factor
        all_N1 = each_NE.logsumexp(-1, keepdim=True)
        x_NV[:, self.ends[0]] = all_N1[:, 0] / factor
        for end in self.ends[1:]:
            x_NV[:, end] = max(LOWEST_LOGIT, torch.finfo(x_NV.dtype).min)
        return (each_NE - all_N1).exp()

    def part_ends(self, grad_NV: Tensor, share_NE: Tensor | None) -> None:
        """The gradient of what `join_ends` was given, in the place of that of what it left."""
        if share_NE is not None:
            of_all_N = grad_NV[:, self.ends[0]].clone()
            for end, share_N in zip(self.ends, share_NE.unbind(-1), strict=True):
                grad_NV[:, end] = of_all_N * share_N
