"""Write the map of docs/field.md: every recipe as a point on five axes, its cost and its needs.

`python -m experiments.five_axes [--page docs/field.md]`. Axes, passes and needs follow from the
options of a recipe, on a real model; what is said of its evidence stands in its file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.pages import update
from unisd import recipes
from unisd.config import UniSDConfig
from unisd.console import markdown_table
from unisd.methods.targets import NEGATIVE
from unisd.run.resolve import parse
from unisd.training.plan import STUDENT_NEEDS, Plan

AXES = ("source", "context", "teacher", "target", "weight")
HEADINGS = ("recipe", *AXES, "passes", "needs", "evidence and weakness")
DIVERGENCES = {0.0: "forward KL", 0.5: "JSD", 1.0: "reverse KL"}


def source(config: UniSDConfig) -> str:
    """Who writes the answers, how many a prompt, and which of them carry loss."""
    several = f" x {config.num_generations}" if config.num_generations > 1 else ""
    kept = "" if config.rollout_keep == "all" else f", {config.rollout_keep}"
    return f"{config.completion_source}{several}{kept}"


def context(config: UniSDConfig) -> str:
    """What the teacher is told."""
    if config.distillation_mode == "nll":
        return "-"
    return ", ".join(config.rollout_contexts) or config.teacher_context


def teacher(config: UniSDConfig) -> str:
    """The schedule of its weights."""
    if config.distillation_mode == "nll":
        return "-"
    rate = f" {config.teacher_update_rate:g}" if config.teacher_model_kind == "ema" else ""
    return f"{config.teacher_model_kind}{rate}"


def target(config: UniSDConfig, plan: Plan) -> str:
    """The divergence and what it is taken from, clips, and further terms."""
    if config.distillation_mode == "nll":
        return "likelihood"
    parts = []
    if config.distillation_weight:
        mode = {"topk": f" of the top {config.distillation_topk}", "sampled": ", realised tokens"}
        parts.append(DIVERGENCES[config.distillation_alpha] + mode.get(config.distillation_mode, ""))
    if plan.target is not None:
        parts.append(f"from `{plan.target.name}`")
    parts += [f"`{term.name}`" for term in plan.terms]
    clips = {"entry clip": config.entry_clip, "token clip": config.token_clip}
    parts += [f"{name} {value:g}" for name, value in clips.items() if value is not None]
    return ", ".join(parts)


def passes(config: UniSDConfig, plan: Plan) -> str:
    """Sequences read without gradient for each answer, beside writing it and the student's pass."""
    if config.distillation_mode == "nll":
        return "0"
    extra = bool(STUDENT_NEEDS & plan.needs) + ("negative" in plan.needs)
    extra += len(set(plan.sources) - {NEGATIVE})
    contexts = config.num_auxiliary_contexts if "auxiliary" in plan.needs else 0
    return str(1 + extra + contexts)


def needs(config: UniSDConfig, plan: Plan) -> str:
    """What rows, or the user, must bring."""
    other = config.teacher_context == "other"
    wrong = "negative" in plan.needs or config.teacher_context == "wrong"
    told = config.uses_reference and not (other or config.teacher_context in ("plain", "wrong"))
    found = {
        "references": told,
        "a grader": plan.judged,
        "other problems": other or "auxiliary" in plan.needs,
        "wrong references": wrong,
    }
    return ", ".join(name for name, needed in found.items() if needed) or "prompts"


def line(name: str) -> tuple[str, ...]:
    """A recipe's line of the map."""
    _, config = parse(["--recipe", name, "--model_name_or_path", "some/model"])
    plan = Plan.of(config)
    weights = ", ".join(f"`{weight.name}`" for weight in plan.weights) or "-"
    axes = (source(config), context(config), teacher(config), target(config, plan), weights)
    cost = (passes(config, plan), needs(config, plan), recipes.load(name).evidence)
    return (f"`{name}`", *(cell.replace("|", "/") for cell in (*axes, *cost)))


def content() -> str:
    """The map as a table."""
    return "\n".join(markdown_table(HEADINGS, [line(name) for name in recipes.names()]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the map into its page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=Path("docs/field.md"))
    given = parser.parse_args(arguments)
    update(given.page, "The field as a map", content())
    return 0


if __name__ == "__main__":
    sys.exit(main())
