"""The table of options: declared once, light to read, and what follows from it."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys

import pytest
from transformers import TrainingArguments

from unisd import UniSDConfig
from unisd.cli.main import COMMANDS, main
from unisd.compat import NEW_NAMES
from unisd.data import contexts, negatives
from unisd.errors import UserError
from unisd.methods.scores import NORMALIZERS
from unisd.options.option import declared
from unisd.options.parser import inherited_names
from unisd.options.table import GROUPS, UniSDOptions
from unisd.run.options import RUN_GROUPS, RunOptions
from unisd.run.resolve import given_by, resolve, shared_names, train_parser

MISSPELT = {
    "train": ("--lerning_rate", "--learning_rate"),
    "probe": ("--max_new_token", "--eval_max_new_tokens"),
    "prepare": ("--num-auxiliary-context", "--num_auxiliary_contexts"),
    "eval": ("--num_sample", "--num_samples"),
    "grade": ("--completion", "--completions"),
    "contamination": ("--colums", "--columns"),
    "study": ("--max_step", "--max_steps"),
    "judge": ("--judge_modell", "--judge_model"),
    "report": ("--figure", "--figures"),
    "recipes": ("unisd-stir", "unisd-star"),
    "merge": ("--output_dirs", "--output_dir"),
    "chat": ("--promt", "--prompt"),
    "completion": ("--hlp", "--help"),
}
NAMES = ["--task", "pockett"], ["--grader", "nubmer"], ["--recipe", "sdtf"], ["--eval_files", "x"]
NEEDED = {
    "judge": ["--judge_url", "http://x"],
    "grade": ["--completions", "c"],
    "report": ["d"],
    "merge": ["d"],
    "chat": ["d"],
    "completion": ["bash"],
}
LIGHT = """\
import contextlib, io, sys
from unisd.cli.main import main

for arguments in {calls}:
    with contextlib.redirect_stdout(io.StringIO()):
        main(arguments)
    heavy = {{"torch", "transformers", "peft", "datasets", "accelerate", "numpy"}} & {{*sys.modules}}
    assert not heavy, (arguments, heavy)
"""


def test_help_and_the_check_of_names_import_nothing_heavy() -> None:
    calls = [[], *([name, "--help"] for name in COMMANDS)]
    calls += [[name, *NEEDED.get(name, []), wrong, "3"][: 2 if name == "recipes" else None]
              for name, (wrong, _) in MISSPELT.items()]  # fmt: skip
    calls += [[name, *wrong] for name in ("train", "study") for wrong in NAMES]
    calls += [[name, *wrong] for name in ("eval", "probe", "prepare", "grade") for wrong in NAMES[:2]]
    calls += [[name, "--task", "pockett"] for name in ("grade", "contamination")]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(calls=calls)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(MISSPELT) == len(COMMANDS)
    assert done.stderr.count("did you mean") == len(calls) - len(COMMANDS) - 1, done.stderr


@pytest.mark.parametrize("command", MISSPELT)
def test_every_command_names_the_nearest_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, right = MISSPELT[command]
    assert main([command, *NEEDED.get(command, []), wrong]) == 2
    said = capsys.readouterr().err
    assert f"{wrong}" in said and f"did you mean {right!r}?" in said.replace(f"{right}?", f"{right!r}?")


@pytest.mark.parametrize(("wrong", "right"), [("--budget_minuts", "--budget_minutes"), ("--job", "--jobs")])
def test_a_study_names_its_own_flags_too(wrong: str, right: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", wrong, "3"]) == 2
    assert f"unknown flag {wrong}: did you mean {right}?" in capsys.readouterr().err


def test_options_of_transformers_are_known_without_it() -> None:
    fields = {item.name for item in dataclasses.fields(TrainingArguments) if item.init}
    assert fields <= inherited_names()
    with pytest.raises(UserError, match=r"unknown flag --adam_bta2: did you mean --adam_beta2\?"):
        from unisd.run.resolve import train_parser

        train_parser().given(["--optim", "sgd", "--adam_bta2", "0.9"])


def test_what_the_table_says_of_transformers_options() -> None:
    """Their order, which help shows, and their defaults but for those that differ on purpose."""
    theirs = {item.name: item.default for item in dataclasses.fields(TrainingArguments)}
    ours = {item.name: item.default for item in declared(UniSDOptions) if item.name in theirs}
    assert list(ours) == [name for name in theirs if name in ours]
    # an alias where the newer name is another: None stands for what that one says
    aliases = {old for old, new in NEW_NAMES.items() if new in theirs and theirs[old] is None}
    assert {name for name in ours if ours[name] != theirs[name]} - aliases == {
        *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
        *("learning_rate", "lr_scheduler_type", "warmup_steps", "logging_steps", "logging_nan_inf_filter"),
        *("ddp_find_unused_parameters", "remove_unused_columns"),
    }


def test_declarations_agree_with_the_code_that_they_are_for() -> None:
    items = {item.name: item for kind in (RunOptions, UniSDOptions) for item in declared(kind)}
    assert items["weight_normalizer"].metadata["choices"] == (None, *NORMALIZERS)
    assert items["agreement_contexts"].metadata["choices"] == contexts.KINDS
    assert items["negatives"].metadata["choices"] == negatives.KINDS
    for name, item in items.items():
        data = item.metadata
        assert data["group"] in (*RUN_GROUPS, *GROUPS) and data["help"]
        assert data["excludes"] is None or data["excludes"] in items
        assert not data["choices"] or item.default in data["choices"], name
        assert item.default is None or item.default is dataclasses.MISSING or _inside(item), name
        assert {*data["shared"]} <= {*COMMANDS}
    assert "seed" in shared_names("probe") and "writer_url" in shared_names("prepare")


def _inside(item: dataclasses.Field) -> bool:
    low, high = item.metadata["range"]
    return not isinstance(item.default, (int, float)) or low <= item.default <= high


def test_choices_ranges_and_exclusions_follow_from_the_table() -> None:
    with pytest.raises(UserError, match=r"^packing='loose' is not one of: auto, packed, padded\.$"):
        UniSDConfig(packing="loose")
    with pytest.raises(UserError, match=r"^top_p=1\.5 is outside \[1e-06, 1\]\.$"):
        UniSDConfig(top_p=1.5)
    with pytest.raises(UserError, match=r"^num_iterations=0 is outside \[1, inf\]\.$"):
        UniSDConfig(num_iterations=0)
    with pytest.raises(
        UserError, match=r"^token_clip and token_clip_quantile exclude each other: unset one of them\.$"
    ):
        UniSDConfig(token_clip=1.0, token_clip_quantile=0.9)
    with pytest.raises(UserError, match=r"^lora_r=0 must be 1 or more\.$"):
        RunOptions(task="pocket", lora_r=0).check()


# -- a config is a value ---------------------------------------------------------------------------


def test_a_change_is_a_copy_that_says_why() -> None:
    config = UniSDConfig(agreement="token")
    other = config.changed("the rows have no contexts", agreement="none")
    assert (config.agreement, config.changes) == ("token", ())
    assert other.agreement == "none"
    assert other.changes == (("agreement", "token", "none", "the rows have no contexts"),)
    assert {**config.to_dict(), "agreement": "none"} == other.to_dict()
    assert other.device is config.device
    again = pickle.loads(pickle.dumps(other))
    assert (again.agreement, again.changes) == (other.agreement, other.changes)
    with pytest.raises(UserError, match="token_clip=-1 is outside"):
        config.changed("a mistake", token_clip=-1)


def test_what_a_run_is_told_cannot_be_overwritten() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunOptions().task = "pocket"


# -- recipes from Python ---------------------------------------------------------------------------


def test_a_recipe_by_name_has_the_settings_for_real_models() -> None:
    config = UniSDConfig.from_recipe("unisd-star", output_dir="out", max_steps=3)
    assert isinstance(config, UniSDConfig) and (config.output_dir, config.max_steps) == ("out", 3)
    assert (config.agreement, config.teacher_model_kind) == ("token", "ema")
    assert (config.learning_rate, config.max_completion_length) == (2e-5, 1024)  # of _published.yaml
    assert config.temperature == 0.7  # not the pocket's 1.0
    assert (config.token_clip, config.token_clip_quantile) == (10.0, None)


def test_overrides_take_the_place_of_what_they_exclude() -> None:
    config = UniSDConfig.from_recipe("unisd-star", token_clip_quantile=0.9)
    assert (config.token_clip, config.token_clip_quantile) == (None, 0.9)


def test_mistakes_in_a_recipe_from_python() -> None:
    with pytest.raises(UserError, match=r"unknown recipe 'unisd-stir': did you mean 'unisd-star'\?"):
        UniSDConfig.from_recipe("unisd-stir")
    with pytest.raises(UserError, match=r"unknown option 'lerning_rate': did you mean learning_rate\?"):
        UniSDConfig.from_recipe("sdft", lerning_rate=1.0)


def test_how_often_to_save_or_evaluate_says_that_it_is_to_be() -> None:
    config = UniSDConfig.from_recipe("sdft", save_steps=3, eval_steps=2)
    assert (config.save_strategy, config.eval_strategy) == ("steps", "steps")
    assert UniSDConfig.from_recipe("sdft", save_steps=3, save_strategy="no").save_strategy == "no"
    options, on_pocket = resolve(parser := train_parser(), given_by(parser, ["--save_steps", "3"]))
    assert options.model_name_or_path == "pocket" and on_pocket.save_strategy == "steps"
