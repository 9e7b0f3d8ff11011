"""The client of all servers: an outage is waited out for a bounded time, with growing pauses; a
mistake in the address, the key or the request is told at once.

Requests run on an event loop in a thread of their own, so that Ctrl-C ends them wherever they hang.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import httpx2
from anyio import CapacityLimiter, create_task_group, fail_after, sleep
from anyio.from_thread import start_blocking_portal

from unisd.errors import UserError, one_line

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
MIN_ATTEMPTS = 3
CONNECT_S = 20.0  # most seconds until a connection stands
PASSING = (408, 425, 429)  # with 5xx: these statuses may be gone the next time
KEY = "OPENAI_API_KEY"
ENOUGH = 8  # requests refused in a way that all would be, before no more are made
LONG_KEY = 16  # characters; a longer one is no word of an answer
_NOTHING = object()


class BadAnswer(Exception):
    """A server's (or an engine's) answer is not what was asked for; the text says how."""


class Refused(Exception):
    """Asking again would not help: the server understood and said no, or it is not the one that was
    meant (status 0).
    """

    def __init__(self, status: int, text: str, wait: float = 0.0) -> None:
        super().__init__(f"HTTP {status}: {text}" if status else text)
        self.status, self.text, self.wait = status, text, wait
        self.wants_key = status in (401, 403)
        self.of_all = status in (0, 401, 403, 404)
        """Whether all requests may be refused like this: a 403 is also one prompt's."""
        spent = status == 429 and "insufficient_quota" in text
        self.passing = status in PASSING or (status >= 500 and status != 501)
        self.passing &= not spent


class Unavailable(Exception):
    """No good answer within the time; the text says what came instead.

    `gone`: to no other request either.
    """

    def __init__(self, text: str, gone: bool = True) -> None:
        super().__init__(text)
        self.gone = gone


@dataclass(frozen=True)
class Request:
    """What to ask, and what to make of the JSON answer (None where it is empty).

    `read` raises :class:`BadAnswer` for an answer that is not what was asked for: it counts as a
    failure of the server. An error whose text holds `done` says that an earlier request, whose
    answer was lost, has done it already: None. `again` is asked before each further attempt. With
    `sentence` the answer need not be JSON.
    """

    path: str
    body: dict[str, Any] | None = None
    method: str = "POST"
    read: Callable[[Any], Any] = lambda answer: answer
    retry: bool = True
    done: str | None = None
    again: Request | None = None
    sentence: bool = False


def check_server(option: str, url: str) -> str:
    """The address without what follows the server's own part of it, `/v1` for one.

    Raises:
        UserError: it is none, or OPENAI_API_KEY holds no key.
    """
    if "@" in url or "?" in url:  # not repeated here: a password or a key is not for others to read
        raise UserError(
            f"{option}: a server's address must not contain a user, password or key: remove the part"
            f" before @ or after ?, and set {KEY}."
        )
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        good = False
    if not good or not url.isprintable() or " " in url or "#" in url:
        raise UserError(f"{option}: {url!r} is not the address of a server: write http://HOST:PORT.")
    api_key()
    return url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")


def api_key() -> str | None:
    """The key in the environment, None where there is none.

    Raises:
        UserError: it holds what no key does.
    """
    key = os.environ.get(KEY, "").strip()
    if not all("!" <= letter <= "~" for letter in key):
        raise UserError(
            f"{KEY} holds a space, a line break or another character that a key cannot have: set it"
            " again, to the key only."
        )
    return key or None


class Client:
    """Requests with JSON bodies to one server, with the key that OPENAI_API_KEY holds.

    Args:
        url: with or without `/v1` at its end.
        timeout: seconds that one answer may take, and that a failing server is given to recover (at
            least three attempts).
        waits: for a server that is still being started; else one that takes no connection at first
            counts as none.

    Raises:
        UserError: see `check_server`.
    """

    def __init__(self, url: str, timeout: float, *, waits: bool = False) -> None:
        self.url = check_server("server", url)
        self.timeout = timeout
        self._key = api_key()
        self._waits = waits
        self._heard = -math.inf  # when it last gave an answer that makes sense
        self._told = -math.inf  # when the user was last told of trouble

    def ask(self, request: Request) -> Any:
        """What `request.read` makes of the answer.

        Raises:
            Refused: see there; with `retry=False` also 5xx.
            Unavailable: no good answer in time.
        """
        [found] = self.ask_each([request])
        if isinstance(found, Exception):
            raise found
        return found

    def ask_each(
        self,
        requests: Sequence[Request],
        at_once: int = 1,
        on_answer: Callable[[int], None] = lambda count: None,
    ) -> list[Any]:
        """One answer a request, in their order; `on_answer(1)` is told of each.

        Where there is none, the `Refused` or `Unavailable` that says why. Once it is clear that no
        other will be answered, none is asked any more: they have the same reason.
        """
        with start_blocking_portal() as portal:  # what Ctrl-C raises here ends all that is under way
            found: Future[list[Any]] = portal.start_task_soon(self._each, requests, at_once, on_answer)
            while not wait([found], timeout=0.2).done:  # a signal that another thread took wakes nobody
                pass
            return found.result()

    async def _each(
        self, requests: Sequence[Request], at_once: int, on_answer: Callable[[int], None]
    ) -> list[Any]:
        found: list[Any] = [_NOTHING] * len(requests)
        limiter = CapacityLimiter(at_once)
        answered, hopeless, reason = False, 0, _NOTHING
        connections = httpx2.Limits(max_connections=None)
        patience = httpx2.Timeout(None, connect=CONNECT_S)  # for all else see `_once`
        async with (
            httpx2.AsyncClient(timeout=patience, limits=connections, verify=_trusted()) as http,
            create_task_group() as group,
        ):

            async def one(number: int) -> None:
                nonlocal answered, hopeless, reason
                async with limiter:
                    try:
                        found[number] = await self._patiently(http, requests[number])
                        answered = True
                    except (Refused, Unavailable) as error:
                        found[number] = error
                        hopeless += isinstance(error, Refused) and error.of_all
                        gone = isinstance(error, Unavailable) and error.gone
                        if gone or (hopeless >= ENOUGH and not answered):
                            reason = error
                            group.cancel_scope.cancel()
                on_answer(1)

            for number in range(len(requests)):
                group.start_soon(one, number)
        return [reason if answer is _NOTHING else answer for answer in found]

    async def _patiently(self, http: httpx2.AsyncClient, request: Request) -> Any:
        started = time.monotonic()
        attempt = 0
        while True:
            attempt, asked = attempt + 1, 0.0  # and the seconds that the server asks for
            try:
                answer = request.read(await self._once(http, request))
                self._heard = time.monotonic()
                return answer
            except Refused as error:
                if request.done is not None and attempt > 1 and request.done in error.text:
                    return None
                if not error.passing:
                    self._heard = time.monotonic()
                if not error.passing or not request.retry:
                    raise
                trouble, asked = str(error), error.wait
            except BadAnswer as error:
                trouble = f"{request.path} gave {error}"
            except (TimeoutError, httpx2.RequestError) as error:  # also connections cut off half-way
                trouble = f"{request.path}: {self._in_short(error)}"
                none_yet = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
                if none_yet and self._heard < 0 and not self._waits:
                    raise Unavailable(trouble) from None
            over = attempt >= MIN_ATTEMPTS and time.monotonic() - started >= self.timeout
            if not request.retry or over or asked > self.timeout:
                raise Unavailable(trouble, gone=self._heard < started)
            pause = max(min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE), asked)
            if time.monotonic() - self._told >= 1:  # many requests may fail at once
                self._told = time.monotonic()
                logger.warning("The server at %s: %s; asking again in %g s.", self.url, trouble, pause)
            await sleep(pause)
            if request.again is not None:
                await self._patiently(http, request.again)

    async def _once(self, http: httpx2.AsyncClient, request: Request) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if request.body is None else json.dumps(request.body, separators=(",", ":")).encode()
        try:
            with fail_after(self.timeout):
                reply = await http.request(
                    request.method, self.url + request.path, content=data, headers=headers
                )
        except httpx2.ConnectError as error:
            if _from(error, ssl.SSLError):
                reason = f"no safe connection: {self._in_short(error)}; check http:// or https://, and the CA"
                raise Refused(0, reason) from None
            if (name := _from(error, socket.gaierror)) and name.errno == socket.EAI_NONAME:
                raise Refused(0, f"there is no host of that name: {self._in_short(error)}") from None
            raise
        text = reply.content.decode("utf-8", "replace")
        if self._key is not None and (not reply.is_success or len(self._key) >= LONG_KEY):
            text = text.replace(self._key, "***")
        if reply.is_redirect:
            raise Refused(reply.status_code, f"it has moved to {reply.headers.get('location')}")
        if not reply.is_success:
            raise Refused(reply.status_code, _message(text), _seconds(reply.headers.get("retry-after")))
        try:
            return json.loads(text) if text else None
        except ValueError:
            if request.sentence:
                return None
            raise BadAnswer(f"{len(reply.content)} bytes that are not JSON") from None

    def _in_short(self, error: Exception) -> str:
        if isinstance(error, httpx2.ConnectTimeout):
            return f"no connection within {CONNECT_S:g} s"
        if isinstance(error, TimeoutError):
            return f"no answer within {self.timeout:g} s"
        cause = _from(error, OSError)
        return one_line(cause if cause is not None and str(cause) else error)


@cache
def _trusted() -> ssl.SSLContext:
    """Whose certificates are believed: the system's; reading them takes a while."""
    return httpx2.create_ssl_context()


def _from(error: BaseException | None, kind: type[Any]) -> Any:
    """The error of that kind that has led to `error`, or None."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def _message(text: str) -> str:
    """What a server says went wrong, in one line, with the parameter that it names apart."""
    try:
        found = json.loads(text)
        found = found.get("error", found.get("detail", found)) if isinstance(found, dict) else found
        if isinstance(found, dict):
            more = [str(found[name]) for name in ("param", "code") if isinstance(found.get(name), str)]
            text = str(found.get("message", found))
            text += "".join(f" ({name})" for name in more if name not in text)
        else:
            text = str(found)
    except ValueError:
        pass
    return " ".join(text.split())[:300] or "no reason given"


def _seconds(retry_after: str | None) -> float:
    """How long a server asks to be left alone, in seconds or until a date."""
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(str(retry_after)).timestamp() - time.time())
    except ValueError:
        return 0.0
