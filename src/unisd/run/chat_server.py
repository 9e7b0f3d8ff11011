"""Gets texts from any server that speaks OpenAI's chat protocol.

Instructions and wrong answers for `prepare`, answers for `eval`.

The key, where a server wants one, is read from the environment variable OPENAI_API_KEY.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from unisd.data.rendering import apart_from_tools, as_messages
from unisd.errors import UserError
from unisd.http_client import BadAnswer, Refused, Unavailable, openai_client

Prompt = str | list[dict[str, Any]]  # a string is a user's message


class ChatServer:
    """A server's model that answers prompts.

    Args:
        url: with or without `/v1` at its end.
        model: the name that the server knows it by; None: the first that it serves.
        timeout: seconds; see :class:`unisd.http_client.Client`.
        at_once: requests under way at the same time.

    Raises:
        UserError: the server does not answer, or refuses a request.
    """

    def __init__(self, url: str, model: str | None = None, timeout: float = 240.0, at_once: int = 16) -> None:
        self.client = openai_client(url, timeout)
        self.at_once = at_once
        self.model: str = model or self._ask("/v1/models", None, method="GET", read=_first_model)

    def answers(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        on_rows: Callable[[int], None] | None = None,
    ) -> list[str]:
        """One text a prompt, in their order; `on_rows(1)` is told of each."""

        def one(number: int) -> str:
            prompt = prompts[number]
            messages, tools = apart_from_tools(as_messages(prompt))
            body: dict[str, Any] = {
                "model": self.model,
                "messages": messages,
                **({} if tools is None else {"tools": tools}),
                "max_tokens": max_tokens,
                "temperature": temperature,
                "top_p": top_p,
            }
            if seeds is not None:
                body["seed"] = seeds[number]
            text: str = self._ask("/v1/chat/completions", body, read=_text)
            return text

        written = []
        with ThreadPoolExecutor(self.at_once) as pool:
            for text in pool.map(one, range(len(prompts))):
                written.append(text)
                if on_rows is not None:
                    on_rows(1)
        return written

    def _ask(self, path: str, body: dict[str, Any] | None, **options: Any) -> Any:
        try:
            return self.client.ask(path, body, **options)
        except Unavailable as error:
            raise UserError(
                f"the server at {self.client.url} does not answer ({error}): start it, or correct its"
                " address."
            ) from error
        except Refused as error:
            what = "set OPENAI_API_KEY" if error.wants_key else "correct its address, or the model's name"
            raise UserError(
                f"the server at {self.client.url} refuses a request ({error}): {what}."
            ) from error


def _first_model(answer: Any) -> str:
    try:
        return str(answer["data"][0]["id"])
    except (KeyError, TypeError, IndexError) as error:
        raise BadAnswer("no list of models") from error


def _text(answer: Any) -> str:
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, TypeError, IndexError) as error:
        raise BadAnswer("an answer without a message") from error
    if not isinstance(content, str | None):
        raise BadAnswer("a message that is no text")
    return content or ""
