"""The studies of the paper's table: they read, and are of the runs that their heads promise."""

import re

import pytest
import yaml

from unisd import recipes
from unisd.run.resolve import resolve, train_parser
from unisd.study import design

FOLDER = recipes.FOLDER / "paper"
STUDIES = sorted(FOLDER.glob("study-*.yaml"))


def test_every_model_has_the_same_study_and_the_readme_its_hours() -> None:
    models = {
        file.stem.removesuffix("-mbpp"): yaml.safe_load(file.read_text(encoding="utf-8"))[
            "model_name_or_path"
        ]
        for file in FOLDER.glob("*-mbpp.yaml")
    }
    assert {file.stem.removeprefix("study-") for file in STUDIES} == models.keys()
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    texts = set()
    for short, model in models.items():
        text = (FOLDER / f"study-{short}.yaml").read_text(encoding="utf-8")
        texts.add(text.replace(model, "MODEL").replace(short, "SHORT"))
        assert f"model_name_or_path: {model}\n" in text
        assert re.search(rf"\| `study-{re.escape(short)}\.yaml` \| \d+ \|", readme)
    assert len(texts) == 1


@pytest.mark.long
def test_a_study_has_valid_runs_of_the_published_setting_and_as_many_as_it_says() -> None:
    runs = design.runs_of(design.load(STUDIES[0]))
    assert f"= {len(runs)} runs." in STUDIES[0].read_text(encoding="utf-8")
    cells = {run.cell.name: run.options for run in runs if run.task == "mbpp" and run.seed == 1}
    assert {"reference", "control sft 2e-05", "control reference-free", "+method=sdft"} <= cells.keys()
    for name, options in cells.items():
        of_run = {key: value for key, value in options.items() if key != "graft_scales"}
        run, config = resolve(train_parser(), {**of_run, "bf16": False})  # a CPU refuses it
        answers = config.per_device_train_batch_size * config.num_generations
        assert answers * config.gradient_accumulation_steps == 16, name
        assert run.use_peft and (config.learning_rate == 2e-5 or name.startswith("control sft"))
