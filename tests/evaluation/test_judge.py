"""A model judges pairs of answers: what it is asked, what counts, what the command writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.serving import Refusal, StandIn, serving
from unisd import UserError
from unisd import http_client as patient_http
from unisd.cli.main import main
from unisd.data.text import MAX_TEXT
from unisd.evaluation.judge import Pair, Reply, judged, question, verdict_in


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(patient_http, "FIRST_PAUSE", 0.01)
    with serving() as running:
        yield running


def replies(*verdicts: str) -> Any:
    return lambda asked: [Reply(f"[[{one}]]") for one in verdicts]


PAIR = Pair("1", "Why?", "", "old", "new")


@pytest.mark.parametrize(
    ("said", "verdict", "follows"),
    [
        ("BA", "win", 0),
        ("AB", "loss", 0),
        ("AA", "tie", 1),
        ("BB", "tie", 1),
        ("CC", "tie", 0),
        ("BC", "tie", 0),
    ],
)
def test_an_answer_wins_in_both_orders_or_not_at_all(said: str, verdict: str, follows: int) -> None:
    found = judged([PAIR], replies(*said))
    assert found["pairs"][0]["verdict"] == verdict and found["follows_position"]["value"] == follows
    assert found["win_rate"]["value"] == {"win": 1, "tie": 0.5, "loss": 0}[verdict]


def test_a_question_shows_both_answers_in_its_order_and_the_reference_if_there_is_one() -> None:
    plain, swapped = question(PAIR, False), question(PAIR, True)
    assert re.search(r"answer A\]\nold\n.*answer B\]\nnew\n", plain, re.S) and "reference" not in plain
    assert re.search(r"answer A\]\nnew\n.*answer B\]\nold\n", swapped, re.S)
    with_one = question(Pair("1", "Why?", "So.", "", "new"), False)
    assert "[start of reference]\nSo.\n" in with_one and "answer A]\n(nothing)\n" in with_one


def test_the_last_verdict_after_a_thought_counts() -> None:
    assert verdict_in("[[A]] or not? [[B]]") == "B" and verdict_in("A is better") is None
    assert verdict_in("<think>[[A]]</think>So: [[C]]") == "C" and verdict_in("<think>[[A]]") is None


def test_equal_texts_are_ties_that_nobody_is_asked_about_and_failures_do_not_count() -> None:
    same = Pair("2", "p", "", "x", " x\n")
    asked: list[str] = []

    def ask(questions: list[str]) -> list[Reply]:
        asked.extend(questions)
        return [
            Reply("[[B]]"),
            Reply("[[A]]"),
            Reply("[[A]]"),
            Reply("hm", "cut off"),
            Reply("?"),
            Reply("[[B]]"),
        ]

    found = judged([PAIR, same, Pair("3", "p", "", "x", "y"), Pair("4", "p", "", "x", "y")], ask)
    assert len(asked) == 6 and found["counts"]["same_text"] == 1
    assert found["failed"] == [
        {"id": "3", "reason": "cut off"},
        {"id": "4", "reason": "a reply without a verdict"},
    ]
    assert found["wins"]["n"] == 2 and found["ties"]["value"] == 0.5 and found["follows_position"]["n"] == 1
    assert judged([same], replies())["follows_position"] is None
    with pytest.raises(UserError, match="no pair has a verdict"):
        judged([PAIR], replies("D", "D"))


def of_two(prompt: str) -> tuple[str, str, str]:
    """What the judge was asked about: the request, answer A and answer B."""
    shown = re.findall(r"\[start of (?:request|answer [AB])\]\n(.*?)\n\[end", prompt, re.S)
    return shown[0], shown[1], shown[2]


def prefers_longer(messages: list[dict[str, Any]]) -> str:
    """A judge with a bias: at equal lengths the first; it refuses the prompt `bad`."""
    request, one, other = of_two(messages[-1]["content"])
    if request == "bad":
        raise Refusal(400, "content policy")
    return f"Length decides. [[{'A' if len(one) >= len(other) else 'B'}]]"


def a_run(folder: Path, answers: list[tuple[str, str, str]]) -> Path:
    folder.mkdir()
    examples = [
        {"id": f"r{n}", "prompt": prompt, "reference": "ref", "before": {"text": old}, "after": {"text": new}}
        for n, (prompt, old, new) in enumerate(answers)
    ]
    part = {"ids": [*(one["id"] for one in examples), "more"], "examples": examples}
    (folder / "answers.json").write_text(json.dumps({"task": part}))
    return folder


def test_the_command_judges_a_run_through_a_server(server: StandIn, tmp_path: Path, capsys: Any) -> None:
    server.reply = prefers_longer
    answers = [("p", "ab", "abc"), ("q", "abc", "a"), ("r", "ab", "cd"), ("bad", "a", "b"), ("s", "x", "x")]
    folder = a_run(tmp_path / "run", answers)
    for _ in range(2):  # the second takes the place of the first
        assert main(["judge", str(folder), "--judge_url", server.url]) == 0
    said = capsys.readouterr().out
    assert "note: the texts of 5 of 6 rows are kept" in said and "row r3 has no verdict: HTTP 400" in said
    [found] = json.loads((folder / "judge.json").read_text())["judgements"]
    counts = {"win": 1, "tie": 2, "loss": 1, "same_text": 1, "always_first": 1, "always_second": 0}
    assert found["judge"] == "base" and found["counts"] == counts and len(found["failed"]) == 1
    assert re.search(r"^verdict follows the position \(1 the first, 0 the second\) +33.3 %.* 3$", said, re.M)
    assert re.search(r"^after is better +25.0 % \[.*\] +1$", said, re.M)
    assert server.requests[0]["temperature"] == 0 and len(server.requests) == 16


def test_texts_of_which_only_the_beginning_is_kept_are_not_judged(
    server: StandIn, tmp_path: Path, capsys: Any
) -> None:
    server.reply = prefers_longer
    folder = a_run(
        tmp_path / "run", [("p" * MAX_TEXT, "ab", "abc"), ("p" * MAX_TEXT, "a", "b"), ("q", "a", "ab")]
    )
    kept = json.loads((folder / "answers.json").read_text())
    whole = f"{'p' * MAX_TEXT} Which?"
    kept["task"]["examples"][1]["messages"] = [{"role": "user", "content": whole}]
    (folder / "answers.json").write_text(json.dumps(kept))
    assert main(["judge", str(folder), "--judge_url", server.url]) == 0
    assert (
        "1 rows are left out: of texts over 20,000 characters only the beginning" in capsys.readouterr().out
    )
    assert len(server.requests) == 4 and any("Which?" in str(request) for request in server.requests)


def test_the_command_judges_two_files(server: StandIn, tmp_path: Path, capsys: Any) -> None:
    server.reply = prefers_longer
    rows = [{"id": name, "prompt": f"Say {name}.", "answer": name} for name in "abc"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file, length in (("A.jsonl", 1), ("B.jsonl", 2)):
        lines = [{"id": name, "completion": "x" * length} for name in "ab"]
        (tmp_path / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [str(tmp_path / name) for name in ("A.jsonl", "B.jsonl")]
    asked = [
        "judge",
        "--completions",
        *files,
        "--task",
        "jsonl",
        "--data_files",
        str(tmp_path / "rows.jsonl"),
    ]
    out = tmp_path / "judged.json"
    assert main([*asked, "--judge_url", server.url, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["of"] == files and found["counts"]["win"] == 2 and "Say a." in str(server.requests[0])
    assert f"{files[1]} is better" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "give either the folder"),
        (["RUN", "--completions", "a", "b"], "give either the folder"),
        (["--completions", "a", "b"], "name their --task"),
        (["RUN", "--grader", "exact"], "--grader belongs to --completions"),
        (["RUN", "--max_eval_rows", "0"], "--max_eval_rows 0"),
        (["EMPTY"], "--answers_kept"),
        (["NOWHERE"], "holds no answers.json"),
        (["RUN", "--judge_url", "ftp://x"], "--judge_url"),
    ],
)
def test_mistakes_are_told_before_anything_is_asked(
    arguments: list[str], problem: str, server: StandIn, tmp_path: Path, capsys: Any
) -> None:
    (a_run(tmp_path / "RUN", [("p", "a", "b")]), a_run(tmp_path / "EMPTY", []))
    words = [str(tmp_path / word) if word.isupper() else word for word in arguments]
    url = [] if "--judge_url" in words else ["--judge_url", server.url]
    assert main(["judge", *words, *url]) == 2
    assert problem in capsys.readouterr().err and not server.calls
