"""A patient HTTP client: what a server answers wrongly or not at all is asked again, with growing
pauses, for a bounded time.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import time
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

from unisd.errors import UserError

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
MIN_ATTEMPTS = 3
Result = TypeVar("Result")


class BadAnswer(Exception):
    """A server's (or an engine's) answer is not what was asked for; the text says how."""


class Refused(Exception):
    """The server understood and said no (4xx): asking again would not help."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status, self.text = status, text
        self.wants_key = status in (401, 403)


class Unavailable(Exception):
    """No good answer within the time; the text says what came instead."""


class Client:
    """Requests with JSON bodies to one server.

    Args:
        url: without a path.
        timeout: seconds that one answer may take, and that a failing server is given to recover (at
            least three attempts).
        headers: sent with each request.

    Raises:
        UserError: the address is none.
    """

    def __init__(self, url: str, timeout: float, headers: dict[str, str] | None = None) -> None:
        if "@" in url:  # not repeated here: an address is logged, and a password is not for others to read
            raise UserError(
                "a server's address must not hold a user or a password: leave out what stands before @, and"
                " set OPENAI_API_KEY."
            )
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{url!r} is not the address of a server: write http://HOST:PORT.")
        self.url = url.rstrip("/")
        self.headers = {"Content-Type": "application/json", **(headers or {})}
        self.timeout = timeout
        self._told = -LONGEST_PAUSE  # when the user was last told of trouble

    def ask(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        method: str = "POST",
        read: Callable[[Any], Result] | None = None,
        retry: bool = True,
        done: str | None = None,
        again: Callable[[], Any] | None = None,
        sentence: bool = False,
    ) -> Any:
        """The JSON answer (None where it is empty), or what `read` makes of it.

        `read` raises :class:`BadAnswer` for an answer that is not what was asked for: it counts as
        a failure of the server. An error whose text holds `done` says that an earlier request,
        whose answer was lost, has done it already: None. `again` is called before each further
        attempt. With `sentence` the answer need not be JSON.

        Raises:
            Refused: 4xx; with `retry=False` also 5xx.
            Unavailable: no good answer in time.
        """
        started = time.monotonic()
        attempt = 0
        while True:
            attempt += 1
            try:
                answer = self._once(path, body, method, sentence)
                return answer if read is None else read(answer)
            except Refused as error:
                if done is not None and attempt > 1 and done in error.text:
                    return None
                if error.status < 500 and error.status != 429:
                    raise
                if not retry:
                    raise
                trouble = str(error)
            except BadAnswer as error:
                trouble = f"{path} gave {error}"
            except (
                OSError,
                http.client.HTTPException,
            ) as error:  # also timeouts, and connections cut off half-way
                trouble = f"{path}: {_in_short(error)}"
            if not retry or (attempt >= MIN_ATTEMPTS and time.monotonic() - started >= self.timeout):
                raise Unavailable(trouble)
            pause = min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)
            if time.monotonic() - self._told >= 1:  # many requests may fail at once
                self._told = time.monotonic()
                logger.warning("The server at %s: %s; asking again in %g s.", self.url, trouble, pause)
            time.sleep(pause)
            if again is not None:
                again()

    def _once(self, path: str, body: dict[str, Any] | None, method: str, sentence: bool) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data=data, headers=self.headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            with error:
                text = _message(error.read())
            raise Refused(error.code, text) from None
        if not content:
            return None
        try:
            return json.loads(content)
        except ValueError:
            if sentence:
                return None
            raise BadAnswer(f"{len(content)} bytes that are no JSON") from None


def openai_client(url: str, timeout: float) -> Client:
    """A client of a server that speaks OpenAI's protocol: `url` with or without `/v1`, the key (if
    any) that OPENAI_API_KEY holds.

    Raises:
        UserError: see :class:`Client`.
    """
    key = os.environ.get("OPENAI_API_KEY")
    return Client(
        url.rstrip("/").removesuffix("/v1"), timeout, {"Authorization": f"Bearer {key}"} if key else None
    )


def _message(content: bytes) -> str:
    """What a server says went wrong, in one line."""
    text = content.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        found = found.get("error", found.get("detail", found)) if isinstance(found, dict) else found
        text = str(found.get("message", found)) if isinstance(found, dict) else str(found)
    except ValueError:
        pass
    return " ".join(text.split())[:300] or "no reason given"


def _in_short(error: BaseException) -> str:
    reason = getattr(error, "reason", error)
    return " ".join(str(reason).split()) or type(error).__name__
