"""Records the supervision of a few completions per logged step, token by token.

In `samples.jsonl`, for a report. Bounded: at most `MAX_RECORDS` completions a run and `MAX_TOKENS`
tokens of each. All numbers but the teacher's own choice are computed by the step anyway; that takes
one more product with the head, of the recorded tokens alone. Recording changes nothing.

Shapes: B rows of the step on this rank, T longest completion, N loss tokens of a micro-batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unisd.data.rows import Row
from unisd.data.text import MAX_TEXT, record_of, reference_of
from unisd.data.thoughts import answer_of, completion_text
from unisd.files import keep_until
from unisd.losses.head import Head
from unisd.losses.terms import LossInputs, LossOutput
from unisd.methods.divergence import DivergenceSpec
from unisd.methods.scores import StepScores
from unisd.rollout.engine import Completion
from unisd.rollout.verdicts import LIMIT_S, Judge

MAX_RECORDS = 200
MAX_TOKENS = 512
BLOCK = 64
"""Tokens whose distribution over the vocabulary is held at once to find the teacher's choice."""
OF_STUDENT = {
    "teacher_logp": "teacher_logp_N",
    "student_logp": "student_logp_N",
    "entropy": "student_entropy_N",
    "divergence": "divergence_N",
    "clipped": "clipped_N",
}
"""Fields of a record, and of `LossOutput`."""

Span = tuple[int, int, int]
"""A recorded row's number in the step; first and end place of its loss tokens in a micro-batch."""


class SampleRecorder:
    """Collects the records of the step in progress; `write` appends them.

    Args:
        path: `samples.jsonl`.
        per_step: completions of a logged step; 0 records nothing.
        tokenizer: splits a completion into the texts of its tokens.
        grader: verdict on a completion, or None; it has `verdict_seconds` for each.
    """

    def __init__(
        self,
        path: Path,
        per_step: int,
        tokenizer: Any,
        grader: Callable[[Row, str], Any] | None,
        verdict_seconds: float = LIMIT_S,
    ) -> None:
        self.path = path
        self.per_step = per_step
        self.tokenizer = tokenizer
        self.judge = None if grader is None else Judge(grader, verdict_seconds)
        self._pending: dict[int, dict[str, Any]] = {}
        self._taken: dict[int, Tensor] = {}  # values by row and loss token, on the device
        self._preferred: dict[int, Tensor] = {}  # the teacher's token, its log-probability, the sampled one
        self._places: dict[int, list[int]] = {}  # of the loss tokens within the record's tokens
        self._ids: dict[int, Sequence[int]] = {}  # the record's tokens

    def wants(self, step: int, max_steps: int, logging_steps: float) -> bool:
        """Whether step `step` (from 1) is recorded: it is logged, and the file stays small."""
        if self.per_step < 1:
            return False
        every = max(math.ceil(logging_steps), math.ceil(max_steps * self.per_step / MAX_RECORDS), 1)
        return step % every == 0 or step == 1

    def begin(
        self,
        step: int,
        rows: Sequence[Row],
        completions: Sequence[Completion],
        scores: StepScores,
        weight_BT: Tensor,
        temperature: float,
    ) -> None:
        """Open the records of a step, with all that is known before its gradient.

        `weight_BT`: reliability weights, 1 without.
        """
        loss_tokens = scores.mask.any(-1).tolist()
        chosen = [i for i in range(len(rows)) if loss_tokens[i]][: self.per_step]
        self._pending, self._places, self._ids, self._taken, self._preferred = {}, {}, {}, {}, {}
        for i in chosen:
            completion = completions[i]
            length = min(len(completion.ids), MAX_TOKENS)
            self._ids[i] = completion.ids[:length]
            self._places[i] = scores.mask[i, :length].nonzero().flatten().tolist()
            self._pending[i] = {
                "step": step,
                **self._texts(rows[i], completion),
                "cut": len(completion.ids) - length,
                "weights_version": completion.version,  # None: the student's own at this step
                "temperature": temperature,
                "weight": _at_loss_tokens(weight_BT[i, :length], scores.mask[i, :length]),
                "teacher_logp": None,  # known with the student's pass, as are the others that `take` adds
                **_scored(scores, i, length),
            }

    def _texts(self, row: Row, completion: Completion) -> dict[str, Any]:
        answer = answer_of(completion_text(self.tokenizer, completion.ids))
        return {
            "id": str(row.get("id", "")),
            **record_of(row["prompt"]),
            "reference": reference_of(row)[:MAX_TEXT],
            **self._judged(row, completion, answer),
            "tokens": token_texts(self.tokenizer, completion.ids[:MAX_TOKENS]),
        }

    def _judged(self, row: Row, completion: Completion, answer: str) -> dict[str, Any]:
        """The verdict that the answer got already, else what the grader says."""
        if (verdict := completion.verdict) is not None:
            return {"correct": verdict.passed, "score": verdict.score, "feedback": verdict.feedback}
        [verdict] = [None] if self.judge is None else self.judge.verdicts([row], [answer])
        return {"correct": None if verdict is None else verdict.passed}

    def spans(self, part: Sequence[int], mask_BT: Tensor) -> list[Span]:
        """Where the recorded rows' loss tokens lie in a micro-batch made of the rows `part`."""
        found, start, counts = [], 0, mask_BT.sum(-1).tolist()
        for i in part:
            end = start + counts[i]
            if i in self._pending:
                found.append((i, start, end))
            start = end
        return found

    def take(self, spans: Sequence[Span], inputs: LossInputs, output: LossOutput) -> None:
        """Keep what the student's pass says of its tokens, and the teacher's most likely tokens.

        It stays on the device until the step's end.
        """
        if not spans:
            return
        values = [getattr(output, name) for name in OF_STUDENT.values()]
        if (contrast := output.terms.get("contrast")) is not None:
            values.append(contrast.values_N)
        together_KN = torch.stack([value_N.to(output.divergence_N.dtype) for value_N in values])
        self._taken |= {i: together_KN[:, start:end] for i, start, end in spans}
        if inputs.spec.mode == "nll":  # no teacher was asked
            return
        for i, start, _ in spans:
            tokens = slice(start, start + len(self._places[i]))
            sampled_N = inputs.teacher_head.outcomes(inputs.targets_N[tokens])
            top_N, logp_N = likeliest(inputs.teacher_head, inputs.teacher_hidden_NH[tokens], inputs.spec)
            self._preferred[i] = torch.stack([top_N.float(), logp_N.float(), sampled_N.float()])

    def _add_taken(self) -> None:
        """Put what `take` has kept into the records: one wait for the device."""
        if not self._taken:
            return
        together_KN = torch.cat(list(self._taken.values()), dim=1).tolist()
        end = 0
        for i, value_KN in self._taken.items():
            start, end = end, end + value_KN.shape[1]
            record, places = self._pending[i], self._places[i]
            for name, value_N in zip((*OF_STUDENT, "contrast"), together_KN, strict=False):
                values: list[Any] = [None] * len(record["tokens"])
                # the record may be cut
                for place, value in zip(places, value_N[start:end], strict=False):
                    values[place] = bool(value) if name == "clipped" else _rounded(value)
                record[name] = values
            if record["negative_logp"] is None or "contrast" not in record:
                record["contrast"] = None
            if i in self._preferred:
                record |= self._choices(i)
        self._taken, self._preferred = {}, {}

    def _choices(self, i: int) -> dict[str, Any]:
        """Text and log-probability of the teacher's likeliest token; None where it was sampled."""
        ids, places = self._ids[i], self._places[i]
        texts: list[str | None] = [None] * len(ids)
        values: list[float | None] = [None] * len(ids)
        for place, top, logp, token in zip(places, *self._preferred[i].tolist(), strict=True):
            if top != token:
                texts[place] = token_texts(self.tokenizer, [*ids[max(place - 1, 0) : place], int(top)])[-1]
                values[place] = _rounded(logp)
        return {"teacher_top": texts, "teacher_top_logp": values}

    def write(self) -> None:
        """Append the step's records."""
        self._add_taken()
        if not self._pending:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, default=str) + "\n" for record in self._pending.values())
        self._pending = {}

    def forget_after(self, step: int) -> None:
        """Drop records of steps that a resumed run does again (and one that a kill cut short)."""
        keep_until(self.path, step)


@torch.no_grad()
def likeliest(head: Head, hidden_NH: Tensor, spec: DivergenceSpec) -> tuple[Tensor, Tensor]:
    """The likeliest token of each state and its log-probability; few at a time."""
    parts = [head.log_probs(part, spec.temperature).max(-1) for part in torch.split(hidden_NH, BLOCK)]
    return torch.cat([top_N for _, top_N in parts]), torch.cat([logp_N for logp_N, _ in parts])


def _scored(scores: StepScores, i: int, length: int) -> dict[str, Any]:
    """The log-probabilities of a row's first tokens under the views that it has."""
    mask_T = scores.mask[i, :length]
    auxiliary: list[list[float | None]] = []
    if scores.auxiliary_logp is not None and scores.auxiliary_present is not None:
        auxiliary = [
            _at_loss_tokens(logp_BT[i, :length], mask_T)
            for logp_BT, present_B in zip(scores.auxiliary_logp, scores.auxiliary_present, strict=True)
            if present_B[i]
        ]
    negative: list[float | None] | None = None
    if (
        scores.negative_logp is not None
        and scores.negative_present is not None
        and scores.negative_present[i]
    ):
        negative = _at_loss_tokens(scores.negative_logp[i, :length], mask_T)
    return {"auxiliary_logp": auxiliary, "negative_logp": negative}


def _at_loss_tokens(value_T: Tensor, mask_T: Tensor) -> list[float | None]:
    pairs = zip(value_T.tolist(), mask_T.tolist(), strict=True)
    return [_rounded(value) if carries_loss else None for value, carries_loss in pairs]


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the one before it.

    Alone, a token of a word's beginning may lose its space.
    """
    texts = []
    for place, token in enumerate(ids):
        before = tokenizer.decode(ids[place - 1 : place]) if place else ""
        both = tokenizer.decode(ids[max(place - 1, 0) : place + 1])
        texts.append(both[len(before) :] if both.startswith(before) else tokenizer.decode([token]))
    return texts


def _rounded(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
