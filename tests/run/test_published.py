"""Each recipe against what is published of its method: on real models, and what the pocket changes.

Sources: arXiv numbers, as in docs/field.md. What is not in a table is the library's default. What
a recipe does otherwise than its paper is said in its file.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from unisd import recipes
from unisd.config import UniSDConfig
from unisd.options.table import UniSDOptions
from unisd.run.resolve import parse

PAPER = "2605.06597"  # UniSD, equations and appendix
AGREEMENT = {"agreement_contexts": "retrieval", "num_auxiliary_contexts": 3, "agreement_gamma": 0.01}
OPSD = {"teacher_model_kind": "base", "distillation_alpha": 0.0, "entry_clip": 0.05}
FORWARD, REVERSE, JSD = 0.0, 1.0, 0.5
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": (
        "likelihood of the references",
        {"completion_source": "reference", "distillation_mode": "nll", "teacher_model_kind": "live"},
    ),
    "ssd": (
        "likelihood of the initial model's own answers, with a temperature and truncation of their own",
        {"completion_source": "initial", "distillation_mode": "nll", "temperature": 1.0, "top_p": 0.95},
    ),
    "gkd": (
        "GKD: half on-policy, generalised JSD",
        {"completion_source": "mixture", "on_policy_share": 0.5, "distillation_alpha": JSD},
    ),
    "sdft": (
        "SDFT: forward KL, EMA after each step at a rate from 0.01 to 0.05",
        {"teacher_model_kind": "ema", "teacher_update_rate": 0.02, "distillation_alpha": FORWARD},
    ),
    "opsd": ("OPSD, as its author recommends after ablation; its first version has JSD", OPSD),
    "dash": (
        "2608.06243",
        {**OPSD, "token_weights": ["dash:kappa=5.0"], "weight_normalizer": "tokens"},
    ),
    "pw-opsd": (
        "2605.21606",
        {
            **OPSD,
            "token_weights": ["position:w_min=0.25,tau=0.30,s=0.10"],
            "weight_normalizer": "tokens",
        },
    ),
    "opsd-ectr": (
        "2606.11709: forward KL of the top 100 with a tail, mean over tokens",
        {
            **OPSD,
            "distillation_mode": "topk",
            "distillation_topk": 100,
            "distillation_add_tail": True,
            "distillation_topk_support": "teacher",
            "target": "contrast:a=0.5,floor=-5.0",
            "token_weights": ["contrast_weight"],
            "weight_normalizer": "tokens",
            "loss_aggregation": "token",
        },
    ),
    "avsd": (
        "2605.20643: realised tokens",
        {
            "distillation_mode": "sampled",
            "distillation_alpha": REVERSE,
            "target": "view_consensus:views=full+half+answer",
        },
    ),
    "demopsd": (
        "2607.02502: reverse KL, EMA",
        {
            "teacher_model_kind": "ema",
            "teacher_update_rate": 0.05,
            "distillation_alpha": REVERSE,
            "target": "geometric:source=teacher/plain,mixing=disagreement,a_max=0.15,beta=50",
        },
    ),
    "purified-opsd": ("2607.02234", {"distillation_alpha": FORWARD, "target": "pmi:c=10.0,beta=1.0"}),
    "unisd-agree-seq": (PAPER, {"agreement": "sequence", **AGREEMENT}),
    "unisd-agree-tok": (PAPER, {"agreement": "token", **AGREEMENT}),
    "unisd-corroborate": (
        "ours",
        {
            "token_weights": ["corroboration"],
            "agreement_contexts": "retrieval",
            "num_auxiliary_contexts": 3,
        },
    ),
    "unisd-ema": (PAPER, {"teacher_model_kind": "ema", "teacher_update_rate": 0.02}),
    "unisd-contrast": (PAPER, {"contrastive_weight": 0.1, "contrastive_margin": 0.5}),
    "unisd-match": (PAPER, {"feature_weight": 0.1}),
    "unisd-match-repr": (PAPER, {"feature_weight": 1.0, "distillation_weight": 0.0}),
    "unisd-clip": (PAPER, {"token_clip": 10.0}),
    "unisd-star": (
        PAPER,
        {
            "agreement": "token",
            **AGREEMENT,
            "teacher_model_kind": "ema",
            "teacher_update_rate": 0.02,
            "contrastive_weight": 0.01,
            "contrastive_margin": 0.1,
            "feature_weight": 0.01,
            "token_clip": 10.0,
        },
    ),
    "sdpo": (
        "2601.20802, code of TRL 1.16",
        {
            "num_generations": 8,
            "rollout_contexts": ["sibling", "feedback", "none"],
            "teacher_model_kind": "ema",
            "teacher_update_rate": 0.05,
            "distillation_alpha": JSD,
            "distillation_mode": "topk",
            "distillation_topk": 100,
            "distillation_add_tail": True,
            "distillation_topk_support": "student",
            "learning_rate": 1e-5,
        },
    ),
    "oasis": (
        "2609.37915",
        {
            "num_generations": 8,
            "rollout_keep": "shortest_passed",
            "rollout_contexts": ["sibling", "none"],
            "distillation_alpha": FORWARD,
        },
    ),
    "nsd": (
        "2609.11699",
        {"teacher_context": "plain", "distillation_weight": 0.0, "terms": ["nsd:kl=0.01"]},
    ),
    "op2sd": ("2608.09228", {"teacher_context": "other", "agreement_contexts": "retrieval"}),
    "semi-opd": ("2610.11291", {"completion_source": "initial"}),
    "other-solution": ("a control", {"teacher_context": "other", "agreement_contexts": "random"}),
    "rejection-sft": (
        "a control",
        {
            "num_generations": 4,
            "rollout_keep": "passed",
            "distillation_mode": "nll",
            "teacher_model_kind": "live",
        },
    ),
}
STAR = METHODS["unisd-star"][1]
METHODS |= {
    "reference-free": ("a control", {**STAR, "teacher_context": "plain"}),
    "wrong-reference": ("a control", {**STAR, "teacher_context": "wrong", "contrastive_weight": 0.0}),
}
SHARED = {
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "temperature": 0.7,
    "max_completion_length": 1024,
}
# On the pocket, beside steps, batches and rates. The divergence is JSD where nothing else stands.
CLIP = {"token_clip": None, "token_clip_quantile": 0.998}
POCKET: dict[str, dict[str, Any]] = {
    **{name: {"distillation_alpha": FORWARD} for name in ("opsd", "dash", "pw-opsd", "opsd-ectr")},
    "avsd": {"distillation_alpha": REVERSE},
    "demopsd": {"distillation_alpha": REVERSE, "teacher_update_rate": 0.005},
    "sdft": {"teacher_update_rate": 0.005},
    "unisd-ema": {"teacher_update_rate": 0.005},
    "unisd-agree-seq": {"agreement_gamma": 1.0},
    "unisd-agree-tok": {"agreement_gamma": 1.0},
    "unisd-clip": CLIP,
    "sdpo": {"teacher_update_rate": 0.005},
    "oasis": {"distillation_alpha": FORWARD},
    **{
        name: {"teacher_update_rate": 0.005, **CLIP}
        for name in ("unisd-star", "reference-free", "wrong-reference")
    },
}
OF_METHODS = {field.name for field in dataclasses.fields(UniSDOptions)} | {"agreement_contexts"}
# of the run, not of a method
RUN = {"temperature", "max_completion_length", "rollout_batch_size", "eval_max_new_tokens"}
RUN |= {"teacher_prompt_template", "auxiliary_prompt_template"}  # the task's


# the pocket's steps, batches and rates
SMALL = {"max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"}
SMALL |= {"save_strategy"}


def found(name: str, model: str) -> dict[str, Any]:
    options, config = parse(["--recipe", name, "--model_name_or_path", model])
    return {**vars(config), "agreement_contexts": options.agreement_contexts}


def test_every_recipe_has_its_source() -> None:
    assert sorted(METHODS) == recipes.names() and POCKET.keys() <= METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_recipes_are_as_published(name: str) -> None:
    _, published = METHODS[name]
    ours, default = found(name, "some/model"), {**vars(UniSDConfig()), "agreement_contexts": "columns"}
    expected = {"teacher_model_kind": "base"} | published
    assert {key: ours[key] for key in expected} == expected
    shared = {key: value for key, value in SHARED.items() if key not in published}
    assert {key: ours[key] for key in shared} == shared
    rest = OF_METHODS - expected.keys() - RUN
    assert {key: ours[key] for key in rest} == {key: default[key] for key in rest}


@pytest.mark.parametrize("name", METHODS)
def test_the_pocket_changes_what_the_table_says(name: str) -> None:
    ours, real = found(name, "pocket"), found(name, "some/model")
    changed = {"distillation_alpha": JSD} | POCKET.get(name, {})
    rest = OF_METHODS - changed.keys() - RUN - SMALL
    assert {key: ours[key] for key in changed} == changed
    assert {key: ours[key] for key in rest} == {key: real[key] for key in rest}


@pytest.mark.parametrize("name", METHODS)
def test_another_divergence_on_the_pocket_is_said(name: str) -> None:
    ours, real, description = found(name, "pocket"), found(name, "some/model"), recipes.load(name).description
    divergence = ours["distillation_mode"] != "nll" and ours["distillation_weight"] > 0
    other = divergence and ours["distillation_alpha"] != real["distillation_alpha"]
    assert ("on the pocket Jensen-Shannon" in description) == other


@pytest.mark.parametrize("model", ["pocket", "some/model"])
def test_ema_alone_has_the_rate_of_star(model: str) -> None:
    alone, star = found("unisd-ema", model), found("unisd-star", model)
    assert alone["teacher_update_rate"] == star["teacher_update_rate"]
