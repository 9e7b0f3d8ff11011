"""What a run must score, from its options: views, sources, weights that can wait for the student's
own pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from unisd.config import UniSDConfig
from unisd.data.rows import Row
from unisd.errors import UserError
from unisd.methods.registry import WeightFunction
from unisd.methods.targets import NEGATIVE, STUDENT, Source, Target

STUDENT_NEEDS = frozenset({"student", "divergence"})


def normalizer_of(args: UniSDConfig, weights: Sequence[WeightFunction]) -> str:
    """What the token weights are divided by: the user's choice, or as published for the last of
    them.
    """
    published = [weight.normalizer for weight in weights if weight.level == "token"]
    return args.weight_normalizer or (published[-1] if published else "weights")


def drawn_scores(args: UniSDConfig, weights: Sequence[WeightFunction]) -> frozenset[str]:
    """What the student's own rollout tells the weights of it: l, where tokens were drawn from the
    very distribution of the loss.
    """
    wanted = any("student" in weight.needs and not weight.in_forward for weight in weights)
    whole = (
        args.top_p == 1
        and args.top_k == 0
        and args.min_p == 0
        and args.temperature == args.divergence_spec.temperature
    )
    fresh = args.completion_source == "student" and args.num_iterations == 1
    return frozenset({"student"} if wanted and whole and fresh else ())


def in_forward_weights(
    args: UniSDConfig,
    weights: Sequence[WeightFunction],
    drawn: frozenset[str] = frozenset(),
    off_policy: bool = False,
) -> list[WeightFunction]:
    """The weights that wait for the student's training pass, and so cost none of their own.

    Not where the student is scored beforehand anyway (for another weight, a clip quantile or the
    importance ratio, which must not enter the divisor), nor where the divisor is the sum of all
    weights of the step, which must be known before the first gradient (`loss_aggregation=token`
    with normalizer `weights`).
    """
    scored = any((w.needs - drawn) & STUDENT_NEEDS and not w.in_forward for w in weights)
    scored = scored or off_policy or args.token_clip_quantile is not None
    if scored or (args.loss_aggregation == "token" and normalizer_of(args, weights) == "weights"):
        return []
    return [weight for weight in weights if weight.in_forward]


def scored_sources(args: UniSDConfig, target: Target | None) -> list[Source]:
    """The target's sources that need a pass: neither the student's own distribution nor the
    teacher's.
    """
    if target is None:
        return []
    known = (STUDENT, Source("teacher", args.teacher_context))
    sources = [source for source in target.sources if source not in known]
    if any(source.weights == "step" for source in sources) and args.target_reference_steps is None:
        raise UserError(
            f"target {target.name!r} looks at earlier weights of the student: set target_reference_steps."
        )
    return sources


def needed_views(
    args: UniSDConfig,
    weights: Sequence[WeightFunction],
    in_forward: Sequence[WeightFunction] = (),
    sources: Sequence[Source] = (),
    drawn: frozenset[str] = frozenset(),
    off_policy: bool = False,
) -> frozenset[str]:
    """What this run's mechanisms look at; nothing else is scored.

    The student's part of `in_forward` weights comes for free.

    drawn: what the rollout tells (:func:`drawn_scores`). off_policy: the answers are those of other
    weights, or another engine's, and the importance ratio corrects for that.
    """
    needs = frozenset(
        need
        for weight in weights
        for need in weight.needs - (STUDENT_NEEDS if weight in in_forward else drawn)
    )
    if args.agreement_uncertain_share < 1:
        needs |= {"entropy"}
    if args.contrastive_weight or NEGATIVE in sources:
        needs |= {"negative"}
    if args.token_clip_quantile is not None:
        needs |= {"divergence"}
    if off_policy:
        needs |= {"student"}
    return needs


def check_data_serves(needs: frozenset[str], rows: Sequence[Row]) -> None:
    """Raise `UserError` if an active mechanism finds nothing in the data to work with."""
    if "auxiliary" in needs and not any(len(row.get("auxiliary_contexts") or []) >= 2 for row in rows):
        raise UserError(
            "agreement needs auxiliary contexts, but no row has two of them: add a column auxiliary_contexts"
            " (a list of solved examples of other problems), build them with --agreement_contexts retrieval,"
            " or set agreement=none."
        )
    if "negative" in needs and not any(row.get("negative_context") for row in rows):
        raise UserError(
            "contrast needs wrong references, but no row has one: add a column negative_context, build them"
            " with --negatives corrupt, or unset what needs them (contrastive_weight, contrast_weight, the"
            " target contrast)."
        )
