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
    _mark(model, "defined_tokens", known_tokens(tokenizer))


def defined_tokens(head: Any) -> int | None:
    """How many rows of a head stand for tokens; None: all of them."""
    module, known = _marked(head, "defined_tokens")
    return known if known is not None and known < module.out_features else None


def mark_ends(model: Any, tokenizer: Any, together: bool = True) -> list[int]:
    """Tell the head which tokens end an answer, so that losses and scores take them for one.

    Which of them ends an answer is no part of it: a teacher that prefers another one does not
    disagree. Returns those tokens; none where there are no two, or not `together`.
    """
    ends = [i for i in eos_ids(model, tokenizer) if i < embedded_tokens(model)] if together else []
    ends = ends if len(ends) > 1 else []
    _mark(model, "end_tokens", tuple(ends))
    return ends


def end_tokens(head: Any) -> tuple[int, ...]:
    """The tokens that count as one end; empty: each is one for itself."""
    return _marked(head, "end_tokens")[1] or ()


def _mark(model: Any, name: str, value: Any) -> None:
    head = without_adapter(model).get_output_embeddings()
    for module in () if head is None else head.modules():  # peft may have wrapped it
        if hasattr(module, "out_features"):
            setattr(module, name, value)


def _marked(head: Any, name: str) -> tuple[Any, Any]:
    """The first module of a head with a mark, and the mark."""
    found = (module for module in (() if head is None else head.modules()) if name in vars(module))
    module = next(found, None)
    return module, None if module is None else vars(module)[name]


def check_embedded(rows: int, sequences: Sequence[Sequence[int]]) -> None:
    """Raise `UserError` for a token that an embedding of so many rows does not have."""
    highest = max((max(ids, default=0) for ids in sequences), default=0)
    if highest >= rows:
        raise UserError(
            f"there is a token {highest}, but the model's embedding has {rows} rows: take its text out of the"
            " prompt, or give the model's own tokenizer."
        )
