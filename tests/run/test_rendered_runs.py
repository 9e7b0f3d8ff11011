"""Runs and commands on models whose chat templates think, refuse, strip, or write the date."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers import templates
from unisd import testing as tiny
from unisd.cli.main import main
from unisd.config import UniSDConfig
from unisd.data import rendering
from unisd.run.baseline import key_of
from unisd.run.inputs import RunData
from unisd.run.options import RunOptions

OFF = '{"enable_thinking": false}'
SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]


def saved(folder: Path, template: str) -> str:
    tokenizer = templates.tokenizer(template)
    sizes = tiny.SIZES | {"vocab_size": len(tokenizer)}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said of a command that is refused, beside notes on the model."""
    capsys.readouterr()  # of making the model
    assert main(list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, lines
    return lines[0]


def train(path: Path, template: str, *rows: dict[str, Any]) -> list[str]:
    file = path / "rows.jsonl"
    plain = [{"prompt": f"q{i}", "privileged_context": "a"} for i in range(2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in (*plain, *rows)))
    command = ["train", "--model_name_or_path", saved(path / "model", template), "--dry_run", "--use_cpu"]
    command += ["--recipe", "sdft", "--max_completion_length", "16"]
    return [*command, "--train_file", str(file), "--eval_file", str(file), "--output_dir", str(path / "run")]


def test_rows_that_the_template_refuses_or_cuts_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": SYSTEM, "privileged_context": "a"}
    line = told(capsys, *train(tmp_path, templates.NO_SYSTEM, row))
    assert "rows.jsonl, line 3: the chat template refuses the prompt (System role not supported)" in line
    line = told(capsys, *train(tmp_path, templates.DROPS_SYSTEM, row))
    assert "rows.jsonl, line 3: the chat template leaves a turn of the prompt out" in line
    thought = {"prompt": "How many?", "privileged_context": "<think>2+2</think>Four."}
    command = train(tmp_path, templates.THINKING, thought)
    line = told(capsys, *command, "--teacher_prompt_layout", "turn")
    assert "rows.jsonl, line 3: the chat template leaves the reference, or a part of it, out" in line
    assert "set teacher_prompt_layout=append" in line


def test_options_of_the_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = train(tmp_path, templates.CHATML)
    for name in ("chat_template_kwargs", "teacher_chat_template_kwargs"):
        line = told(capsys, *command, f"--{name}", OFF)
        assert f"{name}: the chat template does not read 'enable_thinking': correct or remove it" in line
    folder = str(tmp_path / "model")
    for other in (["chat", folder, "--prompt", "q"], ["eval", "--model", folder, "--max_eval_rows", "2"]):
        assert "does not read 'enable_thinking'" in told(capsys, *other, "--chat_template_kwargs", OFF)


def test_student_and_teacher_have_options_of_their_own(tmp_path: Path) -> None:
    tokenizer = templates.tokenizer(templates.THINKING)
    built = tiny.trainer(
        tmp_path / "run",
        processing_class=tokenizer,
        chat_template_kwargs={"enable_thinking": False},
        teacher_chat_template_kwargs={"enable_thinking": True},
    )
    row = built.rows[0]
    assert tokenizer.decode(built.prompts.student(row)).endswith("</think>\n\n")
    assert tokenizer.decode(built.prompts.teacher(row)).endswith("assistant\n")
    built.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved["chat_template_kwargs"] == {"enable_thinking": False}


def test_what_is_measured_before_depends_on_options_and_date() -> None:
    data = RunData("d", [], [])
    args = UniSDConfig(output_dir="x", use_cpu=True)
    keys = {key_of(RunOptions(), args, data, part) for part in ({}, {"a": 1}, {"a": 2})}
    assert len(keys) == 3


@pytest.mark.long
def test_a_run_that_goes_on_tomorrow_reads_the_same_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(day: int, **options: Any) -> Any:
        monkeypatch.setattr(rendering, "_STARTED", datetime(2026, 1, day, 12))
        tokenizer = templates.tokenizer(templates.DATED)
        options |= {"save_strategy": "steps", "save_steps": 1, "processing_class": tokenizer}
        return tiny.trainer(tmp_path / "run", **options)

    def prompt(trainer: Any) -> str:
        return str(trainer.processing_class.decode(trainer.prompts.student(trainer.rows[0])))

    first = built(30, max_steps=1)
    first.train()
    assert prompt(first).startswith("It is 30 Jan 2026.")
    second = built(31, max_steps=2)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 2 and prompt(second) == prompt(first)
