"""Texts from an OpenAI-compatible server: contexts and wrong references in `prepare`, answers in
`eval`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.serving import StandIn, serving
from unisd import UserError
from unisd import http_client as patient_http
from unisd.cli.main import main
from unisd.run.chat_server import ChatServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(patient_http, "FIRST_PAUSE", 0.01)
    with serving() as running:
        yield running


def test_answers_come_in_order_through_faults(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    chat = ChatServer(server.url + "/v1/", timeout=0.5)
    assert chat.model == "base" and server.headers[-1]["Authorization"] == "Bearer secret"
    server.reply = lambda messages: f"you said {messages[-1]['content']}"
    server.faults = ["500", "half", "hang up"]
    prompts = ["a", [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}], "c"]
    counted: list[int] = []
    texts = chat.answers(prompts, max_tokens=5, temperature=0.7, seeds=[1, 2, 3], on_rows=counted.append)
    assert (
        [t.text for t in texts] == ["you said a", "you said b", "you said c"]
        and not server.faults
        and counted == [1, 1, 1]
    )
    assert {(r["seed"], r["max_tokens"], r["temperature"]) for r in server.requests} == {
        (n, 5, 0.7) for n in (1, 2, 3)
    }


def test_prepare_lets_the_server_write(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "cache"))
    names = ("apples", "pears", "plums", "nuts", "figs", "dates", "limes", "kiwis")
    rows = [
        {
            "prompt": f"How many {a} are {n} {a} and {n * 3 + 1} more {a}?",
            "privileged_context": f"There are {n * 4 + 1}.",
        }
        for n, a in enumerate(names, 2)
    ]
    file, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = (
        "Count both heaps first and",
        "Read slowly, then",
        "Draw one stroke for each fruit and",
        "Start with the larger heap;",
    )

    def reply(messages: list[dict[str, str]]) -> str:
        text = messages[-1]["content"]
        return (
            "There are 999."
            if "looks plausible but is wrong" in text
            else f"{kinds[len(text) % 4]} say the whole sum at last."
        )

    server.reply = reply
    asked = ["--agreement_contexts", "induction", "--negatives", "model", "--writer_url", server.url]
    assert main(["prepare", "--train_file", str(file), *asked, "--output", str(output)]) == 0
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(written) >= 7 and all(row["negative_context"] == "There are 999." for row in written)
    assert all(
        context.endswith("say the whole sum at last.")
        for row in written
        for context in row["auxiliary_contexts"]
    )
    assert any(row["auxiliary_contexts"] for row in written)


def test_eval_lets_the_server_answer(server: StandIn, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n} plus 1?", "answer": str(n + 1)} for n in range(4)]
    file, figures = tmp_path / "rows.jsonl", tmp_path / "figures.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    server.reply = lambda messages: str(min(int(messages[-1]["content"].split()[2]) + 1, 3))
    asked = [
        "--task",
        "jsonl",
        "--data_files",
        str(file),
        "--split",
        "all",
        "--grader",
        "number",
        "--server_url",
        server.url,
    ]
    assert main(["eval", *asked, "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())
    assert found["model"] == "base" and found["gold_ppl"] is None
    assert found["task_accuracy"]["value"] == pytest.approx(0.75) and found["task_accuracy"]["n"] == 4
    with pytest.raises(UserError, match="--base"):
        from unisd.cli.evaluate import eval_command

        eval_command([*asked, "--base", "pocket"])
