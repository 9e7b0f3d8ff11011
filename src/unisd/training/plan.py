"""What a run scores and weighs, from its options: one frozen `Plan`."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from unisd.config import UniSDConfig
from unisd.data.privilege import built_by
from unisd.data.rows import Row
from unisd.errors import UserError
from unisd.methods.registry import Term, WeightFunction, parse_term, parse_weight
from unisd.methods.targets import NEGATIVE, SAME, STUDENT, Source, Target, parse_target
from unisd.rollout.vllm.common import logps_compare

STUDENT_NEEDS = frozenset({"student", "divergence"})
OF_THE_REALISED_TOKEN = frozenset({"student", "auxiliary"})

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a run scores and weighs: follows from its options and the engine that samples."""

    weights: tuple[WeightFunction, ...]
    deferred: tuple[WeightFunction, ...]  # of them those that wait for the student's training pass
    normalizer: str  # what the token weights are divided by
    terms: tuple[Term, ...]  # of the loss, beside the divergence
    target: Target | None
    sources: tuple[Source, ...]  # of the target: those that need a pass of their own
    # the answers are those of other weights, or of another engine, which the importance ratio
    # corrects
    off_policy: bool
    rollout_logps: bool  # the rollout tells the student's log-probabilities to the weights
    judged: bool  # each answer gets a verdict before it is scored
    needs: frozenset[str]  # what the mechanisms look at; nothing else is scored

    @classmethod
    def of(cls, args: UniSDConfig, engine: object = None) -> Plan:
        """engine: what the caller gives (a function that wraps one tells no log-probabilities);
        None: the one that the options name.
        """
        weights = tuple(parse_weight(spec) for spec in args.reliability_weights)
        target = None if args.target is None else parse_target(args.target)
        other_engine = engine is not None or args.use_vllm
        compares = (
            logps_compare(args)
            if args.use_vllm and engine is None
            else getattr(engine, "returns_logps", False)
        )
        off_policy = (args.num_iterations > 1 or compares) and args.importance_cap is not None
        rollout_logps = not other_engine and _rollout_tells(args, weights)
        deferred = _deferred(args, weights, rollout_logps, off_policy)
        plan = cls(
            weights=weights,
            deferred=deferred,
            normalizer=_normalizer(args, weights),
            terms=loss_terms(args),
            target=target,
            sources=_scored_sources(args, target),
            off_policy=off_policy,
            rollout_logps=rollout_logps,
            judged=args.needs_verdicts or any("verdict" in weight.needs for weight in weights),
            needs=frozenset(),
        )
        plan = replace(plan, needs=needed_scores(args, plan))
        _check_used(args, plan)
        return plan


def without_weight(args: UniSDConfig, plan: Plan, weight: WeightFunction) -> Plan:
    """The plan without one of its reliability weights, on the scores that it has asked for."""
    kept = tuple(other for other in plan.weights if other is not weight)
    deferred = tuple(other for other in plan.deferred if other is not weight)
    return replace(plan, weights=kept, deferred=deferred, normalizer=_normalizer(args, kept))


def planned_steps(args: UniSDConfig, rows: int) -> int:
    """Optimizer steps of a run from its first to its last, on all processes together."""
    if args.max_steps > 0:
        return int(args.max_steps)
    batch, ranks, together = args.train_batch_size, int(args.world_size), args.gradient_accumulation_steps
    if args.num_iterations > 1:  # full steps, each of them several times
        per_step = batch * together * ranks
        rows = rows // per_step * per_step * args.num_iterations
    batches = rows // batch if args.dataloader_drop_last else -(-rows // batch)
    batches = batches // ranks if args.dataloader_drop_last else -(-batches // ranks)
    per_epoch: int = max(1, -(-batches // together))
    return math.ceil(args.num_train_epochs * per_epoch)


def loss_terms(args: UniSDConfig) -> tuple[Term, ...]:
    """The terms of the loss beside the divergence: those with options of their own, then the
    others.
    """
    specs = list(args.terms)
    if args.feature_weight:
        specs.insert(0, f"features:coefficient={args.feature_weight}")
    if args.contrastive_weight:
        specs.insert(0, f"contrast:coefficient={args.contrastive_weight},margin={args.contrastive_margin}")
    terms = tuple(map(parse_term, specs))
    names = [term.name for term in terms]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"loss term {twice[0]!r} is given twice: leave one of them out.")
    return terms


def _normalizer(args: UniSDConfig, weights: Sequence[WeightFunction]) -> str:
    """What the token weights are divided by: the user's choice, or as published for the last of
    them.
    """
    published = [weight.normalizer for weight in weights if weight.level == "token"]
    return args.weight_normalizer or (published[-1] if published else "weights")


def _rollout_tells(args: UniSDConfig, weights: Sequence[WeightFunction]) -> bool:
    """Whether the student's own rollout tells the weights all that they ask of it: l, where tokens
    are sampled from the very distribution of the loss.
    """
    wanted = any("student" in weight.needs and not weight.in_forward for weight in weights)
    whole = (
        args.top_p == 1
        and args.top_k == 0
        and args.min_p == 0
        and args.temperature == args.divergence_spec.temperature
    )
    fresh = args.completion_source == "student" and args.num_iterations == 1
    return wanted and whole and fresh


def _deferred(
    args: UniSDConfig, weights: Sequence[WeightFunction], rollout_logps: bool, off_policy: bool
) -> tuple[WeightFunction, ...]:
    """The weights that wait for the student's training pass, and so cost none of their own.

    Not where the student is scored beforehand anyway (for another weight, a clip quantile or the
    importance ratio, which must not enter the divisor), nor where the divisor is the sum of all
    weights of the step, which must be known before the first gradient (`loss_aggregation=token`
    with normalizer `weights`).
    """
    told = frozenset({"student"} if rollout_logps else ())
    scored = any((w.needs - told) & STUDENT_NEEDS and not w.in_forward for w in weights)
    scored = scored or off_policy or args.token_clip_quantile is not None
    if scored or (args.loss_aggregation == "token" and _normalizer(args, weights) == "weights"):
        return ()
    return tuple(weight for weight in weights if weight.in_forward)


def _scored_sources(args: UniSDConfig, target: Target | None) -> tuple[Source, ...]:
    """The target's sources that need a pass: neither the student's own distribution nor the
    teacher's.
    """
    if target is None:
        return ()
    known = (STUDENT, *_teachers_own(args))
    sources = tuple(source for source in target.sources if source not in known)
    if any(source.weights == "step" for source in sources) and args.target_reference_steps is None:
        raise UserError(
            f"target {target.name!r} looks at earlier weights of the student: set target_reference_steps."
        )
    return sources


def _teachers_own(args: UniSDConfig) -> tuple[Source, ...]:
    """The names of the teacher's own distribution; a step's answers that it sees have no level."""
    level = () if args.rollout_contexts else (Source("teacher", args.teacher_context),)
    return (Source("teacher", SAME), *level)


def needed_scores(args: UniSDConfig, plan: Plan) -> frozenset[str]:
    """What the mechanisms look at; the student's part of deferred weights comes for free."""
    told = frozenset({"student"} if plan.rollout_logps else ())
    needs = frozenset(
        need
        for weight in plan.weights
        for need in weight.needs - (STUDENT_NEEDS if weight in plan.deferred else told)
    )
    if args.agreement_uncertain_share < 1:
        needs |= {"entropy"}
    if NEGATIVE in plan.sources or any("negative" in term.needs for term in plan.terms):
        needs |= {"negative"}
    if args.token_clip_quantile is not None:
        needs |= {"divergence"}
    if plan.off_policy:
        needs |= {"student"}
    return needs


def _check_used(args: UniSDConfig, plan: Plan) -> None:
    """Tell of an option that nothing looks at; raise `UserError` for one that leaves nothing.

    The former may be of all cells of a study, of which some lack what reads it.
    """
    if args.feature_layers and not any("hidden" in term.needs for term in plan.terms):
        logger.warning("feature_layers has no effect: it says what feature_weight matches, which is 0.")
    if args.target_reference_steps is not None and not any(s.weights == "step" for s in plan.sources):
        logger.warning("target_reference_steps has no effect: the target looks at no earlier weights.")
    parts = (plan.weights, plan.terms, plan.target, args.token_clip, args.token_clip_quantile)
    if args.diagnostics_gradient_steps is not None and not any(parts):
        logger.warning("diagnostics_gradient_steps has no effect: there is no mechanism to leave out.")
    if plan.target is not None and plan.target.name == "geometric":
        [source] = plan.target.sources
        if source in _teachers_own(args):
            raise UserError(
                f"target geometric mixes the teacher with itself: {source} is what the teacher sees: name"
                " another source."
            )
    reading = [weight.name for weight in plan.weights if weight.needs & OF_THE_REALISED_TOKEN]
    if args.divergence_spec.topk_estimator == "residual" and reading:
        raise UserError(
            "topk_estimator=residual is unbiased only with weights that do not depend on the token that was"
            f" drawn: unset {reading[0]}."
        )
    if args.teacher_context == "wrong" and "negative" in plan.needs:
        raise UserError(
            "teacher_context=wrong shows the teacher what contrast leads away from, so that the two do not"
            " differ: unset what compares them (contrastive_weight, contrast_weight, the target contrast, the"
            " term nsd)."
        )
    if not args.num_auxiliary_contexts and "auxiliary" in plan.needs:
        raise UserError(
            f"num_auxiliary_contexts=0 shows no context to {_of_contexts(plan)}: raise it, or unset that."
        )


def _of_contexts(plan: Plan) -> str:
    """The weights that look at auxiliary contexts."""
    return " and ".join(weight.name for weight in plan.weights if "auxiliary" in weight.needs)


def check_data_serves(plan: Plan, rows: Sequence[Row]) -> None:
    """Raise `UserError` if an active mechanism finds nothing in the data to work with."""
    needs = plan.needs
    least = 2 if any(weight.name.startswith("agreement") for weight in plan.weights) else 1
    if "auxiliary" in needs and not any(len(row.get("auxiliary_contexts") or []) >= least for row in rows):
        many = "two of them" if least == 2 else "any"
        remedy = "set agreement=none" if least == 2 else "unset token_weights"
        raise UserError(
            f"{_of_contexts(plan)} needs auxiliary contexts, but no row has {many}: add a column"
            " auxiliary_contexts (a list of solved examples of other problems), build them with"
            f" {built_by('agreement_contexts', 'retrieval')}, or {remedy}."
        )
    if "negative" in needs and not any(row.get("negative_context") for row in rows):
        raise UserError(
            "contrast needs wrong references, but no row has one: add a column negative_context, build them"
            f" with {built_by('negatives', 'corrupt')}, or unset what needs them (contrastive_weight,"
            " contrast_weight, the target contrast, the term nsd)."
        )
