"""Texts from an OpenAI-compatible server: contexts and wrong references in `prepare`, answers in
`eval`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.serving import Refusal, StandIn, serving
from unisd import UserError
from unisd import http_client as patient_http
from unisd.cli.main import main
from unisd.run.chat_server import ChatServer
from unisd.run.prepare import server_writer
from unisd.run.resolve import parse


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
        from unisd.cli.eval import eval_command

        eval_command([*asked, "--base", "pocket"])


def own_rows(tmp_path: Path, count: int = 6) -> list[str]:
    """What `eval` is asked, but for the server."""
    rows = [{"id": n, "prompt": f"What is {n} plus 1?", "answer": str(n + 1)} for n in range(count)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["eval", "--task", "jsonl", "--data_files", str(file), "--split", "all", "--grader", "number"]


def test_eval_counts_what_failed_and_what_was_cut_off(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(messages: list[dict[str, str]]) -> Any:
        number = int(messages[-1]["content"].split()[2])
        if number == 0:
            raise Refusal(400, "the prompt is too long")
        if number == 1:
            return {"message": {"content": None, "reasoning": "1 and 1 is 2"}, "finish_reason": "length"}
        return f"{number + 1}\n\nWhat is 5 plus 5? 10"

    server.reply = reply
    files = {name: tmp_path / f"figures.{name}" for name in ("json", "rows", "markdown")}
    asked = [
        *own_rows(tmp_path),
        "--server_url",
        server.url,
        "--stop",
        "\n\n",
        "What",
        "--eval_max_new_tokens",
        "7",
    ]
    assert main([*asked, *(word for name, file in files.items() for word in (f"--{name}", str(file)))]) == 0
    found = json.loads(files["json"].read_text())
    assert found["task_accuracy"]["n"] == 5 and found["task_summary"]["failed"] == 1
    assert found["task_summary"]["cut_off"] == 1 and server.requests[0]["stop"] == ["\n\n", "What"]
    records = [json.loads(line) for line in files["rows"].read_text().splitlines()]
    assert [record["id"] for record in records] == [str(n) for n in range(6)]
    assert (
        records[0]["correct"] is None and records[0]["reason"] == "failed: HTTP 400: the prompt is too long"
    )
    assert records[1]["correct"] is False and records[1]["completion"] == "<think>1 and 1 is 2"
    assert "| failed | 1 | 6 |" in files["markdown"].read_text()
    said = capsys.readouterr()
    assert "  failed" in said.out and "  cut off" in said.out
    assert "1 of 6 prompts have no answer from the server: 1 x HTTP 400: the prompt is too long" in said.err
    assert "1 of 6 answers are cut off after 7 tokens." in said.err


def test_no_output_holds_the_key(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server.key = key = "sk-0123456789abcdefSECRET"
    monkeypatch.setenv("OPENAI_API_KEY", f"{key}\r\n")
    faults = ["500", "no json", "hang up"]
    server.reply = lambda messages: f"{key} says 3"

    def run(code: int) -> None:
        server.faults = list(faults)
        files = [
            word for name in ("json", "rows") for word in (f"--{name}", str(tmp_path / f"{code}.{name}"))
        ]
        assert main([*own_rows(tmp_path), "--server_url", server.url, *files]) == code

    run(0)

    def failing(messages: list[dict[str, str]]) -> str:
        raise Refusal(400, f"bad key {key}")

    server.reply = failing
    faults.clear()
    run(2)
    said = "".join(capfd.readouterr())
    assert "bad key ***" in said
    server.key = f"{key}-another"
    run(2)
    monkeypatch.setenv("OPENAI_API_KEY", f"{key}\n{key}")
    run(2)
    assert (tmp_path / "0.rows").is_file()
    said += "".join(capfd.readouterr())
    assert "set it again" in said and key not in said and "SECRET" not in said
    assert [path for path in tmp_path.iterdir() if b"SECRET" in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--server_url", "host:8000"], "--server_url: 'host:8000' is not the address of a server"),
        (
            ["--server_url", "URL", "--model", "pocket"],
            "--model_name_or_path is for a model that is loaded here",
        ),
        (["--server_url", "URL", "--dtype", "float32"], "--dtype is for a model that is loaded here"),
        (["--server_url", "URL", "--trust_remote_code"], "--trust_remote_code is for a model that is loaded"),
        (["--server_model", "base"], "--server_model is a name on a server: give its --server_url, too"),
        (["--stop", ""], "--stop: an empty text matches everywhere"),
    ],
)
def test_what_a_server_would_ignore_is_refused(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    flags = [server.url if flag == "URL" else flag for flag in flags]
    assert main([*own_rows(tmp_path), *flags]) == 2 and told in capsys.readouterr().err
    assert not server.calls


def test_a_model_that_is_loaded_stops_too(tmp_path: Path, model_dir: Path) -> None:
    file = tmp_path / "out.jsonl"

    def texts(*flags: str) -> list[str]:
        asked = [*own_rows(tmp_path, 2), "--model", str(model_dir), "--eval_max_new_tokens", "6", *flags]
        assert main([*asked, "--rows", str(file)]) == 0
        return [json.loads(line)["completion"] for line in file.read_text().splitlines()]

    whole = texts()
    ends = [text[2] for text in whole]
    expected = [text[: min(text.index(end) for end in ends if end in text)] for text in whole]
    assert texts("--stop", *ends) == expected != whole


def test_prepare_says_what_it_does_not_ask(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["prepare", "--max_train_rows", "4", "--writer_url"]
    with pytest.raises(UserError, match=r"^writer_url: 'host' is not the address of a server"):
        parse(["--dry_run", "--writer_url", "host"])
    with pytest.raises(UserError, match="writer_model is a name on a server: give its writer_url"):
        parse(["--writer_model", "base"])
    assert main([*asked, server.url, "--negatives", "corrupt"]) == 0 and not server.calls
    assert (
        "writer_url is not used: it needs agreement_contexts=induction or negatives=model."
        in capsys.readouterr().err
    )


def test_negatives_go_on_without_what_was_refused_and_end_with_the_server(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "cache"))
    chat = ChatServer(server.url, timeout=0.1)
    write = server_writer(chat, 0, "wrong answers")

    def reply(messages: list[dict[str, str]]) -> Any:
        if messages[-1]["content"] == "bad":
            raise Refusal(400, "flagged")
        return {"message": {"content": " 5 ", "reasoning_content": "think"}, "finish_reason": "stop"}

    server.reply = reply
    assert write(["a", "bad", "c"], 0) == ["5", "", "5"]
    chat.at_once = 1

    def once(messages: list[dict[str, str]]) -> str:
        server.broken = "500" if len(server.requests) > 5 else None
        return "5"

    server.reply = once
    with pytest.raises(UserError, match=r"does not answer .*out of order"):  # not kept as found nowhere
        write([str(n) for n in range(9)], 0)


@pytest.mark.long
def test_ctrl_c_ends_the_command_at_once(server: StandIn, tmp_path: Path) -> None:
    server.broken = "hang"
    asked = [sys.executable, "-m", "unisd", *own_rows(tmp_path, 60), "--server_url", server.url]
    with subprocess.Popen(asked, stderr=subprocess.PIPE, text=True) as command:
        while server.calls["/v1/chat/completions"] < 16 and command.poll() is None:
            time.sleep(0.05)
        command.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert command.stderr is not None
        said = next(line for line in command.stderr if not line.startswith("note: loading "))
        assert said == "unisd: interrupted.\n"
        assert time.monotonic() - started < 2  # what follows is Python's own end
        assert command.wait(60) == 130
