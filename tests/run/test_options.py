"""Where a run's options come from, and what their help says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from unisd.cli.help import help_text
from unisd.data.formats import parse_column_mapping
from unisd.errors import UserError
from unisd.files import read_yaml
from unisd.run.resolve import parse, train_parser


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_without_arguments_star_on_the_pocket() -> None:
    options, config = parse([])
    assert (options.recipe, options.model_name_or_path, options.task) == ("unisd-star", "pocket", "pocket")
    assert options.explicit == frozenset()
    assert config.agreement == "token"


def test_order_of_sources(yaml_file) -> None:
    file = yaml_file("learning_rate: 1e-4\nseed: 3\nmax_steps: 7\n")
    _, config = parse(["--model_name_or_path", "some/model"])
    assert config.learning_rate == 2e-5  # the recipe's
    options, config = parse(["--config", file, "--seed", "5"])
    assert (config.learning_rate, config.seed, config.max_steps) == (1e-4, 5, 7)  # overlay < file < flag
    assert options.explicit == {"learning_rate", "seed", "max_steps"}


def test_the_pocket_overlay_is_for_the_pocket_only() -> None:
    assert parse([])[1].max_steps > 0
    assert parse(["--model_name_or_path", "some/model"])[1].max_steps == -1


def test_the_task_brings_its_prompts_and_cap(yaml_file) -> None:
    _, config = parse([])
    assert (
        config.teacher_prompt_template is not None
        and "{privileged_context}" in config.teacher_prompt_template
    )
    assert config.eval_max_new_tokens == 56
    own = "{prompt}|{privileged_context}"
    assert parse(["--teacher_prompt_template", own])[1].teacher_prompt_template == own
    assert parse(["--train_file", "rows.jsonl"])[1].teacher_prompt_template is None


def test_values_of_a_file_are_converted_like_flags(yaml_file) -> None:
    file = yaml_file(
        "learning_rate: 1e-3\nfeature_layers: [0, 1]\nbf16: no\ntoken_clip_quantile:"
        " null\nlora_target_modules: q_proj\nuse_peft: true\ntrain_file: rows.jsonl\ncolumns: {prompt:"
        " question}\nlr_scheduler_kwargs: {num_cycles: 2}\n"
    )
    options, config = parse(["--config", file])
    assert config.learning_rate == 1e-3
    assert config.feature_layers == [0, 1]
    assert config.token_clip_quantile is None
    assert config.lr_scheduler_kwargs == {"num_cycles": 2}
    assert (options.lora_target_modules, options.columns) == (["q_proj"], "prompt=question")


def test_what_yaml_reads_in_its_own_way_is_what_was_written(yaml_file) -> None:
    file = yaml_file(
        'save_strategy: no\ntrain_file: rows.jsonl\ncolumns: {prompt: "question, in words", completion: g}\n'
    )
    options, config = parse(["--config", file])
    assert config.save_strategy == "no"
    assert parse_column_mapping(options.columns) == {"prompt": "question, in words", "completion": "g"}


def test_a_number_of_the_recipe_can_be_taken_back() -> None:
    assert parse([])[1].token_clip_quantile is not None
    assert parse(["--token_clip_quantile", "none"])[1].token_clip_quantile is None


def test_asking_for_one_clip_replaces_the_recipes_other() -> None:
    _, config = parse(["--token_clip", "0.5"])
    assert (config.token_clip, config.token_clip_quantile) == (0.5, None)
    _, config = parse(["--model_name_or_path", "a/b"])
    assert (config.token_clip, config.token_clip_quantile) == (10.0, None)
    # at which 10 could never bind
    _, config = parse(["--model_name_or_path", "a/b", "--distillation_alpha", "0.5"])
    assert (config.token_clip, config.token_clip_quantile) == (None, 0.99)
    with pytest.raises(UserError, match="can never bind"):
        parse(["--model_name_or_path", "a/b", "--distillation_alpha", "0.5", "--token_clip", "10"])


def test_an_empty_list_of_a_file_is_one(yaml_file) -> None:
    assert parse(["--config", yaml_file("token_weights: []")])[1].token_weights == []


def test_evaluations_come_with_checkpoints() -> None:
    assert parse(["--eval_strategy", "steps", "--save_steps", "40"])[1].eval_steps == 40
    assert parse(["--eval_strategy", "steps", "--eval_steps", "7"])[1].eval_steps == 7


def test_a_merged_key_may_be_given_again(tmp_path: Path) -> None:
    merged = "b: &b {x: 1}\nc:\n  m: &m\n    <<: *b\n    x: 2\nd:\n  <<: *m\n  y: 3\n"
    (tmp_path / "a.yaml").write_text(merged)
    assert read_yaml(tmp_path / "a.yaml") == yaml.safe_load(merged)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", r"run\.yaml: unknown key 'learning_rte': did you mean learning_rate\?"),
        ("max_steps: many", r"run\.yaml: max_steps: invalid int value: 'many'"),
        ("- 1", "must hold a mapping"),
        ("a: [", "is not YAML"),
        ("max_steps: 2\nseed: 1\nmax_steps: 7", "'max_steps' is given twice"),
        ("config: x.yaml", r"unknown key 'config': a file does not name another"),
        ("agreement: tokens", "agreement='tokens' is not one of: none, token, sequence"),
    ],
)
def test_mistakes_in_a_file(yaml_file, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(["--config", yaml_file(text)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_step", "3"], r"unknown flag --max_step: did you mean --max_steps\?"),
        (["rows.jsonl"], "belongs to no flag"),
        (["--max_steps", "x"], "--max_steps: invalid int value"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml cannot be read"),
        (["--task", "pocket", "--train_file", "a"], "task and train_file exclude each other"),
        (["--grader", "number"], "grader belongs to your own rows"),
        (["--train_file", "a", "--noise", "0.1"], "noise belongs to a task"),
        (["--load_in_4bit"], "load_in_4bit needs use_peft"),
        (["--max_eval_rows", "0"], "max_eval_rows=0"),
        (["--lora_r", "8"], "lora_r belongs to an adapter: add --use_peft"),
        (["--use_peft", "--lora_dropout", "2"], r"lora_dropout=2\.0 must be 0 or more and below 1"),
        (["--report_to", "foo"], "report_to='foo' is not one of: none, all, "),
        (["--seed", "-1"], r"seed=-1 is outside \[0, "),
        (["--per_device_train_batch_size", "0"], r"per_device_train_batch_size=0 is outside \[1, "),
        (["--gradient_accumulation_steps", "0"], r"gradient_accumulation_steps=0 is outside \[1, "),
        (
            ["--task", "gsm8k", "--task_options", "short=["],
            r"--task_options 'short=\['.* is not a YAML"
            " value",
        ),
        (["--lr_scheduler_type", "foo"], "not a valid SchedulerType"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(arguments)


def test_help_shows_every_option_once_with_default_and_meaning() -> None:
    parser = train_parser()
    page, everything = help_text(parser, width=100), help_text(parser, everything=True, width=100)
    for name in parser.fields:
        assert everything.count(f"  --{name} [") == 1
    assert (
        "--temperature [0.7]" in page and "--token_clip [unset]" in page and "--recipe [unisd-star]" in page
    )
    assert "--adam_beta1" not in page and "--adam_beta1" in everything
    assert page.index("contrast:") < page.index("--contrastive_margin") < page.index("features:")
    assert max(map(len, page.partition("examples:")[2].splitlines())) <= 100
