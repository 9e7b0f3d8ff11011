"""Computes log-probabilities of given completions, and the perplexities that follow.

Perplexities are corpus-level: exp of minus the total log-probability over the total number of
tokens. Logits exist for a few tokens at a time only, whatever the vocabulary. The model is as
before afterwards.

Shapes: N rows, T tokens of a completion, H hidden size, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unisd.batching import forward_batches
from unisd.console import show_progress
from unisd.distributed.sharding import entry, in_step
from unisd.errors import UserError
from unisd.kernels.lora import inference
from unisd.models.tokens import check_embedded, embedded_tokens, eos_ids
from unisd.tasks.base import Row

Ids = Sequence[int]

CHUNK_ENTRIES = 1 << 24  # entries of one [C,V] tensor: 64 MiB in float32
TOKEN_BUDGET = 4096  # tokens of one forward pass without cache


def _ids(tokenizer: Any, prompt: Ids | str | list[dict[str, Any]]) -> list[int]:
    from unisd.data.prompts import encode_prompt

    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], dict)):
        return encode_prompt(tokenizer, prompt)  # type: ignore[arg-type]
    return list(prompt)  # type: ignore[arg-type]


# ---------------------------------------------------------------- likelihood


class _States:
    """Computes completion states of one model: hidden states and its head.

    For an unknown head the logits themselves.
    """

    def __init__(self, model: Any) -> None:
        from unisd.backbone import Backbone

        self.model = entry(model)
        self.backbone: Backbone | None = None
        try:
            self.backbone = Backbone(model)
            if not self.backbone.is_checked:
                self.backbone.check(pad_id=0, packing="padded")
        except UserError:  # not trainable here, but it can be evaluated
            self.backbone = None

    def of(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[Tensor]:
        """`[T,H]` (or logits `[T,V]`) of each row, at the positions that predict its completion.

        The batch is right-padded.
        """
        from unisd.batching import collate

        device = self.model.device
        sequences = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
        if self.backbone is not None:
            states_BL = self.backbone.forward(self.model, collate(sequences, False, 0, device)).final
            assert states_BL is not None
        else:
            batch = collate(sequences, False, 0, device)
            states_BL = self.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits
        return [
            states_BL[row, len(p) - 1 : len(p) + len(c) - 1]
            for row, (p, c) in enumerate(zip(prompts, completions, strict=True))
        ]

    def logp(self, states_CH: Tensor) -> Tensor:
        """Log-probabilities [C,V], float32 (float64 stays)."""
        logits = states_CH if self.backbone is None else self.backbone.head().logits(states_CH)
        return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)

    @property
    def chunk(self) -> int:
        """Tokens whose logits may exist at once."""
        return max(1, CHUNK_ENTRIES // int(self.model.config.get_text_config().vocab_size))


def _check_pairs(prompts: Sequence[Ids], completions: Sequence[Ids]) -> None:
    if len(prompts) != len(completions):
        raise UserError(
            f"{len(prompts)} prompts and {len(completions)} completions: give one completion per prompt"
        )
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if completion and not prompt:
            raise UserError(
                f"row {i} has an empty prompt: the first token of its completion has no probability"
            )


def _batches(prompts: Sequence[Ids], completions: Sequence[Ids], budget: int) -> list[list[int]]:
    """Group rows that have a completion, longest first: at most `budget` tokens with padding."""
    rows = [i for i, completion in enumerate(completions) if completion]
    lengths = [len(prompts[i]) + len(completions[i]) for i in rows]
    return [[rows[i] for i in batch] for batch in forward_batches(lengths, budget, packed=False)]


def sequence_logprobs(
    model: Any,
    prompt_ids: Sequence[Ids],
    completion_ids: Sequence[Ids],
    *,
    token_budget: int = TOKEN_BUDGET,
    on_rows: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Total log-probability of each completion given its prompt, and its number of tokens.

    float64 [N], in nats, and int64 [N].

    Memory: hidden states of `token_budget` tokens and `CHUNK_ENTRIES` logits. `on_rows(n)` is told
    of every `n` rows that were read.
    """
    _check_pairs(prompt_ids, completion_ids)
    check_embedded(embedded_tokens(model), [*prompt_ids, *completion_ids])
    logp_N = torch.zeros(len(prompt_ids), dtype=torch.float64)
    count_N = torch.tensor([len(c) for c in completion_ids], dtype=torch.int64)
    with inference(model), in_step(model):
        states = _States(model)
        for rows in _batches(prompt_ids, completion_ids, token_budget):
            hidden = states.of([prompt_ids[i] for i in rows], [completion_ids[i] for i in rows])
            for i, hidden_TH in zip(rows, hidden, strict=True):
                target_T = torch.tensor(completion_ids[i], device=hidden_TH.device)
                for first in range(0, len(target_T), states.chunk):
                    part = slice(first, first + states.chunk)
                    picked = states.logp(hidden_TH[part]).gather(-1, target_T[part, None])
                    logp_N[i] += picked.double().sum().cpu()
            if on_rows is not None:
                on_rows(len(rows))
    return logp_N, count_N


def corpus_ppl(logp_N: Tensor, count_N: Tensor) -> float:
    """exp(-total log-probability / total tokens); NaN without tokens."""
    tokens = int(count_N.sum())
    return math.exp(min(-float(logp_N.sum()) / tokens, 700.0)) if tokens else math.nan


def reference_nll(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, prompt_ids: Sequence[Ids] | None = None
) -> tuple[float, int]:
    """Total negative log-probability and tokens of the rows' references, given the prompts.

    In nats, with their end token.

    The reference is `completion`, else `privileged_context`; rows with neither are left out.
    """
    from unisd.data.prompts import encode_completion

    prompts, completions, ends = [], [], eos_ids(model, tokenizer)
    for i, row in enumerate(rows):
        reference = row.get("completion") or row.get("privileged_context")
        if reference:
            prompts.append(_ids(tokenizer, row["prompt"]) if prompt_ids is None else prompt_ids[i])
            completions.append(encode_completion(tokenizer, str(reference), ends, row["prompt"]))
    with show_progress("reading references", len(prompts)) as advance:
        logp_N, count_N = sequence_logprobs(model, prompts, completions, on_rows=advance)
    return -float(logp_N.sum()), int(count_N.sum())


def gold_ppl(model: Any, tokenizer: Any, rows: Sequence[Row]) -> float | None:
    """Corpus perplexity of the references given the plain prompts.

    None where no row has a reference.
    """
    nll, tokens = reference_nll(model, tokenizer, rows)
    return math.exp(min(nll / tokens, 700.0)) if tokens else None
