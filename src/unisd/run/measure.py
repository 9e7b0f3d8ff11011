"""The figures of `results.json`: before and after, on the task and on what must not be lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unisd.config import UniSDConfig
from unisd.data import rendering
from unisd.data.origin import place_of
from unisd.data.prompts import overlong
from unisd.data.rows import Row
from unisd.data.thoughts import completion_text
from unisd.distributed.sharding import all_ranks_must_join
from unisd.errors import UserError
from unisd.evaluation.accuracy import accuracy, generate_greedy
from unisd.evaluation.likelihood import gold_ppl
from unisd.evaluation.retention import retention, retention_along
from unisd.models.inference import load_any
from unisd.models.load import context_length
from unisd.run import answers, grafting
from unisd.run import baseline as shared
from unisd.run.changes import change, drift_of, forgotten, items
from unisd.run.inputs import GradeFunction, RunData, load_model
from unisd.run.options import RunOptions
from unisd.run.retention import RetentionSet
from unisd.trainer import UniSDTrainer

Figures = dict[str, Any]
TASK, RETENTION, FREE = "task", "retention", "free"
"""Parts of the answers: the task's, those of the first retention set, and free ones."""


def graded(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    grade: GradeFunction | None,
    cap: int,
    batch_size: int,
    answers_kept: int | None = None,
) -> tuple[Figures | None, Figures | None, Figures | None]:
    """Greedy accuracy, by skill where rows name one, and the answers.

    None where there is nothing to grade; without a grader some rows are answered all the same.
    """
    kept = answers.kept(answers_kept, grade is not None)
    if not rows or (grade is None and not kept):
        return None, None, None
    if grade is None:
        prompts = [row["prompt"] for row in rows[:kept]]
        ids = generate_greedy(model, tokenizer, prompts, cap, batch_size)
        return None, None, answers.ungraded([completion_text(tokenizer, one) for one in ids])
    found = accuracy(model, tokenizer, rows, grade, max_new_tokens=cap, batch_size=batch_size)
    return found["overall"], found["by_skill"] or None, answers.verdicts(found, kept)


def parts_of(data: RunData) -> dict[str, RetentionSet]:
    """The graded retention sets by the part of the answers that is theirs; the first is plain
    `retention`.
    """
    sets = [one for one in data.retention if one.grade is not None and one.rows]
    return {RETENTION if place == 0 else f"{RETENTION} {one.name}": one for place, one in enumerate(sets)}


def check_lengths(model: Any, tokenizer: Any, data: RunData) -> None:
    """Raise `UserError` for rows to report on that leave no room for an answer."""
    context = context_length(model)
    for name, rows in data.evaluated.items():
        if too_long := overlong(tokenizer, rows, context):
            number, length = next(iter(too_long.items()))
            raise UserError(
                f"{place_of(rows[number], number, name)}: the prompt has {length} tokens, and the model's"
                f" context is {context}; {len(too_long)} such row(s): shorten or remove them, or give a model"
                " with a longer context."
            )


def measure(
    model: Any, tokenizer: Any, data: RunData, config: UniSDConfig, references: int | None = None
) -> tuple[Figures, Figures]:
    """Measure one state of the model: the `before` or `after` of `results.json`, and answers.

    Skills without a grader are null.

    references: of how many rows' references the perplexity is measured; None: of all.
    """
    cap, batch = config.eval_max_new_tokens or config.max_completion_length, config.rollout_batch_size
    task, skills, task_answers = graded(
        model, tokenizer, data.evaluation, data.grade, cap, batch, data.answers_kept
    )
    found: dict[str, Figures | None] = {TASK: task_answers}
    sets: dict[str, Figures] = {}
    for part, one in parts_of(data).items():
        share, by_skill, found[part] = graded(model, tokenizer, one.rows, one.grade, one.cap or cap, batch)
        of_set = {name: (found[part] or {}).get(name) for name in ("outcomes", "details")}
        sets[one.name] = {"accuracy": share, "skills": by_skill, **of_set}
    first: Figures = next(iter(sets.values()), {})
    if (probed := data.probed) is not None and (probed.free or probed.grade is None):
        prompts = [row["prompt"] for row in probed.probed]
        found[FREE] = {"token_ids": generate_greedy(model, tokenizer, prompts, probed.cap or cap, batch)}
    figures = {
        "task_accuracy": task,
        "task_outcomes": (task_answers or {}).get("outcomes"),
        "task_details": (task_answers or {}).get("details"),
        "skills": skills,
        "retention_accuracy": first.get("accuracy"),
        "retention_outcomes": first.get("outcomes"),
        "retention_details": first.get("details"),
        "retention_skills": first.get("skills"),
        "retention": sets,
        "gold_ppl": gold_ppl(model, tokenizer, data.evaluation[:references]),
    }
    return figures, found


def kept_of(data: RunData) -> int:
    """How many evaluation rows keep the texts of their answers."""
    return min(len(data.evaluation), answers.kept(data.answers_kept, data.grade is not None))


def pair_answers(data: RunData, before: Figures, after: Figures) -> Figures:
    """What `answers.json` holds, from the answers of both states."""
    rows = {TASK: data.evaluation, **{part: one.rows for part, one in parts_of(data).items()}}
    return {
        part: answers.paired(of_part, before[part], after[part])
        for part, of_part in rows.items()
        if before.get(part) and after.get(part)
    }


def drift(
    model: Any,
    base: Any | None,
    tokenizer: Any,
    rows: Sequence[Row],
    cap: int,
    batch_size: int,
    known: tuple[Figures | None, Figures | None] = (None, None),
) -> Figures:
    """Measure how far the model has moved from its base.

    `retention_ppl` both ways, and details (`evaluation.retention`).

    known: the model's and the base's answers to these very rows; where they are missing they are
    written anew.
    """
    after, before = ((side or {}).get("token_ids") for side in known)
    if after is None or before is None:
        found = retention(model, base, tokenizer, rows, max_new_tokens=cap, batch_size=batch_size)
    else:
        found = retention_along(model, base, tokenizer, rows, (after, before))
    ways = ("forward", "reverse")
    return {
        "retention_ppl": {way: _finite(found[way]["ppl"]) for way in ways},
        "retention_detail": {w: found[w] for w in (*ways, "n")},
    }


def drift_between(
    model: Any,
    base: Any | None,
    tokenizer: Any,
    data: RunData,
    config: UniSDConfig,
    answers_of: tuple[Figures, Figures],
) -> Figures:
    """Measure drift on the rows that are probed, from the answers of the model and of its base."""
    if (probed := data.probed) is None:
        return {"retention_ppl": None, "retention_detail": None}
    cap = probed.cap or config.eval_max_new_tokens or config.max_completion_length
    part = FREE if FREE in answers_of[0] else RETENTION
    known = answers_of[0].get(part), answers_of[1].get(part)
    return drift(model, base, tokenizer, probed.probed, cap, config.rollout_batch_size, known)


@dataclass(frozen=True)
class Measurements:
    """Takes the figures of a run's model, before and after its training."""

    trainer: UniSDTrainer
    tokenizer: Any
    data: RunData
    options: RunOptions
    config: UniSDConfig

    def before(self) -> Figures:
        """`figures` and `answers` of the untrained model, which several runs may share."""
        rendered = rendering.rendered_with(self.tokenizer)
        key = shared.key_of(self.options, self.config, self.data, rendered)
        # Ranks measure together: none can wait for a file.
        cache = self.options.before_cache if self.config.world_size == 1 else None
        return shared.measured_once(
            cache, key, lambda: dict(zip(("figures", "answers"), self.now(), strict=True))
        )

    def now(self) -> tuple[Figures, Figures]:
        """Figures and answers of the model as it is, in the precision that it is trained in.

        Before training no wrapper sees to that.
        """
        with self.trainer.accelerator.autocast():
            return measure(self.trainer.model, self.tokenizer, self.data, self.config)

    def drift(self, after: Figures, before: Figures) -> Figures:
        """Measure how far the model is from the initial one, from the answers of both.

        Not of a sharded model without an adapter: `unisd eval --base` measures it afterwards.
        """
        model, probed = self.trainer.model, self.data.probed
        # Where processes share a model, none has room for a whole initial one beside it.
        if probed is None or (all_ranks_must_join(model) and not self.options.use_peft):
            return {"retention_ppl": None, "retention_detail": None}
        base = None if self.options.use_peft else load_model(self.options)[0].to(model.device)
        with self.trainer.accelerator.autocast():
            return drift_between(model, base, self.tokenizer, self.data, self.config, (after, before))

    def parts(self, before: Figures, after: tuple[Figures, Figures]) -> list[grafting.Point]:
        """Measure parts of what training changed, and keep the curve between both ends."""
        folder, options, scales = str(self.config.output_dir), self.options, self.options.graft_scales or ()
        dtype = str(next(self.trainer.model.parameters()).dtype).removeprefix("torch.")

        def measured(place: str, scale: float) -> tuple[Figures, Figures]:
            model, tokenizer = load_any(place, dtype, options.trust_remote_code)
            with self.trainer.accelerator.autocast():
                return measure(model, tokenizer, self.data, self.config)

        further = {"trust_remote_code": options.trust_remote_code, "load_in_4bit": options.load_in_4bit}
        base = grafting.base_of(folder, None if options.use_peft else options.model_name_or_path)
        found = grafting.curve(folder, base, scales, measured, **further)
        sides = {grafting.NONE: (before["figures"], before["answers"]), **found, grafting.ALL: after}
        points = [grafting.point(self.data.name, scale, *side) for scale, side in sides.items()]
        grafting.add(Path(folder), points)
        return points


def compared(data: RunData, before: Figures, after: tuple[Figures, Figures]) -> Figures:
    """The parts `acquisition`, `retention` and `drift` of `results.json`.

    Args:
        before: figures and answers of the untrained model.
        after: the same of the trained one.
    """
    old, new = before["figures"], after[0]
    sides = before["answers"], after[1]

    def of_items(part: str) -> Figures | None:
        marks = [side[part]["correct"] for side in sides if (side.get(part) or {}).get("correct")]
        return items(*marks) if len(marks) == 2 else None

    kept = []
    for part, one in parts_of(data).items():
        shares = old["retention"][one.name], new["retention"][one.name]
        kept.append(
            {
                "name": one.name,
                "rows": len(one.rows),
                "accuracy": change(*(share["accuracy"]["value"] for share in shares)),
                "items": of_items(part),
                "skills": {
                    skill: change(share["value"], shares[1]["skills"][skill]["value"])
                    for skill, share in (shares[0]["skills"] or {}).items()
                },
            }
        )
    moved = None if data.probed is None else drift_of(new.get("retention_detail"), data.probed.name)
    accuracies = [side["task_accuracy"] and side["task_accuracy"]["value"] for side in (old, new)]
    return {
        "acquisition": {
            "accuracy": change(*accuracies),
            "items": of_items(TASK),
            "reference_ppl": change(old["gold_ppl"], new["gold_ppl"]),
        },
        "retention": kept,
        "drift": moved,
        "forgotten": forgotten(kept, moved),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
