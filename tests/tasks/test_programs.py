"""The grader `code`, short of running anything: which tests it takes, which program it finds."""

import json
import random
import time
from pathlib import Path

import pytest

from unisd import tasks
from unisd.cli.main import main
from unisd.errors import UserError
from unisd.run.inputs import load_data
from unisd.run.options import RunOptions
from unisd.tasks.graders import GRADERS
from unisd.tasks.graders.programs import read_gold, read_program

TABLES = Path(__file__).parent / "tables"
TESTS = "assert double(2) == 4"
RIGHT = "def double(x):\n    return 2 * x"


# ---------------------------------------------------------------- gold


@pytest.mark.parametrize(
    ("gold", "source"),
    [
        (TESTS, TESTS),
        ([TESTS, "assert double(0) == 0"], f"{TESTS}\nassert double(0) == 0"),
        ((TESTS,), TESTS),
        (json.dumps([TESTS, "assert double(0) == 0"]), f"{TESTS}\nassert double(0) == 0"),
        (["for x in (1, 2):", "    assert double(x) == 2 * x"], None),
        (f"    {TESTS}\n    assert double(0) == 0", f"{TESTS}\nassert double(0) == 0"),
        ("assert f('a\\r\\nb')\r\nassert g()\r\n", "assert f('a\\r\\nb')\nassert g()\n"),
    ],
)
def test_tests_are_a_text_or_a_list_of_texts(gold, source):
    assert read_gold(gold) == ("\n".join(gold) if source is None else source)


@pytest.mark.parametrize(
    ("gold", "said"),
    [
        (4, "not int '4'"),
        (None, "not NoneType 'None'"),
        ({"test": TESTS}, "not dict"),
        (True, "not bool"),
        ([TESTS, 4, None], "not a list with NoneType, int in it"),
        ([[TESTS]], "not a list with list in it"),
        ("", "these are empty"),
        (" \n", "these are empty"),
        ([], "these are empty"),
        (["", " "], "these are empty"),
        ("assert double(2 == 4", "these are not Python ('(' was never closed"),
        ("It should double.", "these are not Python"),
        (["assert f()", "then"], None),
    ],
)
def test_other_gold_is_refused_before_anything_runs(gold, said, monkeypatch):
    monkeypatch.setattr("unisd.tasks.sandbox.run_program", lambda *a, **k: pytest.fail("it ran"))
    if said is None:
        assert read_gold(gold) == "assert f()\nthen"
        return
    with pytest.raises(UserError) as error:
        GRADERS["code"](RIGHT, gold)
    assert str(error.value).startswith("code takes tests in Python, a text or a list of texts")
    assert said in str(error.value)


ADD, SUB = "def add(a, b):\n    return a + b\n", "def sub(a, b):\n    return a - b\n"
ROWS = {
    "lists": [
        {"id": "a", "prompt": "p", "answer": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]},
        {"id": "b", "prompt": "q", "answer": ["assert sub(3, 2) == 1"]},
    ],
    "a column": [
        {"id": "a", "prompt": "p", "answer": ADD, "tests": "assert add(1, 2) == 3"},
        {"id": "b", "prompt": "q", "answer": SUB, "tests": "assert sub(3, 2) == 1"},
    ],
    "a column of lists": [
        {"id": "a", "prompt": "p", "answer": ADD, "tests": ["assert add(1, 2) == 3"]},
        {"id": "b", "prompt": "q", "answer": SUB, "tests": ["assert sub(3, 2) == 1"]},
    ],
}


@pytest.mark.sandbox
@pytest.mark.parametrize("form", ROWS)
def test_own_rows_are_graded_alike_by_task_command_and_training(form, tmp_path):
    file, answers, out = (tmp_path / name for name in ("rows.jsonl", "answers.jsonl", "out.jsonl"))
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[form]))
    wrong = "```python\ndef add(a, b):\n    return 'wrong'\n```"
    texts = [{"id": "a", "completion": wrong}, {"id": "b", "completion": f"```python\n{SUB}```"}]
    answers.write_text("".join(json.dumps(text) + "\n" for text in texts))
    command = ["grade", "--task", "jsonl", "--data_files", str(file), "--grader", "code"]
    assert main([*command, "--completions", str(answers), "--rows", str(out)]) == 0
    assert [json.loads(line)["correct"] for line in out.read_text().splitlines()] == [False, True]
    task = tasks.get("jsonl", data_files=str(file), grader="code")
    rows = task.load("all")
    assert [task.grade(row, text["completion"]).correct for row, text in zip(rows, texts, strict=True)] == [
        False,
        True,
    ]
    if "tests" in ROWS[form][0]:
        alone = [{k: v for k, v in row.items() if k != "answer"} for row in ROWS[form]]
        file.write_text("".join(json.dumps(row) + "\n" for row in alone))
        task = tasks.get("jsonl", data_files=str(file), grader="code")
        assert task.grade(task.load("all")[1], texts[1]["completion"]).correct
        given = [{**row, "privileged_context": "r"} for row in ROWS[form]]
        file.write_text("".join(json.dumps(row) + "\n" for row in given))
        grader = load_data(RunOptions(train_file=str(file), grader="code")).grade
        assert grader is not None
        assert [bool(grader(row, t["completion"])) for row, t in zip(given, texts, strict=True)] == [
            False,
            True,
        ]


# ---------------------------------------------------------------- which program


def fence(code, info="python", mark="```"):
    return f"{mark}{info}\n{code}\n{mark}"


FOUND = [
    (
        "last of several",
        f"{fence('def double(x): return 3')}\nBetter:\n{fence(RIGHT)}",
        RIGHT,
        "fenced block",
    ),
    ("named by the tests", f"{fence(RIGHT)}\n{fence('def triple(x): return 3 * x')}", RIGHT, "fenced block"),
    ("use of it", f"{fence(RIGHT)}\nUse it:\n{fence('print(double(2))')}", RIGHT, "fenced block"),
    ("another language", f"{fence('pip install x', 'bash')}\n{fence(RIGHT)}", RIGHT, "fenced block"),
    ("output", f"{fence(RIGHT)}\n{fence('4', 'text')}", RIGHT, "fenced block"),
    ("longer fence", fence(RIGHT, mark="`````"), RIGHT, "fenced block"),
    ("tildes", fence(RIGHT, mark="~~~~"), RIGHT, "fenced block"),
    (
        "in a list",
        "1. So:\n   ```python\n   def double(x):\n       return 2 * x\n   ```",
        RIGHT,
        "fenced block",
    ),
    ("quoted", "> ```python\n> def double(x):\n>     return 2 * x\n> ```", RIGHT, "fenced block"),
    ("fence on a line", f"So: ```python\n{RIGHT}``` done", RIGHT, "fenced block"),
    ("one line", "```python def double(x): return 2 * x```", "def double(x): return 2 * x", "fenced block"),
    ("between backticks", "It is `def double(x): return 2 * x`.", "def double(x): return 2 * x", "inline"),
    ("a name", "```\ndouble = lambda x: 2 * x\n```", "double = lambda x: 2 * x", "fenced block"),
    ("unclosed, then prose", f"```python\n{RIGHT}\n\nThat is it.", RIGHT, "unclosed block"),
    ("tags", f"[PYTHON]\n{RIGHT}\n[/PYTHON]", RIGHT, "unfenced"),
    ("end of a turn", f"{RIGHT}<|im_end|>\n(user)", f"{RIGHT}\n\n(user)", "unfenced"),
    ("indented", "Here:\n\n    def double(x):\n        return 2 * x\n\nDone.", RIGHT, "unfenced"),
    ("no-break spaces", fence(RIGHT.replace(" ", "\u00a0")), RIGHT, "fenced block"),
    ("HTML", "<pre><code>def double(x):\n    return 2 * x if x &gt; 0 else 0</code></pre>", None, "unfenced"),
    ("announced", "Answer: def double(x): return 2 * x", "def double(x): return 2 * x", "unfenced"),
    ("mark of a file", f"\ufeff{RIGHT}", RIGHT, "unfenced"),
    ("old line ends", fence(RIGHT).replace("\n", "\r"), RIGHT, "fenced block"),
    ("prompt of a shell after it", fence(RIGHT + "\n\n>>> double(2)\n4"), RIGHT, "fenced block"),
    ("assignment in prose", f"Let\nx = 5\nbe given.\n{fence(RIGHT)}", RIGHT, "fenced block"),
]


@pytest.mark.parametrize(("text", "program", "how"), [pytest.param(*rest, id=name) for name, *rest in FOUND])
def test_the_program_is_found(text, program, how):
    reading = read_program(text, TESTS)
    program = program or RIGHT + " if x > 0 else 0"
    assert (reading.chosen.text, reading.chosen.how) == (program, how)
    assert reading.candidates[0] == reading.chosen


def test_fences_in_a_docstring_or_a_comment_end_no_block():
    for inner in (
        '    """Twice.\n\n    ```\n    double(2)\n    ```\n    """\n',
        "    # ```\n    # double(2)\n    # ```\n",
    ):
        code = f"def double(x):\n{inner}    return 2 * x"
        assert read_program(f"So:\n{fence(code)}\nDone.", TESTS).chosen.text == code


def test_blocks_are_joined_where_one_needs_the_other():
    helper, user = "def twice(x):\n    return 2 * x", "def double(x):\n    return twice(x)"
    for text in (f"{fence(helper)}\n{fence(user)}", f"{fence(user)}\nwith\n{fence(helper)}"):
        chosen = read_program(text, TESTS).chosen
        assert chosen.how == "joined blocks"
        assert helper in chosen.text and chosen.text.endswith(user)
    stack, queue = "class Stack:\n    pass", "class Queue:\n    pass"
    both = read_program(f"{fence(stack)}\n{fence(queue)}", "assert Stack() and Queue()").chosen
    assert stack in both.text and queue in both.text
    alone = read_program(f"{fence('import math')}\n{fence(RIGHT)}", TESTS).chosen
    assert alone.text == RIGHT


def test_what_is_no_program_is_shown_or_nothing():
    assert read_program("I cannot do that.", TESTS).chosen is None
    assert read_program("", TESTS).chosen is None
    wrong = read_program(fence("def double(x) return x"), TESTS).chosen
    assert (wrong.text, wrong.how) == ("def double(x) return x", "fenced block")
    assert GRADERS["code"]("I cannot do that.", TESTS).reason == "no code"


STUB = 'from typing import List\n\n\ndef double(xs: List[int]) -> List[int]:\n    """Twice each."""\n'
CHECK = "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n\ncheck(double)\n"


@pytest.mark.parametrize(
    "text",
    [
        "    return [2 * x for x in xs]",
        "    return [2 * x for x in xs]\n\n\ndef other(y):\n    return y\n",
        "    ys = []\n    for x in xs:\n        ys.append(2 * x)\n    return ys\n\nif __name__:\n    1",
        "return [2 * x for x in xs]",
        "ys = [2 * x for x in xs]\n    return ys",
        "ys = [2 * x for x in xs]\nreturn ys",
        "```python\n    return [2 * x for x in xs]\n```",
        "Sure:\n```python\nreturn [2 * x for x in xs]\n```\nDone.",
        "    return [2 * x for x in xs]\n\nThis doubles each.",
        "    return [2 * x for x in xs]\n```\n\nThis doubles each.",
        "def double(xs: List[int]) -> List[int]:\n    return [2 * x for x in xs]",
        f"{STUB}    return [2 * x for x in xs]",
        f"```python\n{STUB}    return [2 * x for x in xs]\n```",
        "```\ndef double(xs):\n    return list(map(two, xs))\n```\n```\ndef two(x):\n    return 2 * x\n```",
    ],
)
def test_a_stub_is_completed(text):
    chosen = read_program(text, CHECK, STUB, "double").chosen
    namespace = {}
    exec(chosen.text, namespace)
    assert namespace["double"]([1, 2]) == [2, 4]


def test_prose_completes_no_stub():
    for text in ("I cannot.", "", "    I cannot do that.", "Not possible, sorry."):
        assert read_program(text, CHECK, STUB, "double").chosen is None


# ---------------------------------------------------------------- any text

PIECES = (
    *(
        "```",
        "```python\n",
        "~~~\n",
        "``````",
        "`",
        "def f(x):\n",
        "    return x\n",
        "class A:\n",
        '"""',
        "'''",
    ),
    *(
        "import os\n",
        "from x import y\n",
        "x = 1\n",
        "(",
        "[",
        "{",
        "\\\n",
        "lambda:",
        "\x00",
        "\ud800",
        "\r",
        "\n",
    ),
    *(
        ">>> ",
        "> ",
        "    ",
        "\t",
        "# ```\n",
        "if x:\n",
        "async def g():\n",
        "@d\n",
        "else:\n",
        "text. ",
        "f'{",
        "\u00a0",
    ),
    *("def double(x):\n    return 2 * x\n", "</think>", "1e999", "-" * 300, "(" * 150, "é", "return"),
)


def fuzzed(seed, count):
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 80)))


def slowest(texts):
    worst = 0.0
    for text in texts:
        for stub in ("", STUB):
            best = float("inf")
            for _ in range(4):  # the least: another process is not the grader's
                start = time.process_time()
                found = read_program(text, TESTS, stub, stub and "double")
                best = min(best, time.process_time() - start)
                if best < 0.04:
                    break
            worst = max(worst, best)
            assert found.chosen is None or isinstance(found.chosen.text, str)
    return worst


def test_any_text_can_be_read():
    assert slowest(fuzzed(1, 200)) <= 0.05


@pytest.mark.slow
def test_ten_thousand_texts_are_read_in_time():
    assert slowest(fuzzed(2, 10_000)) <= 0.05
    assert slowest(piece * (20_000 // len(piece)) for piece in PIECES) <= 0.25


@pytest.mark.sandbox
def test_fuzzed_programs_never_pass_and_never_break_the_grader():
    for text in fuzzed(3, 200):
        text = text.replace("def double", "def doubled")
        grade = GRADERS["code"](text, TESTS)
        assert not grade.correct and "sandbox" not in grade.reason
