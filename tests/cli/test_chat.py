"""`unisd chat`: what the model is shown, what comes out while it writes, and what a line does."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import templates
from unisd import testing as tiny
from unisd.cli.conversation import Speaker, Writer, readable
from unisd.cli.main import main
from unisd.rollout.engine import Completion, Sampling
from unisd.rollout.streaming import stream
from unisd.rollout.transformers_engine import generate
from unisd.run import answers

LONG = ("long " * 110).strip()
"""More tokens (bytes) than the tiny model's context of 512."""
VERDICT = {"token_ids": [], "correct": [True] * 20, "outcomes": {}, "texts": ["a"] * 20, "reasons": [""] * 20}


@pytest.fixture()
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of models that were opened: each is the tiny one."""
    names: list[str] = []

    def load_any(name: str, **_: Any) -> tuple[Any, Any]:
        names.append(name)
        return tiny.model(), tiny.tokenizer(chat=name != "plain")

    monkeypatch.setattr("unisd.cli.chat.load_any", load_any)
    return names


@pytest.fixture()
def asked(monkeypatch: pytest.MonkeyPatch, opened: list[str]) -> list[str]:
    """The rendered prompts; the answer to the first is `a0`, and so on."""
    prompts: list[str] = []

    def canned(model: Any, prompt: Sequence[int], sampling: Sampling, **_: Any) -> Completion:
        prompts.append(tiny.tokenizer().decode(prompt).removeprefix("<s>"))
        return Completion([*tiny.tokenizer()(f"a{len(prompts) - 1}")["input_ids"], 2], truncated=False)

    monkeypatch.setattr("unisd.cli.conversation.stream", canned)
    return prompts


def pipe(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Type lines on a terminal, and Ctrl-D."""
    left = iter(lines)

    def read(prompt: str) -> str:
        if (line := next(left, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)


def a_run(folder: Path, *prompts: Any) -> str:
    """What chat reads of a run with these training rows, which it was tested on, too."""
    rows = [{"prompt": prompt, "completion": "a"} for prompt in prompts]
    folder.mkdir(exist_ok=True)
    part = answers.paired(rows, VERDICT, VERDICT)
    (folder / "answers.json").write_text(json.dumps({"task": part}))
    (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in part["examples"]))
    (folder / "results.json").write_text(json.dumps({"model": "base-model"}))
    return str(folder)


# -- the conversation ------------------------------------------------------------------------------


def test_a_prompt_follows_the_turns_before(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "one", "", "two", "/reset", "three", "/quit", "four")
    assert main(["chat", "tiny", "--system", "Be brief."]) == 0
    system, end = "<|system|>Be brief.", "<|assistant|>"
    assert asked == [
        f"{system}<|user|>one{end}",
        f"{system}<|user|>one{end}a0<|end|><|user|>two{end}",
        f"{system}<|user|>three{end}",
    ]
    assert capsys.readouterr().out.splitlines() == ["a0", "a1", "a2"]


def test_the_oldest_prompts_go_where_the_context_ends(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "x" * 200, "y" * 200, "z" * 200)
    assert main(["chat", "tiny", "--max_new_tokens", "40"]) == 0
    assert "x" * 200 in asked[1] and "x" not in asked[2] and "y" * 200 in asked[2]
    told = "the context of 512 tokens is full: the oldest 1 prompt(s) and their answers are left out"
    assert capsys.readouterr().err.count(told) == 1


def test_what_is_too_long_is_refused_and_forgotten(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "the prompt has 552 tokens, and the model's context is 512: shorten it."
    assert main(["chat", "tiny", "--prompt", LONG]) == 2
    assert told in capsys.readouterr().err
    pipe(monkeypatch, "one", LONG)
    assert main(["chat", "tiny"]) == 2
    assert f"line 2: {told}" in capsys.readouterr().err
    type_in(monkeypatch, "one", LONG, "two")
    assert main(["chat", "tiny"]) == 0
    assert f"error: {told}" in capsys.readouterr().out
    assert "long" not in asked[-1] and "one" in asked[-1]


def test_without_a_chat_template_each_prompt_stands_alone(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "one", "two")
    assert main(["chat", "plain"]) == 0
    assert asked == ["one", "two"]
    assert "plain has no chat template: it reads each prompt separately" in capsys.readouterr().err
    assert main(["chat", "plain", "--system", "x", "--prompt", "q"]) == 2
    assert "--system: the tokenizer has no chat template" in capsys.readouterr().err


# -- an answer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_text_that_comes_is_that_of_the_whole_answer(
    temperature: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also over the end of the pieces that are generated at a time on a CPU."""
    speaker = Speaker("tiny", tiny.model(), tiny.tokenizer())
    prompt = [{"role": "user", "content": "What is 3?"}]
    sampling, key = Sampling(20, temperature or 1.0), (1, 0, 0, 0) if temperature else None
    seen: list[int] = []
    writer = Writer(live=True)
    writer.grow, grow = lambda text: (seen.append(len(text)), grow(text))[-1], writer.grow  # type: ignore[method-assign]
    speaker.answer(prompt, sampling, key, writer, stoppable=False)
    ids = speaker.encode(prompt)
    keys = None if key is None else [key]
    (whole,) = generate(tiny.model(), [ids], sampling, eos_ids=[2], pad_id=0, keys=keys)
    assert capsys.readouterr().out == readable(speaker.said(whole.ids)) + "\n"
    assert len(seen) == len(whole.ids) and len({*seen}) > 10  # it came bit by bit


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (templates.OPENING, "2 and 2\n</think>\n\nFour: \u00e9."),
        (templates.CHATML, "<think>\n2 and 2\n</think>\n\nFour:  \u00e9."),
        (templates.CHATML, "no \ud83d\ude00 thought  \n"),
    ],
    ids=["opened", "thought", "none"],
)
def test_nothing_is_written_twice(template: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = text.encode("utf-16", "surrogatepass").decode("utf-16")
    speaker = Speaker("tiny", None, templates.tokenizer(template, plain=("<think>", "</think>")))
    ids, writer = speaker.tokenizer(text, add_special_tokens=False)["input_ids"], Writer(live=True)
    for end in range(len(ids)):
        writer.grow(readable(speaker.said(ids[:end])))
    before = capsys.readouterr().out
    whole = readable(speaker.said(ids))
    writer.end(whole)
    assert before + capsys.readouterr().out == f"{whole}\n"
    assert len(before) > len(whole) // 2 and "\ufffd" not in before
    assert whole == text if "<" not in text and "Four" not in text else whole.startswith("<think>\n2 and 2\n")


def test_an_answer_that_is_cut_off_says_so(opened: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "tiny", "--prompt", "What is 3?", "--max_new_tokens", "2"]) == 0
    assert "the answer is cut off after 2 tokens (--max_new_tokens)" in capsys.readouterr().err
    assert main(["chat", "tiny", "--prompt", "x" * 490, "--max_new_tokens", "99"]) == 0
    assert "(context 512)" in capsys.readouterr().err


def interrupting(after: int) -> Callable[..., Completion]:
    """Like `stream`, but the user presses Ctrl-C after some tokens."""

    def streamed(*args: Any, on_tokens: Callable[[list[int]], None], **named: Any) -> Completion:
        def watched(tokens: list[int]) -> None:
            on_tokens(tokens)
            if len(tokens) == after:
                os.kill(os.getpid(), signal.SIGINT)

        return stream(*args, on_tokens=watched, **named)

    return streamed


def test_ctrl_c_stops_one_answer(
    opened: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("unisd.cli.conversation.stream", interrupting(3))
    assert main(["chat", "tiny", "--prompt", "What is 3?", "--max_new_tokens", "9"]) == 130
    type_in(monkeypatch, "What is 3?", "And 4?")
    assert main(["chat", "tiny", "--max_new_tokens", "9"]) == 0
    told = capsys.readouterr()
    assert told.err.count("note: stopped.") == 2
    ids = tiny.tokenizer().apply_chat_template(
        [{"role": "user", "content": "What is 3?"}], add_generation_prompt=True, return_dict=False
    )
    (whole,) = generate(tiny.model(), [ids], Sampling(3), eos_ids=[2], pad_id=0)
    assert tiny.tokenizer().decode(whole.ids, skip_special_tokens=True) in told.out


# -- the base --------------------------------------------------------------------------------------


def test_the_base_answers_the_last_prompt_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted, opened = get_peft_model(tiny.model(), config).eval(), []
    monkeypatch.setattr(
        "unisd.cli.chat.load_any", lambda name, **_: (opened.append(name), (adapted, tiny.tokenizer()))[1]
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    pipe(monkeypatch, "What is 3?", "/base")
    assert main(["chat", str(tmp_path), "--max_new_tokens", "12"]) == 0
    own, base = capsys.readouterr().out.split("base:\n")
    monkeypatch.setattr("unisd.cli.chat.load_any", lambda *_, **__: (tiny.model(), tiny.tokenizer()))
    assert main(["chat", "tiny", "--prompt", "What is 3?", "--max_new_tokens", "12"]) == 0
    assert capsys.readouterr().out == base != own
    assert opened == [str(tmp_path)]


def test_the_base_of_a_full_model_is_opened_once_and_sees_the_same_turns(
    asked: list[str],
    opened: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = a_run(tmp_path, "q")
    pipe(monkeypatch, "one", "two", "/base", "/base", "three")
    assert main(["chat", folder]) == 0
    assert opened == [folder, "base-model"]
    assert asked[1] == asked[2] == asked[3] and "a1<|end|><|user|>three" in asked[4]
    assert capsys.readouterr().out.splitlines() == [
        "a0",
        "a1",
        "base-model:",
        "a2",
        "base-model:",
        "a3",
        "a4",
    ]


def test_each_model_of_a_comparison_reads_with_its_own_tokenizer(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "one", "two")
    assert main(["chat", "tiny", "--compare", "plain"]) == 0
    # the conversation goes on with the model's own answer
    assert asked[2:] == ["two", "<|user|>one<|assistant|>a1<|end|><|user|>two<|assistant|>"]
    assert capsys.readouterr().out.splitlines()[:4] == ["plain:", "  a0", "tiny:", "  a1"]


# -- what a run's folder says ----------------------------------------------------------------------


def turns(system: str, *texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *said]


def test_the_prompts_of_a_run_are_asked_as_it_asked_them(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = a_run(tmp_path, turns("Be brief.", "p1"), turns("Be brief.", "p2", "r2", "q2"))
    type_in(monkeypatch, "hello", "1", "/examples", "2", "more", "/new", "2")
    assert main(["chat", folder]) == 0
    system, end = "<|system|>Be brief.", "<|assistant|>"
    assert asked[0] == f"{system}<|user|>hello{end}"
    assert asked[1].endswith(f"a0<|end|><|user|>1{end}")  # no example: another prompt came between
    second = f"{system}<|user|>p2{end}r2<|end|><|user|>q2{end}"
    assert asked[2] == second and asked[3].startswith(second + "a2<|end|><|user|>more")
    assert asked[4] == f"{system}<|user|>2{end}"
    shown = capsys.readouterr().out
    assert "system turn: Be brief.\n" in shown and "  1  p1\n  2  q2\n" in shown
    pipe(monkeypatch, "/examples", "2", "1")
    assert main(["chat", folder, "--system", "Rhyme."]) == 0
    assert [("Rhyme." in text, "Be brief." in text) for text in asked[-2:]] == [(True, False)] * 2
    assert capsys.readouterr().out.splitlines() == ["  1  p1", "  2  q2", "a5", "a6"]


def test_rows_with_several_system_turns_give_none(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = a_run(tmp_path, turns("Be brief.", "p1"), "p2")
    assert main(["chat", folder, "--prompt", "q"]) == 0
    assert asked == ["<|user|>q<|assistant|>"]
    assert "do not share one system turn" in capsys.readouterr().err
    (tmp_path / "answers.json").write_text("[")
    assert main(["chat", folder, "--prompt", "q", "--system", ""]) == 0
    assert "answers.json cannot be read" in capsys.readouterr().err


# -- lines and flags -------------------------------------------------------------------------------


class Closed(io.StringIO):
    def isatty(self) -> bool:
        return False

    def readline(self, *_: Any) -> str:
        raise ValueError("I/O operation on closed file.")


@pytest.mark.parametrize(
    ("stdin", "told"),
    [
        (None, "there is no prompt: give --prompt TEXT, or lines on standard input"),
        (io.StringIO("\n \n"), "there is no prompt: give --prompt TEXT"),
        (Closed(), "standard input cannot be read (I/O operation on closed file.): give --prompt TEXT"),
        (io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"), "standard input cannot be read ('utf-8' codec"),
        (
            io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8", errors="surrogateescape"),
            "standard input cannot be read ('utf-8' codec",
        ),
        (io.StringIO("/nwe\n"), "line 1: unknown command /nwe: did you mean /new?"),
        (io.StringIO("/base\n"), "line 1: /base answers the last prompt again: ask something first"),
        (io.StringIO("/examples\n"), "line 1: tiny has no answers.json"),
    ],
    ids=["none", "empty", "closed", "not utf-8", "bytes let through", "unknown", "no prompt", "no run"],
)
def test_lines_that_are_mistakes(
    opened: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stdin: Any,
    told: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["chat", "tiny"]) == 2
    assert told in capsys.readouterr().err


def test_a_mistake_in_a_pipe_costs_its_own_line(
    opened: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/nwe\nHow many?\n"))
    assert main(["chat", "tiny", "--max_new_tokens", "3"]) == 2
    shown = capsys.readouterr()
    assert shown.out.strip() and "1 of 2 lines were not answered" in shown.err


def test_every_command_has_a_line_in_help(
    opened: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from unisd.cli.chat import HELP, Session

    type_in(monkeypatch, "/help")
    assert main(["chat", "tiny"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in HELP)
    given = {"system": None, "compare": None, "chat_template_kwargs": None, "trust_remote_code": False}
    session = Session(argparse.Namespace(folder="tiny", prompt=None, **given), interactive=False)
    monkeypatch.setattr(session, "base", lambda: None)
    monkeypatch.setattr(session, "show_examples", lambda: None)
    lines = [name for name in (*HELP, "/reset") if name.startswith("/")]
    assert [name for name in lines if not session.do(name)] == ["/quit"]


def test_a_negative_temperature_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "tiny", "--temperature", "-1"]) == 2
    assert "--temperature -1.0: 0 or more is needed" in capsys.readouterr().err
