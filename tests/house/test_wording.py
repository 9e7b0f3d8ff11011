"""Errors name options as they are given: `--name` to a command, `name=` in Python."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import unisd
from unisd import UniSDConfig, UserError
from unisd import testing as tiny
from unisd.errors import by_caller, flag, worded_for_command
from unisd.options.option import declared
from unisd.options.table import UniSDOptions
from unisd.run.options import RunOptions

PACKAGE = Path(unisd.__file__).parent
ONLY_COMMANDS = ("cli/", "report/", "study/", "run/", "options/parser.py", "__init__.py")
IN_PYTHON_TOO = {f"run/{name}.py" for name in ("changes", "measure", "python", "retention")}
ALONE = {
    "evaluation/audit.py": "of `unisd grade`",
    "evaluation/judge.py": "of `unisd judge`",
    "evaluation/teacher_probe.py": "of `unisd probe`",
    "rollout/vllm/server.py": "options of `vllm serve`",
}
OPTIONS = {item.name for kind in (UniSDOptions, RunOptions) for item in declared(kind)}
FLAG = re.compile(r"--(\w+)")


def flags_in(text: str) -> Iterator[str]:
    """Our flags in the strings of a module, but for docstrings and what is worded for commands."""
    tree = ast.parse(text)
    silent: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            silent.add(id(node.value))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "by_caller":
            silent |= {id(part) for part in ast.walk(node.args[0])}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            names = OPTIONS | {"base", "scale", "max_new_tokens"}
            yield from (name for name in FLAG.findall(node.value) if name in names)


def test_what_python_can_reach_names_no_flags() -> None:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name in ALONE or (name.startswith(ONLY_COMMANDS) and name not in IN_PYTHON_TOO):
            continue
        text = path.read_text(encoding="utf-8")
        if FLAG.search(text) and (flags := list(flags_in(text))):
            found[name] = flags
    # `task_options` is a flag alone, which is taken apart there
    assert found == {"tasks/__init__.py": ["task_options", "task_options"]}


def test_a_flag_in_a_string_is_found() -> None:
    text = '"""--seed"""\nraise UserError(f"give --seed {by_caller(\'--grader\', \'grader\')} or --dir")'
    assert list(flags_in(text)) == ["seed"]


def test_two_wordings() -> None:
    assert (flag("grader"), flag("columns", "a=b")) == ("grader=", 'columns="a=b"')
    with worded_for_command():
        assert (flag("grader"), flag("columns", "a=b")) == ("--grader", "--columns a=b")
    assert by_caller("command", "Python") == "Python"


def broken_options() -> Iterator[dict[str, Any]]:
    """Every option of the table that has a range or choices, with a value beyond."""
    for item in declared(UniSDOptions):
        low, high = item.metadata["range"]
        if item.metadata["choices"]:
            yield {item.name: "nonsense"}
        elif (low, high) != (-float("inf"), float("inf")):
            yield {item.name: low - 1 if low > -float("inf") else high + 1}
        if item.metadata["excludes"]:
            yield {item.name: 0.5, item.metadata["excludes"]: 0.5}


def test_no_flag_in_an_error_about_a_value() -> None:
    for given in broken_options():
        with pytest.raises(UserError) as caught:
            UniSDConfig(**given)
        assert next(iter(given)) in str(caught.value) and "--" not in str(caught.value), given


PLAIN_ROWS = [{"prompt": "What is 1 + 1?", "privileged_context": "It is 2."}] * 8


@pytest.mark.parametrize(
    ("mistake", "by_python", "by_command"),
    [
        (lambda path: UniSDConfig(fsdp="full_shard"), "`accelerate launch`", "--accelerate_config fsdp2"),
        (
            lambda path: tiny.trainer(path, train_dataset=PLAIN_ROWS, agreement="token"),
            'prepare(rows, agreement_contexts="retrieval")',
            "--agreement_contexts retrieval",
        ),
        (
            lambda path: tiny.trainer(path, train_dataset=PLAIN_ROWS, contrastive_weight=0.1),
            'prepare(rows, negatives="corrupt")',
            "--negatives corrupt",
        ),
        (
            lambda path: tiny.trainer(path, train_dataset=PLAIN_ROWS, teacher_context="wrong"),
            'prepare(rows, negatives="corrupt")',
            "--negatives corrupt",
        ),
        (lambda path: tiny.trainer(path, rollout_contexts=["feedback"]), "give grader.", "give --grader,"),
        (lambda path: tiny.trainer(path, eval_on_start=True), "give eval_dataset", "set eval_strategy"),
        (lambda path: unisd.load_rows([{"promt": "p", "gold": "g"}]), 'columns="prompt', "--columns prompt"),
        (lambda path: unisd.get_task("jsonl"), "data_files=", "--data_files"),
    ],
)  # fmt: skip
def test_each_caller_reads_its_own_words(
    tmp_path: Path, mistake: Callable[[Path], Any], by_python: str, by_command: str
) -> None:
    with pytest.raises(UserError) as caught:
        mistake(tmp_path)
    assert by_python in str(caught.value) and "--" not in str(caught.value)
    with worded_for_command(), pytest.raises(UserError) as caught:
        mistake(tmp_path)
    assert by_command in str(caught.value) and by_python not in str(caught.value)
