"""Gets the completions of a step from the source that the options name.

The student, the dataset's references, the initial model, or a mixture by rows.

Which source a row gets, and what is sampled for it, depends on (seed, step, row, generation) alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from unisd.config import UniSDConfig
from unisd.data.origin import place_of
from unisd.data.outcomes import Outcome, kept, siblings
from unisd.data.prompts import PromptBuilder, encode_completion
from unisd.data.rendering import naming
from unisd.data.rows import Row
from unisd.data.thoughts import answer_of, completion_text
from unisd.data.trajectories import TURNS, encode_turns
from unisd.distributed.sharding import all_ranks_must_join
from unisd.errors import UserError, first_line
from unisd.rollout.engine import Completion, Engine, NoiseKey, Sampling, uniform_noise
from unisd.rollout.verdicts import Judge
from unisd.teacher import Teacher


@dataclass
class CompletionSource:
    """Completions of prompts of `rows`, by their numbers."""

    args: UniSDConfig
    rows: Sequence[Row]
    prompts: PromptBuilder
    engine: Engine
    author: Teacher
    """Holds the weights that write the answers of `completion_source=initial`."""
    sampling: Sampling
    eos_ids: Sequence[int]
    judge: Judge | None = None
    """Gives the verdicts, where the options ask for them."""
    generated: int = 0
    """Tokens that a model has written so far, and `prefilled`: of the prompts it read for them."""
    prefilled: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Of the newest rollout: `sync` of an engine with weights of its own, `verdict` of the
    grader.
    """

    def check(self) -> None:
        """Raise `UserError` for the first reference that is missing or too long.

        Longer than a completion may be.
        """
        if self.args.completion_source not in ("reference", "mixture"):
            return
        limit = self.args.max_completion_length
        for number, row in enumerate(self.rows):
            if not row.get("completion"):
                raise UserError(
                    f"{place_of(row, number, 'the training data')} has no completion, which"
                    f" completion_source={self.args.completion_source} trains on: add the column."
                )
            if (TURNS in row or len(str(row["completion"]).encode()) >= limit) and (
                length := len(self._reference(number).ids)
            ) > limit:
                raise UserError(
                    f"{place_of(row, number, 'the training data')}: the completion has {length} tokens, over"
                    f" max_completion_length={limit}: shorten or remove it, or raise max_completion_length."
                )

    def complete(self, numbers: Sequence[tuple[int, int]], step: int) -> list[Completion]:
        """One completion for each (row, generation) of an optimizer step."""
        sources = [self._source(row, generation, step) for row, generation in numbers]
        found: dict[int, Completion] = {
            i: self._reference(numbers[i][0]) for i, s in enumerate(sources) if s == "reference"
        }
        if "student" in sources:
            self._sync()
        # As if drawn beforehand: the same in every epoch, until they are refreshed.
        drawn = step - step % (self.args.refresh_rollouts_every or step + 1)
        for source, at_step in (("student", step), ("initial", drawn)):
            chosen = [i for i, s in enumerate(sources) if s == source]
            keys: list[NoiseKey] = [(self.args.seed, at_step, *numbers[i]) for i in chosen]
            if not chosen and not self._others_sample(source):
                continue
            prompts = [self.prompts.student(self.rows[numbers[i][0]]) for i in chosen]
            if source == "initial":
                with self.author.in_place():
                    self._sync()  # an engine with weights of its own must have these
                    written = [
                        replace(c, sampled=False, version=None if c.version is None else at_step)
                        for c in self._written(prompts, keys)
                    ]
            else:
                written = self._written(prompts, keys)
            written = [self._without_end(c) for c in written]
            self.prefilled += sum(map(len, prompts))
            self.generated += sum(len(c.ids) if c.written is None else sum(c.written) for c in written)
            found.update(zip(chosen, written, strict=True))
        self.engine.sleep()
        if all(completion.version is None for completion in found.values()):
            self.seconds.pop("sync", None)  # the engine has the student's own weights
        return self._judged(numbers, [found[i] for i in range(len(numbers))])

    def _written(self, prompts: list[list[int]], keys: Sequence[NoiseKey]) -> list[Completion]:
        """What the engine writes to the prompts."""
        try:
            written = self.engine.generate(prompts, keys, self.sampling)
        except OSError as error:  # of a connection, say
            raise UserError(f"the engine raised {type(error).__name__}: {first_line(error)}.") from error
        check_written(written, len(prompts), self.sampling.max_new_tokens)
        return list(written)

    def _judged(self, numbers: Sequence[tuple[int, int]], completions: list[Completion]) -> list[Completion]:
        if self.judge is None:
            return completions
        start = time.perf_counter()
        texts = [self._answer(completion) for completion in completions]
        verdicts = self.judge.verdicts([self.rows[row] for row, _ in numbers], texts)
        self.seconds["verdict"] = time.perf_counter() - start
        return [replace(c, verdict=verdict) for c, verdict in zip(completions, verdicts, strict=True)]

    def _answer(self, completion: Completion) -> str:
        return answer_of(completion_text(self.prompts.tokenizer, completion.ids))

    def outcomes(
        self, numbers: Sequence[tuple[int, int]], completions: Sequence[Completion]
    ) -> list[Outcome]:
        """What the teacher can be told of each answer's group, which is on one rank."""
        if not self.args.rollout_contexts:
            return [Outcome()] * len(numbers)
        shown = siblings(*_groups(numbers, completions), self.args.sibling == "shortest")
        verdicts = [completion.verdict for completion in completions]
        return [
            Outcome(
                None if place is None else self._answer(completions[place]),
                # a passed answer has nothing to mend, and its teacher would be told that it failed
                None if verdict is None or verdict.passed else verdict.feedback or None,
            )
            for place, verdict in zip(shown, verdicts, strict=True)
        ]

    def _without_end(self, completion: Completion) -> Completion:
        """What an engine of its own tells of one of several ends is less than the student's of all:
        no importance ratio is made of it.
        """
        logps, several = completion.logps, self.args.merge_stop_tokens and len(self.eos_ids) > 1
        if not logps or not several or not getattr(self.engine, "returns_logps", False):
            return completion
        told = zip(completion.ids, logps, strict=True)
        return replace(completion, logps=[math.nan if i in self.eos_ids else logp for i, logp in told])

    def _sync(self) -> None:
        start = time.perf_counter()
        self.engine.sync()
        self.seconds["sync"] = time.perf_counter() - start

    def _others_sample(self, source: str) -> bool:
        """Whether other ranks may need this one to sample from `source`.

        They do where they share the model's weights.
        """
        of_rows = "student" if self.args.completion_source == "mixture" else self.args.completion_source
        return source == of_rows and all_ranks_must_join(self.author.model)

    def carry_loss(self, numbers: Sequence[tuple[int, int]], completions: Sequence[Completion]) -> list[bool]:
        """Whether each answer carries loss, by `rollout_keep` and `_is_left_out`."""
        wanted = kept(*_groups(numbers, completions), self.args.rollout_keep)
        return [keep and not self._is_left_out(c) for keep, c in zip(wanted, completions, strict=True)]

    def _is_left_out(self, completion: Completion) -> bool:
        """Cut answers if asked so, and empty ones of the initial model (SSD's filter)."""
        if completion.truncated and self.args.mask_truncated_completions:
            return True
        return self.args.completion_source == "initial" and all(
            token in self.eos_ids for token in completion.ids
        )

    def _source(self, row: int, generation: int, step: int) -> str:
        if self.args.completion_source != "mixture":
            return self.args.completion_source
        # One number beyond those that sample the completion itself.
        draw = uniform_noise((self.args.seed, step, row, generation), self.sampling.max_new_tokens + 1)[-1]
        return "student" if draw < self.args.on_policy_share else "reference"

    def _reference(self, row: int) -> Completion:
        found = self.rows[row]
        if TURNS in found:
            with naming(place_of(found, row, "the training data")):
                ids, own = encode_turns(self.prompts.tokenizer, found["prompt"], found[TURNS], self.eos_ids)
            return Completion(ids, truncated=False, sampled=False, written=own)
        ids = encode_completion(
            self.prompts.tokenizer, str(found["completion"]), self.eos_ids, found["prompt"]
        )
        return Completion(ids, truncated=False, sampled=False)


def check_written(written: Any, prompts: int, limit: int) -> None:
    """Raise `UserError` for what an engine of the user's own must not return.

    Args:
        prompts: how many it was given.
        limit: tokens that a completion may have.
    """
    if not isinstance(written, (list, tuple)) or len(written) != prompts:
        what = f"{len(written)} completions" if isinstance(written, (list, tuple)) else type(written).__name__
        raise UserError(f"the engine returned {what} for {prompts} prompts: give a list with one for each.")
    for one in written:
        if not isinstance(one, Completion):
            raise UserError(f"the engine returned {one!r:.80}: give unisd.Completion(ids, truncated).")
        if not all(isinstance(token, int) and token >= 0 for token in one.ids):
            raise UserError("the engine returned a Completion whose ids are not a list of token numbers.")
        if len(one.ids) > limit:
            raise UserError(
                f"the engine returned {len(one.ids)} tokens, over the limit of {limit} that it was given"
                " (sampling.max_new_tokens), which is that of all turns: end there, with truncated=True."
            )
        for name in ("written", "logps"):
            values = getattr(one, name)
            if values is not None and len(values) != len(one.ids):
                raise UserError(
                    f"the engine returned {len(one.ids)} tokens and {len(values)} entries of `{name}`: give"
                    " one per token."
                )


def _groups(
    numbers: Sequence[tuple[int, int]], completions: Sequence[Completion]
) -> tuple[list[int], list[bool | None], list[int]]:
    """Of each answer: its prompt's row, whether it has passed, its length in tokens."""
    return (
        [row for row, _ in numbers],
        [None if c.verdict is None else c.verdict.passed for c in completions],
        [len(c.ids) for c in completions],
    )
