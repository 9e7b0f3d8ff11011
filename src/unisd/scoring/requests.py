"""The prompts under which a step's completions are scored: one `ScoreRequest` per completion,
within the limits of length.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from unisd.config import UniSDConfig
from unisd.data.origin import place_of
from unisd.data.outcomes import NO_LOSS, Outcome
from unisd.data.privilege import BUILT, what_gives
from unisd.data.prompts import PromptBuilder, encode_completion
from unisd.data.rendering import naming
from unisd.data.rows import Row
from unisd.errors import UserError
from unisd.methods.targets import NEGATIVE, SAME, Source, parse_target
from unisd.rollout.engine import Completion


@dataclass(frozen=True)
class ScoreRequest:
    """One completion and the prompts it is scored under."""

    completion: list[int]
    loss_mask: list[bool]
    student: list[int]
    teacher: list[int]
    negative: list[int] | None = None
    auxiliary: list[list[int]] = field(default_factory=list)
    number: int = -1  # of the row in the dataset, for messages
    # the prompts of the target's further sources; those that the row lacks are left out
    sources: dict[Source, list[int]] = field(default_factory=dict)


def subsample_contexts(
    views: list[list[int]], budget: int | None, seed: int, step: int, row: int
) -> list[list[int]]:
    """Agreement's budget of contexts: `budget` of a row's views in their order, drawn by (seed,
    optimizer step, row) alone.

    A draw per step, so that over the epochs all of them are used; the same for all generations of a
    prompt.
    """
    if budget is None or budget >= len(views):
        return views
    return [
        views[k]
        for k in sorted(random.Random(f"agreement {seed} {step} {row}").sample(range(len(views)), budget))
    ]


logger = logging.getLogger(__name__)

TRAINED_ON = "the training data"
_UNLIMITED = 1 << 60
NOTHING_TOLD = Outcome()


class RequestBuilder:
    """Builds the prompts under which a run scores each completion.

    Args:
        needs: what the active functions declare, of `NEEDS`.
        sources: of the target those that need a pass of their own.
        context: tokens that the model can read, or None; `context_is`: in words.

    Raises:
        UserError: the completions alone fill the model's context.
    """

    def __init__(
        self,
        args: UniSDConfig,
        prompts: PromptBuilder,
        needs: Collection[str],
        sources: Collection[Source],
        context: int | None,
        context_is: str = "the model's context",
    ) -> None:
        self.args = args
        self.prompts = prompts
        self.needs = needs
        self.sources = sources
        self.context, self.context_is = context, context_is
        self.room = _UNLIMITED if context is None else context - args.max_completion_length
        if self.room < 1:
            raise UserError(
                f"max_completion_length={args.max_completion_length} leaves no room for a prompt in"
                f" {context_is} of {context} tokens: lower it."
            )
        # Auxiliary and negative views are other texts: those over the limit are left out one by
        # one, and counted.
        self.teacher_room = min(self.room, args.max_teacher_prompt_length or _UNLIMITED)

    def check(self, rows: Sequence[Row]) -> None:
        """Raise `UserError` for rows whose prompts leave no room, by number: a cut prompt would
        teach another task.
        """
        for number, found in enumerate(rows):
            with naming(place_of(found, number, TRAINED_ON)):
                self.prompts.check(found)
        self._check_sources(rows)
        level = self.args.teacher_context
        level = level if self.args.uses_reference or level in BUILT else "plain"
        empty = [
            i
            for i, row in enumerate(rows)
            if level not in ("full", "plain") and self.prompts.lacks(row, level)
        ]
        if empty:
            raise UserError(
                f"{place_of(rows[empty[0]], empty[0], TRAINED_ON)} has nothing for teacher_context={level}"
                f" ({len(empty)} such row(s)): {what_gives(level)}, or use teacher_context=full."
            )
        limits = (
            ("prompt", "max_prompt_length", self.args.max_prompt_length, self.prompts.student),
            (
                "prompt with its reference",
                "max_teacher_prompt_length",
                self.args.max_teacher_prompt_length,
                self.teacher_prompt,
            ),
        )
        for what, option, own_limit, encode in limits:
            limit = min(self.room, own_limit or _UNLIMITED)
            too_long = [
                (i, length) for i, row in enumerate(rows) if (length := _length_over(limit, encode, row))
            ]
            if too_long:
                (row, length), count = too_long[0], len(too_long)
                name, remedy = (
                    (option, f"raise {option}")
                    if limit == own_limit
                    else (
                        f"{self.context_is} less max_completion_length",
                        "lower max_completion_length, or give a model with a longer context",
                    )
                )
                raise UserError(
                    f"{place_of(rows[row], row, TRAINED_ON)}: the {what} has {length} tokens, over the limit"
                    f" of {limit} ({name}); {count} such row(s): shorten or remove them, or {remedy}."
                )

    def check_evaluated(self, rows: Sequence[Row], name: str, ends: Sequence[int], cap: int) -> None:
        """The same for rows to evaluate on, of which the student's prompt is read: before a
        reference, and before an answer of up to `cap` tokens.
        """
        prompts, limit = self.prompts, self.context or _UNLIMITED
        for number, row in enumerate(rows):
            with naming(place_of(row, number, name)):
                prompts.check_asked(row)
                reference = str(row.get("completion") or row.get("privileged_context") or "")
                if len(str(row["prompt"]).encode()) + len(reference.encode()) + cap + 1024 <= limit:
                    continue
                asked = len(prompts.student(row))
                told = (
                    encode_completion(prompts.tokenizer, reference, ends, row["prompt"]) if reference else []
                )
                if asked + max(cap, len(told)) > limit:
                    raise UserError(
                        f"the prompt has {asked} tokens, its reference {len(told)} and an answer up to {cap},"
                        f" over {self.context_is} of {limit}: shorten or remove it, or lower"
                        " eval_max_new_tokens."
                    )

    def of(
        self,
        row: Row,
        number: int,
        completion: Completion,
        carries_loss: bool,
        step: int,
        outcome: Outcome = NOTHING_TOLD,
    ) -> tuple[ScoreRequest, int]:
        """Build the request of one completion of row `number`; also returns how many prompts were
        left out because they are too long.

        outcome: what the teacher may be told of the step's answers.
        """
        args = self.args
        teacher, untold = self._teacher_told(row, outcome)
        carries_loss = carries_loss and teacher is not None
        views = self.prompts.auxiliary(row, args.num_auxiliary_contexts) if "auxiliary" in self.needs else []
        fitting = [ids for ids in views if len(ids) <= self.teacher_room]
        overlong = len(views) - len(fitting) + untold
        negative = (
            self.prompts.negative(row) if "negative" in self.needs and row.get("negative_context") else None
        )
        if negative is not None and len(negative) > self.teacher_room:
            negative, overlong = None, overlong + 1
        prompt = self.teacher_prompt(row) if teacher is None else teacher
        sources = self._sources(row, prompt)
        fitting_sources = {source: ids for source, ids in sources.items() if len(ids) <= self.teacher_room}
        overlong += len(sources) - len(fitting_sources)
        own = completion.written or [True] * len(completion.ids)
        request = ScoreRequest(
            number=number,
            completion=completion.ids,
            loss_mask=[
                carries_loss and mine and t >= args.num_loss_tokens_to_skip for t, mine in enumerate(own)
            ],
            student=self.prompts.student(row),
            teacher=prompt,
            negative=negative,
            auxiliary=subsample_contexts(fitting, args.agreement_budget_contexts, args.seed, step, number),
            sources=fitting_sources,
        )
        return request, overlong

    def teacher_prompt(self, row: Row) -> list[int]:
        """The teacher's prompt; the student's where the row has no reference and needs none."""
        if self.args.uses_reference:
            return self.prompts.teacher(row)
        return self.prompts.at_level(row, self.args.teacher_context) or self.prompts.student(row)

    def _teacher_told(self, row: Row, outcome: Outcome) -> tuple[list[int] | None, int]:
        """The teacher's prompt by the first of `rollout_contexts` that serves and fits, else by
        `teacher_context`; None where the answer is to carry no loss. Also how many did not fit.
        """
        untold = 0
        for name in self.args.rollout_contexts:
            if name == NO_LOSS:
                return None, untold
            if not outcome.serves(name):
                continue
            told = outcome.told(name)
            ids = self.prompts.after_rollout(row, told.sibling, told.feedback)
            if len(ids) <= self.teacher_room:
                return ids, untold
            untold += 1
        return self.teacher_prompt(row), untold

    def _sources(self, row: Row, teacher: list[int]) -> dict[Source, list[int]]:
        """The prompts of the target's sources that the row can serve; `teacher`: the teacher's."""
        prompts = {
            source: teacher if source.context == SAME else self.prompts.at_level(row, source.context)
            for source in self.sources
            if source != NEGATIVE
        }
        return {source: ids for source, ids in prompts.items() if ids is not None}

    def _check_sources(self, rows: Sequence[Row]) -> None:
        """Refuse a source that no row can serve, and tell of one that some cannot.

        A target that does with some of its sources needs one that a row can serve.
        """
        asked = [one for one in self.sources if one != NEGATIVE and one.context not in (SAME, "plain")]
        lacking = {one: sum(self.prompts.lacks(row, one.context) for row in rows) for one in asked}
        enough = self.args.target is not None and parse_target(self.args.target).partial
        enough = enough and min(lacking.values(), default=0) < len(rows)
        for source, without in lacking.items():
            remedy = what_gives(source.context)
            if without == len(rows) and not enough:
                raise UserError(
                    f"target={self.args.target} reads {source}, but no row of the training data has anything"
                    f" for {source.context!r}: {remedy}, or take it out of the target."
                )
            if without:
                logger.warning(
                    "%d of %d rows have nothing for the target's source %s, and do without it: %s.",
                    *(without, len(rows), source, remedy),
                )


def _length_over(limit: int, encode: Callable[[Row], list[int]], row: Row) -> int:
    """The encoded length if it exceeds `limit`, else 0; texts too short to exceed it are not
    tokenised.
    """
    texts = [row.get("teacher_prompt"), row["prompt"], row["prompt"], row.get("privileged_context")]
    texts += [row.get("negative_context"), *(row.get("auxiliary_contexts") or [])[:1]]
    if sum(len(str(text).encode()) for text in texts if text) + 1024 <= limit:
        return 0
    length = len(encode(row))
    return length if length > limit else 0
