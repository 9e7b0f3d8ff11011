"""Which tokens a model knows, and which of them end an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unisd.data.rendering import closing_token
from unisd.errors import UserError
from unisd.models.adapters import without_adapter


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """List all token ids that end an answer, sorted.

    They are those of the generation config, the config and the tokenizer, and the one with which
    the chat template closes an answer.
    """
    closing = closing_token(tokenizer)
    found: set[int] = set() if closing is None else {closing}
    configs = (
        getattr(model, "generation_config", None),
        model.config.get_text_config(decoder=True),
        tokenizer,
    )
    for source in configs:
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            found.update(int(i) for i in (value if isinstance(value, (list, tuple)) else [value]))
    return sorted(found)


def embedded_tokens(model: Any) -> int:
    """How many tokens have a row in the model's embedding."""
    bare = without_adapter(model)
    rows = getattr(bare.get_input_embeddings(), "num_embeddings", None)
    return int(rows or bare.config.get_text_config(decoder=True).vocab_size)


def pad_id(model: Any, tokenizer: Any) -> int:
    """A token to fill rows with: the tokenizer's, or an end where that has no row in the embedding.

    Raises:
        UserError: there is neither.
    """
    rows = embedded_tokens(model)
    for token in (tokenizer.pad_token_id, *eos_ids(model, tokenizer)):
        if token is not None and token < rows:
            return int(token)
    raise UserError(
        f"neither a pad nor an end token has one of the {rows} rows of the model's embedding: set the"
        " tokenizer's pad_token (and eos_token) to a token that has."
    )


def known_tokens(tokenizer: Any) -> int:
    """One more than the highest token id of a tokenizer."""
    return 1 + int(max(tokenizer.get_vocab().values(), default=-1))


def mark_defined(model: Any, tokenizer: Any) -> None:
    """Tell the head how many tokens the tokenizer knows.

    Rows of the head beyond them fill it up to a round number: they are no outcome, neither in
    sampling nor in the divergence.
    """
    head = without_adapter(model).get_output_embeddings()
    known = known_tokens(tokenizer)
    for module in () if head is None else head.modules():  # peft may have wrapped it
        if hasattr(module, "out_features"):
            module.defined_tokens = known


def defined_tokens(head: Any) -> int | None:
    """How many rows of a head stand for tokens; None: all of them."""
    for module in () if head is None else head.modules():
        known: int | None = vars(module).get("defined_tokens")
        if known is not None:
            return known if known < module.out_features else None
    return None


def check_embedded(rows: int, sequences: Sequence[Sequence[int]]) -> None:
    """Raise `UserError` for a token that an embedding of so many rows does not have."""
    highest = max((max(ids, default=0) for ids in sequences), default=0)
    if highest >= rows:
        raise UserError(
            f"there is a token {highest}, but the model's embedding has {rows} rows: take its text out of the"
            " prompt, or give the model's own tokenizer."
        )
