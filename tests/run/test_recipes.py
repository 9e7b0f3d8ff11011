"""Recipes are data: each loads, names existing options only, and resolves to a valid configuration
on both kinds of model.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from unisd import recipes
from unisd.cli.main import main
from unisd.config import UniSDConfig
from unisd.errors import UserError
from unisd.methods.registry import parse_weight
from unisd.methods.targets import parse_target
from unisd.run.resolve import parse

FIELD = ("dash", "pw-opsd", "avsd", "opsd-ectr", "demopsd", "purified-opsd")
# of the rows, but part of a method
FIELDS = {field.name for field in dataclasses.fields(UniSDConfig)} | {"agreement_contexts"}


@pytest.mark.parametrize("name", recipes.names())
def test_recipe_holds_valid_options(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.description.endswith(".")
    assert set(recipe.options) | set(recipe.pocket) <= FIELDS
    for model in ("pocket", "some/model"):
        options, config = parse(["--recipe", name, "--model_name_or_path", model])
        assert options.recipe == name
        config.check()
        for weight in config.reliability_weights:
            parse_weight(weight)
        if config.target is not None:
            assert parse_target(config.target).sources


def test_published_methods_are_there() -> None:
    mechanisms = ("agree-seq", "agree-tok", "ema", "contrast", "match", "match-repr", "clip", "star")
    assert {"sft", "ssd", "gkd", "sdft", "opsd", *(f"unisd-{name}" for name in mechanisms)} <= set(
        recipes.names()
    )
    assert set(FIELD) <= set(recipes.names())


@pytest.mark.parametrize("model", ["pocket", "some/model"])
def test_star_has_all_five(model: str) -> None:
    _, config = parse(["--recipe", "unisd-star", "--model_name_or_path", model])
    assert config.agreement == "token" and config.agreement_gamma > 0 and config.num_auxiliary_contexts >= 2
    assert config.teacher_model_kind == "ema"
    assert config.contrastive_weight > 0
    assert config.feature_weight > 0 and config.distillation_weight == 1
    assert (config.token_clip is None) != (config.token_clip_quantile is None)


def test_published_values_of_star() -> None:
    _, config = parse(["--recipe", "unisd-star", "--model_name_or_path", "some/model"])
    assert (config.agreement_gamma, config.contrastive_weight, config.contrastive_margin) == (0.01, 0.01, 0.1)
    assert (config.feature_weight, config.teacher_update_rate, config.token_clip) == (0.01, 0.02, 10.0)
    assert config.distillation_alpha == 0 and config.learning_rate == 2e-5


def test_published_values_of_the_field() -> None:
    """Hyper-parameters as the papers give them, and the published divisor of each weight."""
    found = {name: parse(["--recipe", name, "--model_name_or_path", "some/model"])[1] for name in FIELD}
    weights = {name: [parse_weight(text) for text in config.token_weights] for name, config in found.items()}
    targets = {name: parse_target(config.target) for name, config in found.items() if config.target}
    assert weights["dash"][0].options == {"kappa": 5.0} and found["dash"].entry_clip == 0.05
    assert found["dash"].distillation_alpha == 0 and found["dash"].weight_normalizer == "tokens"
    assert weights["pw-opsd"][0].options == {"w_min": 0.25, "tau": 0.30, "s": 0.10}
    assert tuple(map(str, targets["avsd"].sources)) == ("teacher/full", "teacher/half", "teacher/answer")
    assert (found["avsd"].distillation_mode, found["avsd"].distillation_alpha) == ("sampled", 1.0)
    assert (
        targets["opsd-ectr"].options == {"a": 0.5, "floor": -5.0}
        and weights["opsd-ectr"][0].name == "contrast_weight"
    )
    assert (
        targets["demopsd"].options["a_max"] == 0.15 and targets["demopsd"].options["mixing"] == "disagreement"
    )
    assert (found["demopsd"].teacher_model_kind, found["demopsd"].distillation_alpha) == ("ema", 1.0)
    assert targets["purified-opsd"].options == {"c": 10.0, "beta": 1.0}


@pytest.mark.long
@pytest.mark.parametrize("name", FIELD)
def test_recipes_of_the_field_run(name: str, tmp_path: Path) -> None:
    """Two short steps on the pocket model; every weight and target is active."""
    small = [
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "4",
        "--gradient_accumulation_steps",
        "1",
        "--max_eval_rows",
        "2",
    ]
    assert (
        main(["train", "--recipe", name, *small, "--max_train_rows", "16", "--output_dir", str(tmp_path)])
        == 0
    )
    lines = [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(lines) == 2 and all(
        math.isfinite(line["loss"]) and line["teacher/divergence"] != 0 for line in lines
    )
    _, config = parse(["--recipe", name])
    assert all(f"weight/{text.partition(':')[0]}/mean" in lines[0] for text in config.token_weights)


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
    switches = (
        "agreement",
        "teacher_model_kind",
        "contrastive_weight",
        "feature_weight",
        "token_clip",
        "entry_clip",
    )
    assert [switch for switch in switches if getattr(config, switch) != getattr(default, switch)] == [
        mechanism
    ]


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'unisd-star'"):
        recipes.load("unisd-sta")
    with pytest.raises(UserError, match="there are: avsd"):
        recipes.load("zzz")


def test_a_recipe_of_your_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From Python and by the command; what its values are laid over is the same."""
    file = tmp_path / "mine.yaml"
    file.write_text("based_on: unisd-star\noptions: {temperature: 0.9, agreement_gamma: 1e-1}\n")
    config = UniSDConfig.from_recipe(str(file), learning_rate=1e-3)
    options, parsed = parse(["--recipe", str(file), "--model", "some/model", "--learning_rate", "1e-3"])
    assert options.recipe == str(file)
    for name in recipes.load(str(file)).options.keys() & FIELDS - {"agreement_contexts"}:
        assert getattr(config, name) == getattr(parsed, name), name
    assert (config.temperature, config.agreement_gamma, config.learning_rate) == (0.9, 0.1, 1e-3)
    assert config.teacher_model_kind == "ema" and config.max_completion_length == 1024


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("options: {lerning_rate: 1}", "unknown option 'lerning_rate': did you mean learning_rate"),
        ("options: {learning_rate: fast}", "mine.yaml: learning_rate: invalid float value: 'fast'"),
        ("learning_rate: 1", "mine.yaml is not a recipe: it has 'learning_rate' beside description"),
        ("- 1", "mine.yaml is not a recipe: put its values under the key options"),
        ("based_on: unisd-stir", "based_on is 'unisd-stir': name one of"),
        ("a: [", "mine.yaml cannot be read: "),
    ],
)
def test_mistakes_in_a_recipe_of_your_own(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        UniSDConfig.from_recipe(str(tmp_path / "mine.yaml"))
    assert told in str(caught.value) and "--" not in str(caught.value)
    with pytest.raises(UserError, match=r"gone\.yaml cannot be read"):
        recipes.load(str(tmp_path / "gone.yaml"))


def test_what_a_recipe_says_of_rows_is_for_prepare() -> None:
    with pytest.raises(UserError, match=r"'agreement_contexts': unisd\.prepare takes it"):
        UniSDConfig.from_recipe("sdft", agreement_contexts="random")
