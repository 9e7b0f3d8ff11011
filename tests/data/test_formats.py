"""Layouts of rows that other projects use: each is read whole, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.helpers import templates
from unisd import tasks, testing
from unisd.cli.main import main
from unisd.data.formats import parse_column_mapping
from unisd.data.prompts import PromptBuilder, encode_prompt
from unisd.data.rendering import render
from unisd.data.rows import load_rows
from unisd.errors import UserError
from unisd.run.inputs import load_data
from unisd.run.options import RunOptions

Rows = list[dict[str, Any]]
ALPACA = [
    {"instruction": "Translate into French.", "input": "The cat sleeps.", "output": "Le chat dort."},
    {"instruction": "Translate into French.", "input": "The dog barks.", "output": "Le chien aboie."},
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
]
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


def turns(number: int, role: str = "role", text: str = "content", names: Any = ("user", "assistant")) -> Any:
    return [{role: names[0], text: f"Weather in {number}?"}, {role: names[1], text: "sunny"}]


MESSAGES = [{"messages": turns(i)} for i in range(3)]
SHARED = [{"conversations": turns(i, "from", "value", ("human", "gpt"))} for i in range(3)]
OURS = [{"prompt": f"{i}?", "privileged_context": "r", "answer": "r"} for i in range(3)]
CSV = "prompt,privileged_context,answer\n" + "".join(f"{i}?,r,r\n" for i in range(3))

# name -> rows or text of the file, its ending, the mapping, what is said (None: all rows are read)
FORMATS: dict[str, tuple[Any, str, str | None, str | None]] = {
    "ours": (OURS, "jsonl", None, None),
    "json": (OURS, "json", None, None),
    "csv": (CSV, "csv", None, None),
    "csv, semicolons": (CSV.replace(",", ";"), "csv", None, None),
    "csv, tabs": (CSV.replace(",", "\t"), "csv", None, None),
    "alpaca": (ALPACA, "json", None, "prompt{}=instruction+input"),
    "alpaca, mapped": (ALPACA, "json", "prompt=instruction+input,privileged_context=output", None),
    "messages": (MESSAGES, "jsonl", None, "prompt{}=messages"),
    "messages, mapped": (MESSAGES, "jsonl", "prompt=messages", None),
    "conversations": (SHARED, "jsonl", None, "prompt{}=conversations"),
    "conversations, mapped": (SHARED, "jsonl", "prompt=conversations", None),
    "a tool speaks": (
        [*SHARED, {"conversations": turns(3, "from", "value", ("human", "observation"))}],
        "jsonl",
        "prompt=conversations",
        "row 3 of {file}: a turn comes from 'observation', and only human, user, gpt,",
    ),
    "tools": ([row | {"tools": [TOOL]} for row in MESSAGES], "jsonl", "prompt=messages", None),
    "tools as text": ([row | {"tools": json.dumps([TOOL])} for row in OURS], "jsonl", None, None),
    "tools that are none": (
        [row | {"tools": "hammer"} for row in OURS],
        "jsonl",
        None,
        "row 0 of {file}: tools is 'hammer' (str), a list of descriptions of functions is needed",
    ),
    "system": ([row | {"system": "Be brief."} for row in OURS], "jsonl", None, None),
    "system twice": (
        [{"system": "a", "prompt": [{"role": "system", "content": "b"}, *turns(0)], "answer": "c"}],
        "jsonl",
        None,
        "row 0 of {file}: there is a column system, and prompt has a system turn of its own: keep one",
    ),
    "csv, broken": ("prompt,answer\na,b,c\n", "csv", None, "{file}, line 2 has 3 cells and the header 2"),
    "nan": ('{"prompt": NaN}', "jsonl", None, "{file}, line 1 is not JSON: NaN is no number of JSON"),
    "half a character": ('{"prompt": "\\ud83d"}', "jsonl", None, "{file}, line 1: 'prompt' holds half a"),
}  # fmt: skip
TRAINING = ("train", "probe", "prepare", "study")
GRADING = ("eval", "grade")


def write(path: Path, content: Any, ending: str) -> Path:
    file = path / f"rows.{ending}"
    if ending == "jsonl" and not isinstance(content, str):
        content = "".join(json.dumps(row) + "\n" for row in content)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def arguments(command: str, file: Path, columns: str | None) -> list[str]:
    if command in TRAINING:
        dry = {"train": ["--dry_run"], "study": ["--dry_run", "--seeds", "1", "--mechanisms", "ema"]}
        mapped = ["--columns", columns] if columns else []
        return [command, "--train_file", str(file), *mapped, *dry.get(command, [])]
    mapping = parse_column_mapping(columns)
    names = {
        "prompt_column": mapping.get("prompt", "prompt"),
        "answer_column": mapping.get("privileged_context", "answer"),
    }
    given = [
        "--data_files",
        str(file),
        "--task_options",
        *(f"{name}={value}" for name, value in names.items()),
    ]
    if command == "eval":
        return ["eval", "--task", "jsonl", *given]
    (file.parent / "theirs.jsonl").write_text('{"completion": "r"}\n' * 3)
    return ["grade", "jsonl", *given, "--completions", str(file.parent / "theirs.jsonl")]


@pytest.fixture()
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end where the rows have been read, and a model would be."""

    def stop(*_: Any, **__: Any) -> Any:
        raise UserError("the rows are read")

    for place in ("unisd.run.train.load_model", "unisd.run.inputs.load_model", "unisd.cli.evaluate.load_any"):
        monkeypatch.setattr(place, stop)


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize("command", [*TRAINING, *GRADING])
@pytest.mark.parametrize("name", FORMATS)
def test_all_commands_read_the_same_layouts(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    content, ending, columns, told = FORMATS[name]
    file = write(tmp_path, content, ending)
    code = main(arguments(command, file, columns))
    said = capsys.readouterr().err
    if told is not None:
        option = "_column" if command in GRADING else ""
        assert code == 2 and told.format(option, file=file) in said
        assert said.count("\n") == said.count("error: ") == 1
    elif command in ("study", "grade"):
        assert code == 0
    else:
        assert code == 2 and said.endswith("unisd: error: the rows are read\n")


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name][-1] is None])
def test_no_row_is_lost(tmp_path: Path, name: str) -> None:
    content, ending, columns, _ = FORMATS[name]
    file = write(tmp_path, content, ending)
    data = load_data(RunOptions(train_file=str(file), columns=columns))
    assert len(data.train) + len(data.evaluation) == 3
    mapping = parse_column_mapping(columns)
    answer = mapping.get("privileged_context", "answer")
    prompt = mapping.get("prompt", "prompt")
    task = tasks.get("jsonl", data_files=str(file), prompt_column=prompt, answer_column=answer)
    rows = task.load("all")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in load_rows(file, columns)]
    assert all(task.grade(row, row["answer"]).correct for row in rows) and len(rows) == 3


# ---------------------------------------------------------------- columns


def test_an_instruction_keeps_its_input(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path, ALPACA, "json")
    rows = load_rows(file, "prompt=instruction+input,privileged_context=output")
    assert [row["prompt"] for row in rows] == [
        "Translate into French.\n\nThe cat sleeps.",
        "Translate into French.\n\nThe dog barks.",
        "Name a colour.",
    ]
    assert not caplog.text
    hint = r"no column 'prompt': .* pass --columns prompt=instruction\+input,privileged_context=output\."
    with pytest.raises(UserError, match=hint):
        load_rows(file)
    with pytest.raises(UserError, match="only texts are joined: map b alone, or make it a text"):
        load_rows([{"a": "x", "b": ["y"], "completion": "z"}], "prompt=a+b")
    assert load_rows([{"a+b": "x", "completion": "z"}], "prompt=a+b")[0]["prompt"] == "x"


@pytest.mark.parametrize("column", ["input", "context", "documents"])
def test_text_that_no_prompt_shows_is_named(caplog: pytest.LogCaptureFixture, column: str) -> None:
    rows = [{"question": f"{i}?", column: "text" if i else "", "completion": "z"} for i in range(3)]
    load_rows(rows, "prompt=question", name="mine.csv")
    assert [record.getMessage() for record in caplog.records] == [
        f"mine.csv: no prompt shows the column {column} (2 of 3 rows have it): join it"
        f" (prompt=question+{column}), or remove it."
    ]


@pytest.mark.parametrize(
    ("text", "mapping"),
    [
        ("prompt=a, completion = b", {"prompt": "a", "completion": "b"}),
        ('prompt="a, in words",completion=b', {"prompt": "a, in words", "completion": "b"}),
        ('{prompt: "a, in words", completion: b}', {"prompt": "a, in words", "completion": "b"}),
        ("prompt=a=b", {"prompt": "a=b"}),
    ],
)
def test_names_of_columns(text: str, mapping: dict[str, str]) -> None:
    assert parse_column_mapping(text) == mapping


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "prompt=a, in words",
            "'in words' is not of the form ours=theirs .* a name that holds a comma is put",
        ),
        ("prompt=a,prompt=b", r"prompt is given twice: to join columns write prompt=a\+b"),
        ("{prompt", "is no YAML mapping such as {prompt: question}"),
    ],
)
def test_mappings_that_are_none(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse_column_mapping(text)


def test_duplicates_are_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": f"{i % 4}?", "completion": "z", "id": i} for i in range(10)]
    assert len(load_rows(rows, name="mine.jsonl")) == 10
    assert [record.getMessage() for record in caplog.records] == [
        "mine.jsonl: 6 of 10 rows are exact duplicates of others, and count as often: remove them if that is"
        " not meant."
    ]


# ---------------------------------------------------------------- system and tools

SHOWS_TOOLS = (
    "{% if tools %}{% for tool in tools %}<tool>{{ tool.function.name }}</tool>{% endfor %}{% endif %}"
    + templates.CHATML
)


def test_tools_are_shown_to_student_and_teachers() -> None:
    row = load_rows(
        [{"prompt": "w", "tools": [TOOL], "system": "s", "completion": "y", "negative_context": "n",
          "auxiliary_contexts": ["e"]}]
    )[0]  # fmt: skip
    again = load_rows([row])[0]
    assert again == row and "tools" not in row and "system" not in row
    tokenizer = templates.tokenizer(SHOWS_TOOLS)
    shown = "<tool>get_weather</tool>"
    for layout in ("append", "turn"):
        builder = PromptBuilder(tokenizer, layout)
        views = [
            builder.student(row),
            builder.teacher(row),
            builder.negative(row),
            *builder.auxiliary(row, 1),
        ]
        views.append(builder.at_level(row, "unconditioned") or [])
        assert all(tokenizer.decode(ids).count(shown) == 1 for ids in views)
    without = templates.tokenizer(templates.CHATML)
    with pytest.raises(UserError, match="the chat template does not show the tools of the row: give"):
        encode_prompt(without, row["prompt"])
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(testing.tokenizer(chat=False), row["prompt"])


def test_a_template_that_raises_whatever_it_does() -> None:
    tokenizer = templates.tokenizer("{{ 1 / 0 }}")
    with pytest.raises(UserError, match=r"the chat template refuses the prompt \(division by zero\)"):
        render(tokenizer, [{"role": "user", "content": "a"}])


def test_columns_of_any_kind_are_looked_at(caplog):
    rows = [
        {"prompt": "a", "privileged_context": "b", "meta": {1: 2, "a": 3}, "context": numpy.array([1, 2])},
        {"prompt": "a", "privileged_context": "b", "meta": {1: 2, "a": 3}, "context": numpy.array([])},
    ]
    assert len(load_rows(rows)) == 2
    assert "no prompt shows the column context (1 of 2 rows have it)" in caplog.text
