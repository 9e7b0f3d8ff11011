"""Layouts of rows that other projects use: each is read whole, or refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
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
from unisd.run.resolve import check_own_rows, given_by, train_parser
from unisd.tasks.graders import get_grader

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
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bonn"}'}}
SPOKEN = [  # what messages may hold beside one question and one answer
    {"messages": [{"role": "system", "content": "Be brief."}, *turns(0)]},
    {"messages": [{"role": "developer", "content": "Be brief."}, *turns(1), *turns(2)]},
    {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "Weather"}, {"type": "text", "text": "in 3?"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny", "tool_calls": None},
        {"role": "assistant", "content": "It is sunny."},
    ]},
]  # fmt: skip
PAIRS = {
    "prompt/response": ("prompt", "response"),
    "question/answer": ("question", "answer"),
}
CSV = "prompt,privileged_context,answer\n" + "".join(f"{i}?,r,r\n" for i in range(3))

# name -> rows or text of the file, its ending, the mapping, what is said (None: all rows are read)
FORMATS: dict[str, tuple[Any, str, str | None, str | None]] = {
    "ours": (OURS, "jsonl", None, None),
    "json": (OURS, "json", None, None),
    "csv": (CSV, "csv", None, None),
    "csv, semicolons": (CSV.replace(",", ";"), "csv", None, None),
    "csv, tabs": (CSV.replace(",", "\t"), "csv", None, None),
    "alpaca": (ALPACA, "json", None, None),
    "alpaca, mapped": (ALPACA, "json", "prompt=instruction+input,privileged_context=output", None),
    "messages": (MESSAGES, "jsonl", None, None),
    "messages of all kinds": (SPOKEN, "jsonl", None, None),
    "messages as text": (
        [{"messages": json.dumps(row["messages"])} for row in MESSAGES], "jsonl", None, None
    ),
    "messages, mapped": (MESSAGES, "jsonl", "prompt=messages", None),
    "conversations": (SHARED, "jsonl", None, None),
    **{name: ([{a: f"{i}?", b: "r"} for i in range(3)], "jsonl", None, None)
       for name, (a, b) in PAIRS.items()},
    "csv, windows": (CSV.replace("r,r", "\xe9,\xe9"), "csv", None, None),
    "conversations, mapped": (SHARED, "jsonl", "prompt=conversations", None),
    "a stranger speaks": (
        [*SHARED, {"conversations": turns(3, "from", "value", ("human", "narrator"))}],
        "jsonl",
        None,
        "{file}, line 4: a turn comes from 'narrator', and only human, user, gpt,",
    ),
    "a call that is none": (
        [*SPOKEN, {"messages": [*turns(0)[:1], {"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": "{"}}]}]}],
        "jsonl",
        None,
        "{file}, line 4: a tool call holds '{{' (str), a JSON object is needed: fix or remove the row",
    ),
    "tools": ([row | {"tools": [TOOL]} for row in MESSAGES], "jsonl", "prompt=messages", None),
    "tools as text": ([row | {"tools": json.dumps([TOOL])} for row in OURS], "jsonl", None, None),
    "tools that are none": (
        [row | {"tools": "hammer"} for row in OURS],
        "jsonl",
        None,
        "{file}, line 1: tools is 'hammer' (str), a list of descriptions of functions is needed",
    ),
    "system": ([row | {"system": "Be brief."} for row in OURS], "jsonl", None, None),
    "system twice": (
        [{"system": "a", "prompt": [{"role": "system", "content": "b"}, *turns(0)], "answer": "c"}],
        "jsonl",
        None,
        "{file}, line 1: there is a column system, and prompt also has a system turn: keep one",
    ),
    "csv, broken": ("prompt,answer\na,b,c\n", "csv", None, "{file}, line 2 has 3 cells and the header 2"),
    "nan": ('{"prompt": NaN}', "jsonl", None, "{file}, line 1 is not JSON: NaN is not a JSON number"),
    "half a character": ('{"prompt": "\\ud83d"}', "jsonl", None, "{file}, line 1: 'prompt' holds half a"),
}  # fmt: skip
TRAINING = ("train", "probe", "prepare", "study")
GRADING = ("eval", "grade")


def write(path: Path, content: Any, ending: str) -> Path:
    file = path / f"rows.{ending}"
    if ending == "jsonl" and not isinstance(content, str):
        content = "".join(json.dumps(row) + "\n" for row in content)
    text = content if isinstance(content, str) else json.dumps(content)
    file.write_text(text, encoding="cp1252" if "\xe9" in text else "utf-8")
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
    return ["grade", "--task", "jsonl", *given, "--completions", str(file.parent / "theirs.jsonl")]


@pytest.fixture()
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end where the rows have been read, and a model would be."""

    def stop(*_: Any, **__: Any) -> Any:
        raise UserError("the rows are read")

    for place in ("unisd.run.train.load_model", "unisd.run.inputs.load_model", "unisd.cli.eval.load_any"):
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
        errors = [line for line in said.splitlines() if not line.startswith("note: ")]
        assert len(errors) == 1 and errors[0].startswith("unisd: error: ")
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
    named = {"prompt_column": "prompt", "answer_column": "privileged_context"}
    named = {option: mapping[ours] for option, ours in named.items() if ours in mapping}
    task = tasks.get("jsonl", data_files=str(file), **named)
    rows = task.load("all")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in load_rows(file, columns)]
    assert all(task.grade(row, row["answer"]).correct for row in rows) and len(rows) == 3


# ---------------------------------------------------------------- what is read, and what is said


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (ALPACA, "alpaca (prompt = instruction + input, reference = output)"),
        (SPOKEN, "messages (prompt = messages, reference = the answer that ends it)"),
        (SHARED, "ShareGPT (prompt = conversations, reference = the answer that ends it)"),
        ([{"prompt": "p", "response": "r"}], "prompt/response (prompt = prompt, reference = response)"),
        ([{"prompt": "p", "completion": "r"}], None),
        (OURS, None),
    ],
)
def test_a_layout_is_said_in_one_line(caplog: pytest.LogCaptureFixture, rows: Rows, told: str | None) -> None:
    found = load_rows(rows, name="mine.json")
    assert len(found) == len(rows) and all(row["privileged_context"] for row in found)
    said = [f"mine.json: read as: {told}; columns= says otherwise."] if told else []
    assert [record.getMessage() for record in caplog.records] == said
    caplog.clear()
    assert load_rows(found) == found and not caplog.records  # a trainer looks at them again


def test_what_messages_hold_is_kept() -> None:
    brief, developer, tool = load_rows(SPOKEN)
    assert brief["prompt"][0]["role"] == "system" and brief["completion"] == "sunny"
    assert [turn["role"] for turn in developer["prompt"]] == ["developer", "user", "assistant", "user"]
    assert tool["prompt"] == [{"role": "user", "content": "Weather\nin 3?"}]
    call, result, answer = tool["completion_turns"]
    assert call["content"] == "" and call["tool_calls"][0]["function"]["arguments"] == {"city": "Bonn"}
    assert result == {"role": "tool", "content": "sunny"} and answer["content"] == tool["completion"]
    as_text = [{"messages": json.dumps(row["messages"])} for row in SPOKEN]
    assert load_rows(as_text) == [brief, developer, tool]
    shared = {"conversations": [
        {"from": "human", "value": "Weather in 3?"},
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Bonn"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "It is sunny."},
    ]}  # fmt: skip
    assert load_rows([shared])[0]["completion_turns"] == tool["completion_turns"]
    last = load_rows([{"messages": SPOKEN[2]["messages"][:2]}])[0]
    assert last["completion"] == '{"name": "get_weather", "arguments": {"city": "Bonn"}}'
    assert len(last["completion_turns"]) == 1
    assert get_grader("call")(last["completion"], get_grader("call").gold_of(last, last["completion"]))


def test_columns_override_a_layout(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"question": "q", "answer": "4", "rationale": "2 + 2", "messages": turns(0)}]
    assert load_rows(rows, "prompt=question,privileged_context=rationale")[0]["privileged_context"] == "2 + 2"
    assert not caplog.records
    assert load_rows(rows, "prompt=question")[0]["privileged_context"] == "4"  # the rest is found
    assert load_rows(rows)[0]["completion"] == "sunny"
    assert load_rows(ALPACA, "prompt=instruction")[0]["prompt"] == "Translate into French."


@pytest.mark.parametrize(
    ("rows", "columns", "told"),
    [
        (
            [{"promt": "a", "gold": "b"}],
            None,
            "mine.jsonl has no columns 'prompt' and 'privileged_context': its columns are promt, gold; pass"
            ' columns="prompt=promt,privileged_context=NAME" (NAME: the column that holds it).',
        ),
        (
            [{"Question": "a", "Answer": "b"}],
            "prompt=qestion,negative_context=wrong",
            "mine.jsonl has no columns 'qestion' (mapped to 'prompt') and 'wrong' (mapped to"
            " 'negative_context') and 'privileged_context': its columns are Question, Answer; pass"
            ' columns="prompt=Question,negative_context=NAME,privileged_context=Answer" (NAME: the column'
            " that holds it).",
        ),
        (
            [{"prompt": "a", "golden_answer": "b"}],
            None,
            "mine.jsonl has no column 'privileged_context': its columns are prompt, golden_answer; pass"
            ' columns="privileged_context=golden_answer".',
        ),
    ],
)
def test_all_that_is_wrong_with_columns_is_one_line(rows: Rows, columns: str | None, told: str) -> None:
    with pytest.raises(UserError) as caught:
        load_rows(rows, columns, name="mine.jsonl")
    assert str(caught.value) == told


def test_columns_are_told_before_torch_is_there(tmp_path: Path) -> None:
    write(tmp_path, [{"text": "a"}], "jsonl")
    code = (
        "import sys; from unisd.cli.main import main;"
        " code = main(['train', '--train_file', 'rows.jsonl', '--columns', 'id=nr']);"
        " sys.exit(code if not {'torch', 'transformers', 'datasets'} & set(sys.modules) else 1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(
        "unisd: error: rows.jsonl has no columns 'nr' (mapped to 'id') and 'prompt'"
    )


def test_a_recipe_without_references_needs_none_at_once_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, [{"prompt": "a"}, {"prompt": "b"}], "jsonl")
    parser = train_parser()
    check_own_rows(parser, given_by(parser, ["--train_file", str(file), "--recipe", "ssd"]))
    with pytest.raises(UserError, match="no column 'privileged_context'"):
        check_own_rows(parser, given_by(parser, ["--train_file", str(file), "--recipe", "sdft"]))
    monkeypatch.setattr("unisd.run.own_rows.LOOKED_AT", 1)  # read when the run reads it
    check_own_rows(parser, given_by(parser, ["--train_file", str(file), "--recipe", "sdft"]))


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
    with pytest.raises(UserError, match="only texts can be joined: map only b, or make it a text"):
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
        ("{prompt", "is not a YAML mapping such as {prompt: question}"),
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


SHOWS_CALLS = templates.CHATML.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or () %}{{ c.function | tojson }}{% endfor %}"
)


def test_calls_and_developer_turns_are_shown() -> None:
    _, developer, tool = load_rows(SPOKEN)
    chat = [*tool["prompt"], *tool["completion_turns"]]
    shown = '{"name": "get_weather", "arguments": {"city": "Bonn"}}'
    assert shown in render(templates.tokenizer(SHOWS_CALLS), chat, answering=False)
    with pytest.raises(UserError, match="the chat template does not show the tool calls of the row: give"):
        render(templates.tokenizer(templates.CHATML), chat, answering=False)
    strict = "{% for m in messages if m.role == 'developer' %}{{ raise_exception('who?') }}{% endfor %}"
    text = render(templates.tokenizer(strict + templates.CHATML), developer["prompt"])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")


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
