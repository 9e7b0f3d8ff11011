"""Recipes are data: each loads, names existing options only, and resolves to a valid configuration on both kinds of model."""

from __future__ import annotations

import dataclasses

import pytest

from unisd import recipes
from unisd.config import UniSDConfig
from unisd.errors import UserError
from unisd.parsing import parse

FIELDS = {field.name for field in dataclasses.fields(UniSDConfig)}


@pytest.mark.parametrize("name", recipes.names())
def test_recipe_holds_valid_options(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.description.endswith(".")
    assert set(recipe.options) | set(recipe.pocket) <= FIELDS
    for model in ("pocket", "some/model"):
        options, config = parse(["--recipe", name, "--model_name_or_path", model])
        assert options.recipe == name
        config.check()


def test_published_methods_are_there() -> None:
    mechanisms = ("agree-seq", "agree-tok", "ema", "contrast", "match", "match-repr", "clip", "star")
    assert {"sft", "ssd", "gkd", "sdft", "opsd", *(f"unisd-{name}" for name in mechanisms)} <= set(recipes.names())


@pytest.mark.parametrize("model", ["pocket", "some/model"])
def test_star_has_all_five(model: str) -> None:
    _, config = parse(["--recipe", "unisd-star", "--model_name_or_path", model])
    assert config.agreement == "token" and config.agreement_gamma > 0 and config.num_auxiliary_contexts >= 2
    assert config.teacher_model_kind == "ema"
    assert config.contrastive_weight > 0
    assert config.feature_weight > 0 and not config.feature_only
    assert (config.token_clip is None) != (config.token_clip_quantile is None)


def test_published_values_of_star() -> None:
    _, config = parse(["--recipe", "unisd-star", "--model_name_or_path", "some/model"])
    assert (config.agreement_gamma, config.contrastive_weight, config.contrastive_margin) == (0.01, 0.01, 0.1)
    assert (config.feature_weight, config.teacher_update_rate, config.token_clip) == (0.01, 0.02, 10.0)
    assert config.distillation_alpha == 0 and config.learning_rate == 2e-5


@pytest.mark.parametrize(
    ("name", "mechanism"),
    [
        ("unisd-agree-seq", "agreement"),
        ("unisd-agree-tok", "agreement"),
        ("unisd-ema", "teacher_model_kind"),
        ("unisd-contrast", "contrastive_weight"),
        ("unisd-match", "feature_weight"),
        ("unisd-clip", "token_clip"),
    ],
)
def test_single_mechanism_recipes_change_one_mechanism(name: str, mechanism: str) -> None:
    _, config = parse(["--recipe", name, "--model_name_or_path", "some/model"])
    default = UniSDConfig()
    switches = ("agreement", "teacher_model_kind", "contrastive_weight", "feature_weight", "token_clip", "entry_clip")
    assert [switch for switch in switches if getattr(config, switch) != getattr(default, switch)] == [mechanism]


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'unisd-star'"):
        recipes.load("unisd-sta")
    with pytest.raises(UserError, match="there are: gkd"):
        recipes.load("zzz")
