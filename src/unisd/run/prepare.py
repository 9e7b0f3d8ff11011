"""Builds contexts and wrong references for rows that lack them, before a training run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from unisd.config import UniSDConfig
from unisd.console import show_progress
from unisd.data import contexts, negatives
from unisd.data.prompts import encode_prompt
from unisd.data.rendering import OPTIONS, rendered_with
from unisd.data.rows import Row
from unisd.data.thoughts import answer_of, completion_text
from unisd.files import cache_dir
from unisd.http_client import Unavailable
from unisd.methods.registry import parse_weight
from unisd.rollout.engine import seed_of
from unisd.run.chat_server import ChatServer
from unisd.run.inputs import RunData
from unisd.run.options import RunOptions
from unisd.tasks.base import as_grade

logger = logging.getLogger(__name__)

WRITTEN_TOKENS = 192  # most tokens of an instruction or a wrong answer
POOLED_TOKENS = 2048  # tokens of a forward pass of the model's own embeddings


class ModelEmbedder:
    """The model's own final hidden states, averaged over a text's tokens."""

    name = "model"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        from unisd.backbone import Backbone
        from unisd.batching import collate, forward_batches

        backbone = Backbone(self.model)
        sequences = [
            self.tokenizer(text, add_special_tokens=False)["input_ids"][:POOLED_TOKENS] or [0]
            for text in texts
        ]
        found: list[np.ndarray] = [np.zeros(0)] * len(texts)
        self.model.eval()
        with show_progress("embedding", len(texts)) as advance:
            for chosen in forward_batches([len(s) for s in sequences], POOLED_TOKENS, packed=False):
                batch = collate([sequences[i] for i in chosen], False, 0, self.model.device)
                final_BLH = backbone.forward(self.model, batch).final
                assert final_BLH is not None
                for place, i in enumerate(chosen):
                    found[i] = final_BLH[place, : len(sequences[i])].float().mean(0).cpu().numpy()
                advance(len(chosen))
        return np.stack(found)


def writer(model: Any, tokenizer: Any, seed: int, what: str) -> Callable[[list[str], int], list[str]]:
    """What the model writes to prompts, sampled; another try draws anew."""
    from unisd.models.tokens import eos_ids, pad_id
    from unisd.rollout.engine import Sampling
    from unisd.rollout.transformers_engine import generate

    def write(prompts: list[str], attempt: int) -> list[str]:
        keys = [(seed, attempt, i, 0) for i in range(len(prompts))]
        with show_progress(f"writing {what}", len(prompts)) as advance:
            written = generate(
                model,
                [encode_prompt(tokenizer, prompt) for prompt in prompts],
                Sampling(WRITTEN_TOKENS, temperature=0.7, top_p=0.95),
                eos_ids=eos_ids(model, tokenizer),
                pad_id=pad_id(model, tokenizer),
                keys=keys,
                on_rows=advance,
            )
        return [answer_of(completion_text(tokenizer, completion.ids)).strip() for completion in written]

    return write


def server_writer(server: ChatServer, seed: int, what: str) -> Callable[[list[str], int], list[str]]:
    """The same by a server's model."""

    def write(prompts: list[str], attempt: int) -> list[str]:
        with show_progress(f"writing {what}", len(prompts)) as advance:
            seeds = [seed_of((seed, attempt, i, 0)) for i in range(len(prompts))]
            drawn: dict[str, Any] = {"max_tokens": WRITTEN_TOKENS, "temperature": 0.7, "top_p": 0.95}
            told = server.answers(prompts, seeds=seeds, on_rows=advance, **drawn)
        for answer in told:  # what is missing because of an outage must not be kept as found nowhere
            if isinstance(answer.failed, Unavailable):
                raise server.problem(answer.failed) from answer.failed
        return [answer_of(answer.text).strip() for answer in told]

    return write


def _with_contexts(
    rows: Sequence[Row],
    settings: contexts.Settings,
    load: Callable[[], tuple[Any, Any]],
    server: ChatServer | None = None,
) -> list[Row]:
    """The rows with contexts; `server` writes them in the place of the model that `load` gives."""
    embedder: contexts.Embedder | None = None
    write = None
    key = ""
    if server is not None and settings.kind == "induction":
        write = server_writer(server, settings.seed, "instructions")
        key = f"{server.client.url} {server.model}"
    elif contexts.needs_model(settings.kind, settings.embedder):
        model, tokenizer = load()
        embedder, write = (
            ModelEmbedder(model, tokenizer),
            writer(model, tokenizer, settings.seed, "instructions"),
        )
        key = model_key(model, tokenizer)
    elif settings.kind == "retrieval" and settings.embedder != "tfidf":
        embedder = contexts.SentenceTransformerEmbedder(settings.embedder)
    return contexts.build(
        rows,
        settings,
        embedder=embedder,
        write=write,
        model_key=key,
        cache_dir=cache_dir() / "contexts",
    )


def prepare(
    data: RunData, options: RunOptions, config: UniSDConfig, load: Callable[[], tuple[Any, Any]]
) -> list[Row]:
    """Build the contexts and wrong references that the options ask for; `data.contexts` says where
    the contexts come from.

    Args:
        load: gives model and tokenizer; called where something is to be written or embedded by the
            model.

    Returns:
        The training rows with them.

    Raises:
        UserError: see `contexts.build` and `negatives.build`.
    """
    rows = data.train
    written = options.agreement_contexts == "induction" or options.negatives == "model"
    if options.writer_url and not written:
        logger.warning("writer_url is not used: it needs agreement_contexts=induction or negatives=model.")
    server = ChatServer(options.writer_url, options.writer_model) if options.writer_url and written else None
    with_contexts = _wants_contexts(data, options, config)
    data.contexts = _contexts_line(data, options, with_contexts)
    if with_contexts:
        rows = [{name: row[name] for name in row if name != "auxiliary_contexts"} for row in rows]
        settings = contexts.Settings(
            options.agreement_contexts, config.num_auxiliary_contexts, config.seed, options.embedder
        )
        rows = _with_contexts(rows, settings, load, server)
    if options.negatives != "columns":
        rows = _with_negatives(rows, data, options, config, load, server)
    short = sum(len(row.get("auxiliary_contexts") or []) < config.num_auxiliary_contexts for row in rows)
    if with_contexts and short:
        logger.warning(
            "%d of %d rows have fewer than %d auxiliary contexts.",
            short,
            len(rows),
            config.num_auxiliary_contexts,
        )
    without = sum(not row.get("negative_context") for row in rows)
    if options.negatives != "columns" and without:
        logger.warning(
            "%d of %d rows have no wrong reference: they train without the contrast term.", without, len(rows)
        )
    return rows


def _wants_contexts(data: RunData, options: RunOptions, config: UniSDConfig) -> bool:
    """Whether the user asks for contexts, or a weight of the recipe needs others than there are.

    What the recipe says leaves the user's own contexts alone, and a task's of the same kind, but
    for a teacher that is told of another problem: which one is what the recipe is about. A single
    row has no others.
    """
    kind = options.agreement_contexts
    if kind == "columns" or "agreement_contexts" in options.explicit:
        return kind != "columns"
    needed = any("auxiliary" in parse_weight(text).needs for text in config.reliability_weights)
    told = config.teacher_context == "other"
    others = told or not _with_some(data) or _brought(data) not in ("columns", kind)
    return (needed or told) and len(data.train) > 1 and others


def _with_some(data: RunData) -> int:
    return sum(bool(row.get("auxiliary_contexts")) for row in data.train)


def _brought(data: RunData) -> str:
    """Of which kind the contexts are that the rows bring."""
    return "columns" if data.task is None else data.task.contexts


def _contexts_line(data: RunData, options: RunOptions, built: bool) -> str:
    """Which contexts are used, and who has said so."""
    had, explicit = _with_some(data), "agreement_contexts" in options.explicit
    own = "the rows' own column auxiliary_contexts"
    theirs = own if _brought(data) == "columns" else f"those of task {data.name} ({_brought(data)})"
    if built:
        kind = options.agreement_contexts
        kind += f" by {options.embedder}" if kind == "retrieval" else ""
        asked = "agreement_contexts" if explicit else f"recipe {options.recipe}"
        place = f", in the place of {theirs}, {had} of {len(data.train)} rows" if had else ""
        return f"auxiliary contexts: {kind}, as {asked} says{place}"
    others = "" if explicit else "; --agreement_contexts retrieval builds others"
    return f"auxiliary contexts: {theirs if had else 'none'}{others}"


def _with_negatives(
    rows: list[Row],
    data: RunData,
    options: RunOptions,
    config: UniSDConfig,
    load: Callable[[], tuple[Any, Any]],
    server: ChatServer | None,
) -> list[Row]:
    if kept := sum(bool(row.get("negative_context")) for row in rows):
        logger.warning(
            "negatives=%s is for rows without a wrong reference: %d of %d rows keep the one that they bring.",
            options.negatives,
            kept,
            len(rows),
        )
    write, key = None, ""
    if options.negatives == "model" and server is not None:
        write, key = server_writer(server, config.seed, "wrong answers"), _name_of(server)
    elif options.negatives == "model":
        model, tokenizer = load()
        write, key = writer(model, tokenizer, config.seed, "wrong answers"), model_key(model, tokenizer)
    # What a function in Python proves wrong cannot be found again under a name.
    grade = data.grade
    is_named = grade is None or data.task is not None or options.grader is not None
    return negatives.build(
        rows,
        options.negatives,
        seed=config.seed,
        grade=None if grade is None else lambda row, text: as_grade(grade(row, text)).correct,
        write=write,
        template=data.task.negative_prompt_template if data.task is not None else None,
        model_key=f"{key} {data.name} {options.grader} {options.task_options}",
        cache_dir=cache_dir() / "contexts" if is_named else None,
    )


def _name_of(server: ChatServer) -> str:
    """Under which its texts are kept, as `model_key` of a model."""
    return f"{server.client.url} {server.model}"


def model_key(model: Any, tokenizer: Any) -> str:
    """Name and revision of a model, a hash of some of its weights, and how chats are rendered.

    A folder's content may change under its name.
    """
    import hashlib

    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        digest.update(name.encode())
        digest.update(flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    if chosen := rendered_with(tokenizer).get(OPTIONS):
        digest.update(repr(chosen).encode())
    return f"{model.config._name_or_path} {getattr(model.config, '_commit_hash', None)} {digest.hexdigest()}"
