"""Servers that fail, refuse or hang: who is asked again, what the user is told, what is kept, and
that no key is ever shown.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.helpers.serving import Refusal, StandIn, serving
from unisd import UserError, http_client
from unisd.http_client import Client, Request, check_server
from unisd.run.chat_server import CHAT, ChatServer

SECRET = "sk-0123456789abcdefSECRET"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(http_client, "FIRST_PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving() as running:
        yield running


def by_prompt(**replies: Any) -> Callable[[list[dict[str, Any]]], Any]:
    """What a prompt is answered: a text, a choice, or a refusal."""

    def reply(messages: list[dict[str, Any]]) -> Any:
        found = replies.get(messages[-1]["content"], "fine")
        if isinstance(found, Exception):
            raise found
        return found

    return reply


# -- address and key -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "localhost:8000",
        "host",
        "ftp://host",
        "http://",
        "http://:8000",
        "http://host:80000",
        "http://host:0",
        "http://host:port",
        "http://a host:1",
        "http://host:1\n",
        "http://[::1",
        "http://host/v1#x",
        "",
    ],
)
def test_an_address_that_is_none_is_refused_before_it_is_asked(address: str) -> None:
    with pytest.raises(
        UserError, match=r"^writer_url: .* is not the address of a server: write http://HOST:PORT"
    ):
        check_server("writer_url", address)


def test_what_belongs_to_the_protocol_is_left_out_of_an_address() -> None:
    for address in ("http://a:1/b/v1/", "http://a:1/b/v1/chat/completions", "http://a:1/b"):
        assert check_server("x", address) == "http://a:1/b"
    with pytest.raises(UserError, match=r"remove the part before @ or after \?") as raised:
        check_server("x", f"http://a:1/v1?api-key={SECRET}")
    assert SECRET not in str(raised.value)


def test_a_key_is_stripped_and_checked(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = SECRET
    monkeypatch.setenv("OPENAI_API_KEY", f" {SECRET}\r\n")
    assert ChatServer(server.url).model == "base"
    for wrong in (
        f"{SECRET}\r\nX-Header: 1",
        f"{SECRET}\x00"[:-1] + "\x7f",
        f"{SECRET}\u00e9",
        f"a {SECRET}",
    ):
        monkeypatch.setenv("OPENAI_API_KEY", wrong)
        with pytest.raises(
            UserError, match=r"^OPENAI_API_KEY holds a space, a line break or another"
        ) as raised:
            check_server("writer_url", server.url)
        assert "SECRET" not in repr(raised.value) and raised.value.__cause__ is None
    monkeypatch.setenv("OPENAI_API_KEY", " \n")
    assert http_client.api_key() is None


def test_a_key_that_a_server_repeats_is_not_shown(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    chat = ChatServer(server.url, timeout=0.1)
    refusals = {status: Refusal(status, f"wrong: Bearer {SECRET}") for status in (400, 429, 500)}
    for refusal in refusals.values():
        server.reply = by_prompt(a=refusal)
        told = chat.answers(["a", "b"], max_tokens=3)
        assert "wrong: Bearer ***" in str(told[0].failed) and told[1].text == "fine"
        server.reply = by_prompt(a=refusal)
        with pytest.raises(UserError) as raised:
            chat.answers(["a"], max_tokens=3)
        assert "***" in str(raised.value) and SECRET not in str(raised.value)
    server.reply = by_prompt(a=f"the key is {SECRET}")
    assert chat.answers(["a"], max_tokens=3)[0].text == "the key is ***"
    assert SECRET not in caplog.text and "***" in caplog.text and SECRET not in repr(vars(chat))


# -- what is asked again, and what is not ----------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "HTTP 401: no.*: set OPENAI_API_KEY to a key that it takes"),
        (403, "HTTP 403: no.*: set OPENAI_API_KEY to a key that it takes"),
        (404, "HTTP 404: no.*: it serves base, other: name one of them"),
        (400, "HTTP 400: no .top_p..*: leave out, or change, what it names"),
        (422, "HTTP 422: no .top_p..*: leave out, or change, what it names"),
        (501, "HTTP 501: no"),
        (302, "HTTP 302: it has moved to http://elsewhere:1.*: correct its address"),
    ],
)
def test_mistakes_are_not_asked_again(server: StandIn, status: int, told: str) -> None:
    server.models = ["base", "other"]
    chat = ChatServer(server.url)
    server.reply = by_prompt(a=Refusal(status, "no", {"Location": "http://elsewhere:1"}, param="top_p"))
    with pytest.raises(UserError, match=told) as raised:
        chat.answers(["a"], max_tokens=3)
    assert server.calls[CHAT] == 1 and "\n" not in str(raised.value)


def test_a_wrong_key_is_tried_once_for_all_prompts(server: StandIn) -> None:
    chat = ChatServer(server.url, at_once=2)
    server.key = SECRET
    with pytest.raises(UserError, match=r"HTTP 401: Unauthorized.*set OPENAI_API_KEY"):
        chat.answers(["a"] * 50, max_tokens=3)
    assert server.calls[CHAT] <= 8 + 2


def test_no_safe_connection_and_no_host_are_mistakes(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=r"no safe connection.*: correct its address"):
        ChatServer(server.url.replace("http:", "https:"))

    def unknown(*args: Any, **options: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match=r"there is no host of that name: .*: correct its address"):
        ChatServer("http://nowhere.invalid:1")
    assert time.monotonic() - started < 5


def test_no_connection_at_first_is_told_at_once_and_later_waited_for(
    server: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    with serving() as gone:
        chat = ChatServer(gone.url, timeout=0.1)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"does not answer .*: start it, or correct its address"):
        ChatServer(gone.url)
    assert time.monotonic() - started < 5 and "asking again" not in caplog.text
    with pytest.raises(UserError, match="does not answer"):
        chat.answers(["a"], max_tokens=3)
    assert f"The server at {gone.url}: {CHAT}: " in caplog.text and "asking again in 0.01 s" in caplog.text


def test_a_server_that_asks_for_time_gets_it(server: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    chat = ChatServer(server.url)
    busy = [Refusal(429, "slow down", {"Retry-After": "0.3"})]
    server.reply = lambda messages: (_ for _ in ()).throw(busy.pop()) if busy else "fine"
    started = time.monotonic()
    assert chat.answers(["a"], max_tokens=3)[0].text == "fine"
    assert time.monotonic() - started >= 0.3 and "slow down; asking again in 0.3 s" in caplog.text
    spent = Refusal(429, "You exceeded your quota", code="insufficient_quota")
    for never in (Refusal(429, "slow down", {"Retry-After": "3600"}), spent):
        server.calls.clear()
        server.reply = by_prompt(a=never)
        with pytest.raises(UserError, match=r"slow down|insufficient_quota"):
            chat.answers(["a"], max_tokens=3)
        assert server.calls[CHAT] == 1


# -- what is kept ----------------------------------------------------------------------------------


def test_a_prompt_that_is_refused_does_not_cost_the_others(
    server: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    chat = ChatServer(server.url, timeout=0.1)
    filtered = {"message": {"content": "half"}, "finish_reason": "content_filter"}
    server.reply = by_prompt(
        long=Refusal(400, "too long"),
        bad=filtered,
        crash=Refusal(500, "crash"),
        moderated=Refusal(403, "flagged"),
    )
    prompts = ["a", "long", "bad", "b", "crash", "moderated", "long"]
    counted: list[int] = []
    told = chat.answers(prompts, max_tokens=3, on_rows=counted.append)
    assert [answer.text for answer in told] == ["fine", "", "", "fine", "", "", ""] and sum(counted) == 7
    reasons = ["HTTP 400: too long", "finish_reason content_filter", "HTTP 500: crash", "HTTP 403: flagged"]
    assert [str(told[n].failed) for n in (1, 2, 4, 5)] == reasons
    assert "5 of 7 prompts have no answer from the server: 2 x HTTP 400: too long; 1 x" in caplog.text


def test_what_was_answered_before_a_server_went_is_kept(server: StandIn) -> None:
    chat = ChatServer(server.url, timeout=0.2, at_once=1)

    def two(messages: list[dict[str, Any]]) -> str:
        if len(server.requests) > 2:
            server.broken = "hang up"
        return "fine"

    server.reply = two
    told = chat.answers([str(n) for n in range(50)], max_tokens=3)
    assert [answer.text for answer in told] == ["fine"] * 2 + [""] * 48
    assert all(answer.failed is not None for answer in told[2:]) and server.calls[CHAT] < 20


def test_ends_and_thoughts_are_told_apart(server: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    chat = ChatServer(server.url)
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}

    def choice(ending: str, **message: Any) -> dict[str, Any]:
        return {"message": {"role": "assistant", **message}, "finish_reason": ending}

    server.reply = by_prompt(
        thought=choice("stop", content="4", reasoning_content="2 and 2"),
        reasoning=choice("stop", content="4", reasoning="2 and 2"),
        unfinished=choice("length", content=None, reasoning_content="2 and"),
        cut=choice("length", content="The answ"),
        calls=choice("tool_calls", content=None, tool_calls=[call, call]),
        parts=choice("stop", content=[{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]),
        refusal=choice("stop", content=None, refusal="I will not."),
    )
    prompts = ["thought", "reasoning", "unfinished", "cut", "calls", "parts", "refusal"]
    told = chat.answers(prompts, max_tokens=3)
    line = '{"name": "add", "arguments": {"a": 1}}'
    assert [answer.text for answer in told] == [
        *["<think>2 and 2</think>4"] * 2,
        "<think>2 and",
        "The answ",
        f"{line}\n{line}",
        "42",
        "I will not.",
    ]
    assert [answer.cut_off for answer in told] == [False, False, True, True, False, False, False]
    assert "2 of 7 answers are cut off after 3 tokens." in caplog.text


def test_what_is_asked_for_is_sent(server: StandIn) -> None:
    chat = ChatServer(server.url, "mine")
    chat.answers(["a"], max_tokens=3, seeds=[7], temperature=0.5, top_p=0.9, stop=["\n"])
    expected = {"model": "mine", "max_tokens": 3, "seed": 7, "temperature": 0.5, "top_p": 0.9, "stop": ["\n"]}
    assert server.requests[-1] == {**expected, "messages": [{"role": "user", "content": "a"}]}


def test_the_other_name_of_the_most_tokens(server: StandIn) -> None:
    chat = ChatServer(server.url)

    def reply(messages: list[dict[str, Any]]) -> str:
        if "max_tokens" in server.requests[-1]:
            raise Refusal(400, "'max_tokens' is not supported: use 'max_completion_tokens' instead.")
        return "fine"

    server.reply = reply
    for _ in range(2):
        assert chat.answers(["a"], max_tokens=3)[0].text == "fine"
    assert server.requests[-1]["max_completion_tokens"] == 3 and server.calls[CHAT] == 3


def test_the_first_of_several_models_is_named(server: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    server.models = ["base", "other"]
    assert ChatServer(server.url).model == "base"
    assert "serves base, other: the first answers" in caplog.text
    server.lacking = {"/v1/models"}
    assert ChatServer(server.url, "mine").model == "mine"
    with pytest.raises(UserError, match="HTTP 404"):
        ChatServer(server.url)


# -- Ctrl-C ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["hang", "drip", "no json", "500", "hang up", "half"])
def test_an_interrupt_ends_all_requests_at_once(
    server: StandIn, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "FIRST_PAUSE", 20.0)
    chat = ChatServer(server.url)
    server.broken = fault
    threads = threading.active_count()
    pressed: list[float] = []

    def press() -> None:
        while server.calls[CHAT] < 40:
            time.sleep(0.01)
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    key = threading.Thread(target=press)
    key.start()
    with pytest.raises(KeyboardInterrupt):
        Client(server.url, 240.0).ask_each(
            [Request(CHAT, {"messages": [{"content": str(n)}]}) for n in range(100)], at_once=40
        )
    assert time.monotonic() - pressed[0] < 2
    key.join()
    server.closing.set()
    assert chat.model == "base" and threading.active_count() <= threads + 41  # those of the stand-in
