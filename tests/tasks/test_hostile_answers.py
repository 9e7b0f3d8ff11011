"""Answers made of the pieces that `choice` and `call` look for: none breaks or stalls them."""

import random
import time

import pytest

from unisd.tasks.base import Grade
from unisd.tasks.graders import GRADERS

PIECES = (
    *("answer is ", "#### ", "\\boxed{", "{", "[", "(", '"', "$", "Action: ", "Action Input: ", '{"name": "'),
    *(
        "```python\n",
        "```",
        "def f(",
        "\u202e",
        "\ud800",
        "\x00",
        "NaN",
        "1e999",
        "-",
        ",",
        "A.",
        "B)",
        "\n",
        "\r",
    ),
    *("${", "}", "]", " " * 7, "\u00e9", "9" * 30, "option ", "Answer: ", "**", "\\text{", "_" * 9, "a" * 40),
    *(
        '{"a":' * 3,
        "A",
        "B",
        "C",
        " or ",
        " and ",
        "not ",
        "is wrong",
        "no, ",
        "maybe ",
        "the ",
        "I ",
        "答案是",
    ),
    *(
        "It is ",
        "if ",
        "would ",
        "B, ",
        "C/",
        "<answer>",
        "</answer>",
        "<tool_call>",
        "</tool_call>",
        "f(x=1)",
    ),
    *(
        '"arguments": ',
        '"tool_calls": [',
        "'",
        "\\",
        "Question:",
        "<b>",
        ": ",
        "A, B, C or ",
        "; ",
        "? ",
        "! ",
    ),
    *(
        "correct ",
        "option A (",
        "None",
        "<function=f>",
        "<parameter=x>",
        "</parameter>",
        "<arg_key>",
        "[TOOL_CALLS]",
    ),
)
GOLD = {
    "choice": ("B", {"answer": 1, "options": ["a b", "c", "d"]}, "paradise"),
    "call": ('{"name": "f", "arguments": {"x": 1}}',),
}


def answers(count, seed):
    rng = random.Random(seed)
    for number in range(count):
        if number % 50 == 7:  # one piece, or two in turn, to the limit of what is read
            yield rng.choice(PIECES) * 20_000
        elif number % 50 == 11:
            yield (rng.choice(PIECES) + rng.choice(PIECES)) * 5_000
        else:
            yield "".join(rng.choice(PIECES) for _ in range(1500 if number % 50 == 3 else rng.randint(0, 60)))


def slowest(name, count, seed):
    """The processor's seconds of the slowest answer: the least of a few tries."""
    most = 0.0
    for number, text in enumerate(answers(count, seed)):
        gold, best = GOLD[name][number % len(GOLD[name])], float("inf")
        for _ in range(4):
            start = time.process_time()
            grade = GRADERS[name](text, gold)
            best = min(best, time.process_time() - start)
            if best < 0.04:
                break
        assert isinstance(grade, Grade)
        most = max(most, best)
    return most


@pytest.mark.parametrize("name", GOLD)
def test_no_answer_breaks_or_stalls_a_grader(name):
    assert slowest(name, 200, 1) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLD)
def test_none_of_ten_thousand_answers_breaks_or_stalls_a_grader(name):
    assert slowest(name, 10_000, 2) <= 0.05
