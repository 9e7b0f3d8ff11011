"""What a model can do and what it has forgotten: greedy accuracy, fit to references, retention against a base model.

Perplexities are corpus-level: exp of minus the total log-probability over the total number of tokens. Logits exist for a
few tokens at a time only, whatever the vocabulary. Nothing here changes a model: training mode, generation config and
adapters are as before afterwards.

Shapes: T tokens of a completion, H hidden size, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unisd.adapters import inference
from unisd.console import show_progress
from unisd.decoding import decode
from unisd.errors import UserError
from unisd.grading import grade_many, wilson
from unisd.models import eos_ids
from unisd.sharding import entry, in_step
from unisd.tasks.base import Grade, Row

Interval = dict[str, float]
Ids = Sequence[int]

CHUNK_ENTRIES = 1 << 24  # entries of one [C,V] tensor: 64 MiB in float32
TOKEN_BUDGET = 4096  # tokens of one forward pass without cache


# ---------------------------------------------------------------- several processes


def _in_shares(work: Callable[[Sequence[Any]], list[Any]], items: Sequence[Any]) -> list[Any]:
    """`work(items)`, one result for each; processes that train as one do a share each, and all get all (all must call)."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1:
        return work(items)
    parts: list[list[Any]] = [[] for _ in range(ranks)]
    dist.all_gather_object(parts, work(items[dist.get_rank() :: ranks]))
    return [parts[i % ranks][i // ranks] for i in range(len(items))]


# ---------------------------------------------------------------- generation


def generate_greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Ids | str | list[dict[str, Any]]],
    max_new_tokens: int = 256,
    batch_size: int | None = None,
    progress: bool | None = None,
    description: str = "generating",
) -> list[list[int]]:
    """Greedy completions (token ids up to and with the first end token) of prompts, in their order.

    Args:
        prompts: token ids as they are; a string or chat messages are rendered by `prompts.encode_prompt`.
        batch_size: prompts at a time; None: 48 on a CPU, 256 on an accelerator.
        progress: a bar on stderr; None: only where stderr is a terminal, after a few seconds.
    """
    at_once = batch_size or (48 if model.device.type == "cpu" else 256)
    ends = eos_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)

    def write(mine: Sequence[Ids | str | list[dict[str, Any]]]) -> list[list[int]]:
        with show_progress(description, len(mine), progress) as advance:
            return decode(
                model, [_ids(tokenizer, p) for p in mine], max_new_tokens,
                eos_ids=ends, pad_id=pad, batch_size=at_once, on_rows=advance,
            )  # fmt: skip

    return _in_shares(write, prompts)


def _ids(tokenizer: Any, prompt: Ids | str | list[dict[str, Any]]) -> list[int]:
    from unisd.prompts import encode_prompt

    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], dict)):
        return encode_prompt(tokenizer, prompt)  # type: ignore[arg-type]
    return list(prompt)  # type: ignore[arg-type]


def accuracy(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    grade: Callable[[Row, str], Grade | bool],
    *,
    prompt_ids: Sequence[Ids] | None = None,
    max_new_tokens: int = 256,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Greedy accuracy on rows, overall and by the column `skill`.

    Args:
        grade: `(row, completion) -> Grade` (a task's `grade`) or a bool.
        prompt_ids: other prompts than the rows' own (a teacher's, for example).

    Returns:
        `overall` and each of `by_skill` as `wilson` gives them; `extraction_rate` (share of answers in which an answer was
        found; None where the grader does not say), `completions` (texts), `completion_ids`, `grades`, `mean_tokens`,
        `truncated` (rows cut by `max_new_tokens`), `tokens_per_s`.
    """
    prompts = [row["prompt"] for row in rows] if prompt_ids is None else prompt_ids
    start = time.perf_counter()
    ids = generate_greedy(model, tokenizer, prompts, max_new_tokens, batch_size, progress)
    seconds = time.perf_counter() - start
    texts = [tokenizer.decode(one, skip_special_tokens=True) for one in ids]

    def graded(pairs: Sequence[tuple[Row, str]]) -> list[Grade]:
        return grade_many(grade, [row for row, _ in pairs], [text for _, text in pairs])

    grades = _in_shares(graded, list(zip(rows, texts, strict=True)))
    groups: dict[str, list[bool]] = defaultdict(list)
    for row, verdict in zip(rows, grades, strict=True):
        if row.get("skill") is not None:
            groups[str(row["skill"])].append(verdict.correct)
    ends, tokens = set(eos_ids(model, tokenizer)), sum(map(len, ids))
    found = sum(verdict.extracted is not None for verdict in grades)
    return {
        "overall": wilson(sum(verdict.correct for verdict in grades), len(grades)),
        "by_skill": {name: wilson(sum(marks), len(marks)) for name, marks in sorted(groups.items())},
        "extraction_rate": found / len(grades) if found else None,
        "completions": texts,
        "completion_ids": ids,
        "grades": grades,
        "mean_tokens": tokens / max(len(ids), 1),
        "truncated": sum(not one or one[-1] not in ends for one in ids),
        "tokens_per_s": tokens / max(seconds, 1e-9),
    }


# ---------------------------------------------------------------- likelihood


class _States:
    """Completion states of one model: hidden states and its head, or for an unknown head the logits themselves."""

    def __init__(self, model: Any) -> None:
        from unisd.backbone import Backbone

        self.model = entry(model)
        self.backbone: Backbone | None = None
        try:
            self.backbone = Backbone(model)
            self.backbone.check(pad_id=0, packing="padded")
        except UserError:  # not trainable here, but it can be evaluated
            self.backbone = None

    def of(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[Tensor]:
        """`[T,H]` (or logits `[T,V]`) of each row, at the positions that predict its completion; right-padded batch."""
        from unisd.backbone import lay_out

        device = self.model.device
        sequences = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
        if self.backbone is not None:
            states_BL = self.backbone.forward(self.model, lay_out(sequences, False, 0, device)).final
            assert states_BL is not None
        else:
            batch = lay_out(sequences, False, 0, device)
            states_BL = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        return [
            states_BL[row, len(p) - 1 : len(p) + len(c) - 1] for row, (p, c) in enumerate(zip(prompts, completions, strict=True))
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
        raise UserError(f"{len(prompts)} prompts and {len(completions)} completions: give one completion per prompt")
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if completion and not prompt:
            raise UserError(f"row {i} has an empty prompt: the first token of its completion has no probability")


def _batches(prompts: Sequence[Ids], completions: Sequence[Ids], budget: int) -> Iterator[list[int]]:
    """Rows of similar length, longest first, at most `budget` tokens with padding (a longer row stands alone)."""
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    batch: list[int] = []
    for i in sorted((i for i in range(len(lengths)) if completions[i]), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def sequence_logprobs(
    model: Any, prompt_ids: Sequence[Ids], completion_ids: Sequence[Ids], *, token_budget: int = TOKEN_BUDGET
) -> tuple[Tensor, Tensor]:
    """Total log-probability (float64 [N], nats) of each completion given its prompt, and its number of tokens (int64 [N]).

    Memory: hidden states of `token_budget` tokens and `CHUNK_ENTRIES` logits.
    """
    _check_pairs(prompt_ids, completion_ids)
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
    return logp_N, count_N


def corpus_ppl(logp_N: Tensor, count_N: Tensor) -> float:
    """exp(-total log-probability / total tokens); NaN without tokens."""
    tokens = int(count_N.sum())
    return math.exp(min(-float(logp_N.sum()) / tokens, 700.0)) if tokens else math.nan


def reference_nll(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, prompt_ids: Sequence[Ids] | None = None
) -> tuple[float, int]:
    """Total negative log-probability (nats) and tokens of the rows' references, with their end token, given the prompts.

    The reference is `completion`, else `privileged_context`; rows with neither are left out.
    """
    from unisd.prompts import encode_completion

    prompts, completions, ends = [], [], eos_ids(model, tokenizer)
    for i, row in enumerate(rows):
        reference = row.get("completion") or row.get("privileged_context")
        if reference:
            prompts.append(_ids(tokenizer, row["prompt"]) if prompt_ids is None else prompt_ids[i])
            completions.append(encode_completion(tokenizer, str(reference), ends))
    logp_N, count_N = sequence_logprobs(model, prompts, completions)
    return -float(logp_N.sum()), int(count_N.sum())


def gold_ppl(model: Any, tokenizer: Any, rows: Sequence[Row]) -> float | None:
    """Corpus perplexity of the references given the plain prompts; None where no row has a reference."""
    nll, tokens = reference_nll(model, tokenizer, rows)
    return math.exp(min(nll / tokens, 700.0)) if tokens else None


# ---------------------------------------------------------------- retention


def jsd(logp_CV: Tensor, logq_CV: Tensor) -> Tensor:
    """Jensen-Shannon divergence [C] of two distributions given as log-probabilities, in nats; exactly 0 for equal ones."""
    p_CV, q_CV = logp_CV.exp(), logq_CV.exp()
    middle_CV = ((p_CV + q_CV) / 2).clamp_min(torch.finfo(p_CV.dtype).tiny)
    terms_CV = torch.xlogy(p_CV, p_CV / middle_CV) + torch.xlogy(q_CV, q_CV / middle_CV)
    return terms_CV.sum(-1).clamp_min(0) / 2


def retention(
    model: Any,
    base: Any | None,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    prompt_ids: Sequence[Ids] | None = None,
    max_new_tokens: int = 256,
    batch_size: int | None = None,
    token_budget: int = TOKEN_BUDGET,
    progress: bool | None = None,
    answers: tuple[Sequence[Ids], Sequence[Ids]] | None = None,
) -> dict[str, Any]:
    """How far an adapted model has moved from its base, on both models' own greedy answers.

    Args:
        model: the adapted model.
        base: the model it comes from; None: `model` is a peft model and its base is itself without the adapter.
        answers: the adapted model's and the base's, where they are known; None: they are written.

    Returns:
        `forward`: the adapted model's answers; `reverse`: the base's answers. Each holds `ppl` (of the answers under the
        *other* model: PPL_ret), `own_ppl` (under the model that wrote them), `delta` (paired difference of their
        log-probabilities per token, own minus other, nats: `value`, `low`, `high` of a 95 % interval over rows), `jsd`
        (of the two models, mean over tokens, full vocabulary, nats), `tokens`. And `n` rows.

    Raises:
        UserError: no base, and no adapter to take off.
    """
    if base is None and not hasattr(model, "disable_adapter"):
        raise UserError("retention needs the base model: give --base, or a model with an adapter that can be taken off")
    prompts = [_ids(tokenizer, row["prompt"]) for row in rows] if prompt_ids is None else list(prompt_ids)

    def written(which: Any, description: str) -> list[list[int]]:
        return generate_greedy(which, tokenizer, prompts, max_new_tokens, batch_size, progress, description)

    if answers is None:
        adapted_answers = written(model, "answers of the adapted model")
        with _as_base(model, base) as bare:
            answers = adapted_answers, written(bare, "answers of the base model")
    return {
        "forward": _along(model, base, prompts, answers[0], token_budget, written_by_base=False),
        "reverse": _along(model, base, prompts, answers[1], token_budget, written_by_base=True),
        "n": len(prompts),
    }


@contextmanager
def _as_base(model: Any, base: Any | None) -> Iterator[Any]:
    off: AbstractContextManager[Any] = nullcontext() if base is not None else model.disable_adapter()
    with off:
        yield model if base is None else base


def _along(
    model: Any, base: Any | None, prompts: Sequence[Ids], answers: Sequence[Ids], budget: int, written_by_base: bool
) -> dict[str, Any]:
    """Both models along the same answers, row by row and chunk by chunk."""
    _check_pairs(prompts, answers)
    logp_N2 = torch.zeros(len(prompts), 2, dtype=torch.float64)  # adapted, base
    count_N = torch.tensor([len(a) for a in answers], dtype=torch.int64)
    divergence = 0.0
    with inference(model, *([] if base is None else [base])):
        adapted_states = _States(model)
        base_states = adapted_states if base is None else _States(base)
        for rows in _batches(prompts, answers, budget):
            picked = [prompts[i] for i in rows], [answers[i] for i in rows]
            adapted_hidden = adapted_states.of(*picked)
            with _as_base(model, base):
                base_hidden = base_states.of(*picked)
            for i, ours_TH, theirs_TH in zip(rows, adapted_hidden, base_hidden, strict=True):
                target_T = torch.tensor(answers[i], device=ours_TH.device)
                for first in range(0, len(target_T), adapted_states.chunk):
                    part = slice(first, first + adapted_states.chunk)
                    ours_CV = adapted_states.logp(ours_TH[part])
                    with _as_base(model, base):  # an adapter may sit on the head
                        theirs_CV = base_states.logp(theirs_TH[part].to(base_states.model.device)).to(ours_CV)
                    for side, logp_CV in enumerate((ours_CV, theirs_CV)):
                        logp_N2[i, side] += logp_CV.gather(-1, target_T[part, None]).double().sum().cpu()
                    divergence += float(jsd(ours_CV, theirs_CV).double().sum())
    own, other = (1, 0) if written_by_base else (0, 1)
    return {
        "ppl": corpus_ppl(logp_N2[:, other], count_N),
        "own_ppl": corpus_ppl(logp_N2[:, own], count_N),
        "delta": paired_delta(logp_N2[:, own] - logp_N2[:, other], count_N),
        "jsd": divergence / int(count_N.sum()) if count_N.sum() else math.nan,
        "tokens": int(count_N.sum()),
    }


def paired_delta(difference_N: Tensor, count_N: Tensor, z: float = 1.959963984540054) -> Interval:
    """Total difference per token with a 95 % interval, rows as clusters (normal approximation of a ratio)."""
    tokens, n = int(count_N.sum()), len(count_N)
    if not tokens:
        return {"value": math.nan, "low": math.nan, "high": math.nan}
    value = float(difference_N.sum()) / tokens
    residual_N = difference_N - value * count_N
    half = z * math.sqrt(n / (n - 1) * float(residual_N.square().sum())) / tokens if n > 1 else math.inf
    return {"value": value, "low": value - half, "high": value + half}
