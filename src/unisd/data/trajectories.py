"""Answers of several turns that rows bring: which tokens an assistant wrote, and which it read.

    {"prompt": ..., "privileged_context": ..., "completion": [
        {"role": "assistant", "content": "[17 * 3]"},
        {"role": "tool", "content": "51"},
        {"role": "assistant", "content": "Answer: 51"}]}

The row's `completion` is what the last turn says; all turns are kept as `completion_turns`, which
`completion_source=reference` trains on, with loss on the assistant's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from unisd.data import rendering
from unisd.data.rendering import Messages, following_ids
from unisd.errors import UserError

TURNS = "completion_turns"
ROLES = ("assistant", "tool", "user", "system", "function", "ipython")


def is_trajectory(completion: Any) -> bool:
    """Whether a completion is messages from an assistant's to an assistant's, others between.

    A single one is, where it calls a function.
    """
    if not isinstance(completion, list) or not completion:
        return False
    if not all(isinstance(turn, dict) and turn.get("role") in ROLES for turn in completion):
        return False
    if len(completion) == 1 and not completion[0].get("tool_calls"):
        return False
    own = [turn["role"] == "assistant" for turn in completion]
    return own[0] and own[-1] and (True, True) not in set(pairwise(own))


def encode_turns(
    tokenizer: Any, prompt: str | Messages, turns: Sequence[dict[str, Any]], ends: Sequence[int]
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation after its prompt, and of each whether the assistant wrote it.

    The assistant's are those of its turns up to the token that closes each; what the template
    writes around turns, and all other turns, are not.

    Raises:
        UserError: there is no chat template, or it changes earlier turns when others follow.
    """
    if tokenizer.chat_template is None:
        raise UserError("a completion of several turns needs a chat template: give the tokenizer one.")
    messages = rendering.as_messages(prompt)
    closing = rendering.closing_token(tokenizer)
    stops = {*ends, closing, tokenizer.eos_token_id} - {None}
    seen = rendering.render(tokenizer, messages)
    ids: list[int] = []
    own: list[bool] = []
    for place, turn in enumerate(turns):
        messages = [*messages, turn]
        is_own = turn["role"] == "assistant"
        answers = not is_own and turns[place + 1]["role"] == "assistant"
        if not is_own and not answers:
            continue  # a further turn follows before the assistant's: rendered with it
        text = rendering.render(tokenizer, messages, answering=answers)
        if not text.startswith(seen):
            raise UserError(
                f"the chat template writes turn {place} of the completion differently if others follow"
                " it: give the tokenizer a chat_template that leaves earlier turns as they are."
            )
        piece = following_ids(tokenizer, seen, text[len(seen) :])
        last = next((i for i, token in enumerate(piece) if token in stops), len(piece) - 1)
        is_last = place == len(turns) - 1
        ids += piece[: last + 1] if is_last else piece
        own += [is_own and i <= last for i in range(len(piece))][: last + 1 if is_last else None]
        seen = text
    return ids, own
