"""The figures of `results.json`: before and after, on the task and on what must not be lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from unisd.config import UniSDConfig
from unisd.console import number
from unisd.data.rows import Row
from unisd.data.thoughts import completion_text
from unisd.evaluation.accuracy import accuracy, generate_greedy
from unisd.evaluation.grading import detail_lines, unsettled_lines
from unisd.evaluation.likelihood import gold_ppl
from unisd.evaluation.retention import retention, retention_along
from unisd.run import answers
from unisd.run.inputs import GradeFunction, RunData

Figures = dict[str, Any]


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


def measure(model: Any, tokenizer: Any, data: RunData, config: UniSDConfig) -> tuple[Figures, Figures]:
    """Measure one state of the model: the `before` or `after` of `results.json`, and answers.

    Skills without a grader are null.
    """
    cap, batch = config.eval_max_new_tokens or config.max_completion_length, config.rollout_batch_size
    task, skills, task_answers = graded(
        model, tokenizer, data.evaluation, data.grade, cap, batch, data.answers_kept
    )
    retention, retention_skills, retention_answers = graded(
        model, tokenizer, data.retention, data.grade, cap, batch
    )
    figures = {
        "task_accuracy": task,
        "task_outcomes": (task_answers or {}).get("outcomes"),
        "task_details": (task_answers or {}).get("details"),
        "skills": skills,
        "retention_accuracy": retention,
        "retention_outcomes": (retention_answers or {}).get("outcomes"),
        "retention_details": (retention_answers or {}).get("details"),
        "retention_skills": retention_skills,
        "gold_ppl": gold_ppl(model, tokenizer, data.evaluation),
    }
    return figures, {"task": task_answers, "retention": retention_answers}


def kept_of(data: RunData) -> int:
    """How many evaluation rows keep the texts of their answers."""
    return min(len(data.evaluation), answers.kept(data.answers_kept, data.grade is not None))


def pair_answers(data: RunData, before: Figures, after: Figures) -> Figures:
    """What `answers.json` holds, from the answers of both states."""
    rows = {"task": data.evaluation, "retention": data.retention}
    return {
        part: answers.paired(rows[part], before[part], after[part])
        for part in rows
        if before[part] and after[part]
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

    known: what `graded` says of the model's and the base's answers to these very rows; where it is
    missing they are written anew.
    """
    after, before = ((side or {}).get("token_ids") for side in known)
    if after is None or before is None:
        found = retention(model, base, tokenizer, rows, max_new_tokens=cap, batch_size=batch_size)
    else:
        found = retention_along(model, base, tokenizer, rows, (after, before))
    ways = ("forward", "reverse")
    return {
        "retention_ppl": {way: _finite(found[way]["ppl"]) for way in ways},
        "retention_detail": {w: found[w] for w in ways},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def percent(accuracy: Figures | None) -> str:
    """`62.3 % [57.1, 67.0]`."""
    if accuracy is None:
        return "-"
    value, low, high = (100 * accuracy[name] for name in ("value", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def change_lines(results: Figures) -> list[list[str]]:
    """Measure, before, after and change, one line each; skills indented under their total."""
    before, after = results["before"], results["after"]
    lines = []
    for name, total, skills in (
        ("task accuracy", "task_accuracy", "skills"),
        ("retention accuracy", "retention_accuracy", "retention_skills"),
    ):
        if after[total] is None:
            continue
        lines.append(_accuracy_line(name, before[total], after[total]))
        for skill, value in (after[skills] or {}).items():
            lines.append(_accuracy_line(f"  {skill}", before[skills][skill], value))
    lines += detail_lines(before, after) + unsettled_lines(before, after)
    if after["gold_ppl"] is not None:
        change = f"{after['gold_ppl'] - before['gold_ppl']:+.3f}"
        lines.append(
            ["perplexity of the references", number(before["gold_ppl"]), number(after["gold_ppl"]), change]
        )
    whose = {"forward": "own answers under the base", "reverse": "base's answers under it"}
    for way, value in (after["retention_ppl"] or {}).items():
        lines.append([f"retention perplexity, {whose[way]}", "", number(value), ""])
    return lines


def _accuracy_line(name: str, before: Figures, after: Figures) -> list[str]:
    return [name, percent(before), percent(after), f"{100 * (after['value'] - before['value']):+.1f}"]
