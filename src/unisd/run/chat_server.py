"""Gets texts from any server that speaks OpenAI's chat protocol.

Instructions and wrong answers for `prepare`, answers for `eval`.

The key, where a server wants one, is read from the environment variable OPENAI_API_KEY.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from unisd.data.rendering import apart_from_tools, as_messages
from unisd.data.thoughts import MARKS
from unisd.errors import UserError
from unisd.http_client import BadAnswer, Client, Refused, Request, Unavailable

logger = logging.getLogger(__name__)

Prompt = str | list[dict[str, Any]]  # a string is a user's message
CHAT = "/v1/chat/completions"
SHOWN = 20  # most names of models in a message


@dataclass(frozen=True)
class Answer:
    """What a model says to one prompt: a thought, if it tells one, stands before the answer, as in
    `data/thoughts.py`.

    `cut_off`: after as many tokens as were allowed. `failed`: why there is no answer.
    """

    text: str
    cut_off: bool = False
    failed: Exception | None = None


class ChatServer:
    """A server's model that answers prompts.

    Args:
        url: with or without `/v1` at its end.
        model: the name that the server knows it by; None: the first that it serves.
        timeout: seconds; see :class:`unisd.http_client.Client`.
        at_once: requests under way at the same time.

    Raises:
        UserError: the server does not answer, or refuses the key.
    """

    def __init__(self, url: str, model: str | None = None, timeout: float = 240.0, at_once: int = 16) -> None:
        self.client = Client(url, timeout)
        self.at_once = at_once
        self.served: list[str] = []
        self._cap = "max_tokens"  # what the server calls the most tokens of an answer
        try:
            self.served = self.client.ask(Request("/v1/models", method="GET", read=_models))
        except (Refused, Unavailable) as error:
            # Some have no list, and answer the model that is named all the same.
            if model is None or not isinstance(error, Refused) or error.status not in (404, 405):
                raise self.problem(error) from error
        self.model: str = model or self.served[0]
        if model is None and len(self.served) > 1:
            logger.warning("The server at %s serves %s: the first answers.", self.client.url, self._names())

    def answers(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        seeds: Sequence[int] | None = None,
        on_rows: Callable[[int], None] = lambda count: None,
        **drawn: Any,
    ) -> list[Answer]:
        """One answer a prompt, in their order; `on_rows(1)` is told of each.

        Those that failed say why; how many did, and how many were cut off, is told.

        Args:
            drawn: `temperature`, `top_p`, `stop`: sent as they are.

        Raises:
            UserError: no prompt at all has an answer.
        """
        bodies: list[dict[str, Any]] = []
        for number, prompt in enumerate(prompts):
            messages, tools = apart_from_tools(as_messages(prompt))
            told_tools = {} if tools is None else {"tools": tools}
            seed = {} if seeds is None else {"seed": seeds[number]}
            bodies.append({"model": self.model, "messages": messages, **told_tools, **drawn, **seed})

        def ask() -> list[Any]:
            requests = [Request(CHAT, {**body, self._cap: max_tokens}, read=_answer) for body in bodies]
            return self.client.ask_each(requests, self.at_once, on_rows)

        found = ask()
        if found and all(isinstance(answer, Refused) for answer in found):
            other = "max_completion_tokens"
            if self._cap != other and other in found[0].text:
                self._cap = other
                found = ask()
        told = [answer if isinstance(answer, Answer) else Answer("", failed=answer) for answer in found]
        failed = [answer.failed for answer in told if answer.failed is not None]
        if failed and len(failed) == len(told):
            raise self.problem(failed[0]) from failed[0]
        if failed:
            reasons = "; ".join(f"{count} x {why}" for why, count in Counter(map(str, failed)).most_common(3))
            logger.warning(
                "%d of %d prompts have no answer from the server: %s", len(failed), len(told), reasons
            )
        if cut := sum(answer.cut_off for answer in told):
            logger.warning("%d of %d answers are cut off after %d tokens.", cut, len(told), max_tokens)
        return told

    def problem(self, error: Exception) -> UserError:
        """What the user is told where nothing is to be had."""
        where = f"the server at {self.client.url}"
        if isinstance(error, Unavailable):
            return UserError(f"{where} does not answer ({error}): start it, or correct its address.")
        if not isinstance(error, Refused):
            return UserError(f"{where} gives no answer ({error}): ask it for something else.")
        if error.wants_key:
            remedy = "set OPENAI_API_KEY to a key that it takes"
        elif error.status == 404 and self.served:
            remedy = f"it serves {self._names()}: name one of them"
        elif error.of_all or 300 <= error.status < 400:
            remedy = "correct its address, or the model's name"
        else:
            remedy = "leave out, or change, what it names"
        return UserError(f"{where} refuses a request ({error}): {remedy}.")

    def _names(self) -> str:
        return ", ".join(self.served[:SHOWN]) + (", ..." if len(self.served) > SHOWN else "")


def _models(answer: Any) -> list[str]:
    try:
        return [str(model["id"]) for model in (answer["data"][0], *answer["data"][1:])]
    except (KeyError, TypeError, IndexError) as error:
        raise BadAnswer("no list of models") from error


def _answer(reply: Any) -> Answer:
    """The answer in a reply, its thought marked; calls of tools stand in it as JSON."""
    try:
        choice = reply["choices"][0]
        message, ending = choice["message"], choice.get("finish_reason")
        text = _text(message.get("content"))
        thought = _text(message.get("reasoning_content") or message.get("reasoning"))
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        calls += [message["function_call"]] if message.get("function_call") else []
        lines = [
            json.dumps({"name": call["name"], "arguments": _decoded(call["arguments"])}) for call in calls
        ]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise BadAnswer("an answer without a message") from error
    if ending == "content_filter":
        return Answer("", failed=BadAnswer("finish_reason content_filter"))
    if not text and not lines and message.get("refusal"):
        text = _text(message["refusal"])
    text = "\n".join(part for part in (text, *lines) if part)
    cut_off = ending == "length"
    if thought:
        first, last = MARKS[0]
        text = f"{first}{thought}" if cut_off and not text else f"{first}{thought}{last}{text}"
    return Answer(text, cut_off)


def _text(content: Any) -> str:
    """A message's text, which may come in parts."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    if not isinstance(content, str | None):
        raise BadAnswer("a message that is not a text")
    return content or ""


def _decoded(arguments: Any) -> Any:
    """A call's arguments, which are JSON in a string."""
    try:
        return json.loads(arguments)
    except (TypeError, ValueError):
        return arguments
