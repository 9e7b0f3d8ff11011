"""The `config.yaml` of a run: the same run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from unisd.cli.main import main
from unisd.errors import UserError
from unisd.files import CONFIG, read_lines
from unisd.run.outputs import choose_output_dir, resolved, write_config
from unisd.run.resolve import parse


def again(folder: Path, *flags: str) -> tuple[Any, Any]:
    """What the file of a run with these flags says, and what the run was told."""
    options, config = parse(flags)
    write_config(folder, options, config)
    return parse(["--config", str(folder / CONFIG)]), (options, config)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--recipe", "sdft", "--model_name_or_path", "some/model", "--use_peft", "--lora_r", "8"],
        ["--token_clip", "0.5", "--num_train_epochs", "2", "--save_steps", "0.5", "--report_to", "none"],
        ["--token_clip_quantile", "none", "--task", "pocket", "--noise", "0.3", "--graft_scales", "0.5", "2"],
        ["--train_file", "rows.jsonl", "--columns", "prompt=a+b", "--optim", "sgd", "--weight_decay", "0.1"],
        ["--chat_template_kwargs", '{"enable_thinking": false}', "--distillation_alpha", "0.25"],
    ],
)
def test_the_file_says_the_same(tmp_path: Path, flags: list[str]) -> None:
    (options, config), (old_options, old_config) = again(tmp_path / "run", *flags)
    new, old = (resolved(*pair) for pair in ((options, config), (old_options, old_config)))
    assert {name: value for name, value in new.items() if value != old[name]} == {}
    # Contexts of the rows' own are left alone as before.
    assert ("agreement_contexts" in options.explicit) == ("agreement_contexts" in old_options.explicit)


def test_what_the_run_took_back_stays_away_and_secrets_are_not_written(tmp_path: Path) -> None:
    options, config = parse(
        ["--hub_token", "hf_secret", "--writer_url", "http://host:1/v1", "--output_dir", "out", "--seed", "7"]
    )
    object.__setattr__(options, "values", {**options.values, "data_files": ["https://me:word@host/rows"]})
    write_config(tmp_path, options, config.changed("no contexts", agreement="none"))
    text = (tmp_path / CONFIG).read_text()
    assert "hf_secret" not in text and "word" not in text and "# hub_token was given" in text
    values = yaml.safe_load(text)
    assert (values["agreement"], values["seed"], values["recipe"]) == ("none", 7, "unisd-star")
    assert "output_dir" not in values and values["writer_url"] == "http://host:1/v1"


def test_a_file_of_the_users_own_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    (folder / CONFIG).write_text("seed: 1\n")
    for flags in (["--overwrite_output_dir"], ["--resume_from_checkpoint"]):
        options, config = parse(["--output_dir", str(folder), *flags])
        with pytest.raises(UserError, match=r"config.yaml was not written by a run.*give it another name"):
            choose_output_dir(options, config, "pocket")
    # What a run has left that was killed before its first step is no other run.
    (folder / "metrics.jsonl").unlink()
    write_config(folder, options, config)
    for flags in ([], ["--overwrite_output_dir"], ["--resume_from_checkpoint"]):
        options, config = parse(["--output_dir", str(folder), *flags])
        assert choose_output_dir(options, config, "pocket") == (folder, None)


@pytest.mark.long
def test_the_same_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    short = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]
    short += ["--max_completion_length", "12", "--eval_max_new_tokens", "12", "--max_eval_rows", "2"]
    assert main(["train", *short, "--max_train_rows", "16", "--output_dir", str(first)]) == 0
    assert "config.yaml" in capsys.readouterr().out
    assert main(["train", "--config", str(first / CONFIG), "--output_dir", str(second)]) == 0
    losses = [[line["loss"] for line in read_lines(run / "metrics.jsonl")] for run in (first, second)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    results = [json.loads((run / "results.json").read_text()) for run in (first, second)]
    assert results[0]["after"] == results[1]["after"] and results[0]["stopped"] is None
