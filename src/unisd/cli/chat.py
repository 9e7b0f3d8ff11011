"""`unisd chat`: try a saved model, side by side with its base."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from unisd.cli.parser import CommandParser, add_template_options, add_trust, at_least_one
from unisd.errors import UserError
from unisd.models.adapters import is_adapter
from unisd.models.inference import load_any


def chat_command(arguments: Sequence[str]) -> int:
    """Answer prompts, one by one (no memory), if wanted beside the base model."""
    parser = CommandParser("chat", "Try a model; each prompt stands alone, as in training.")
    parser.add_argument("folder", metavar="DIR", help="model or adapter folder, or a model name")
    parser.add_argument(
        "--compare", metavar="BASE", help="another model beside it; `base`: the one it was adapted from"
    )
    parser.add_argument("--prompt", help="answer this one prompt and end")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    parser.add_argument("--seed", type=int, default=0)
    add_trust(parser)
    add_template_options(parser)
    options = parser.parse(arguments)
    if options is None:
        return 0

    at_least_one(max_new_tokens=options.max_new_tokens)
    from unisd.console import make_console, quiet_libraries, show_answers
    from unisd.data.rendering import set_options

    quiet_libraries()
    console = make_console()
    model, tokenizer = load_any(options.folder, trust_remote_code=options.trust_remote_code)
    speakers: list[tuple[str, Any, Any, bool]] = [(options.folder, model, tokenizer, False)]
    if options.compare == "base" and is_adapter(options.folder):
        speakers.insert(0, ("base", model, tokenizer, True))
    elif options.compare is not None:
        name = _base_of(options.folder) if options.compare == "base" else options.compare
        speakers.insert(0, (name, *load_any(name, trust_remote_code=options.trust_remote_code), False))

    for _, _, own, _ in speakers:
        set_options(own, options.chat_template_kwargs)

    def answer(prompt: str, number: int) -> None:
        texts = []
        for name, speaker, own_tokenizer, bare in speakers:
            with speaker.disable_adapter() if bare else nullcontext():
                texts.append((name, _answer(speaker, own_tokenizer, prompt, options, number)))
        show_answers(console, texts)

    if options.prompt is not None:
        answer(options.prompt, 0)
    elif sys.stdin is None or not sys.stdin.isatty():
        prompt = _piped()
        if not prompt:
            raise UserError("there is no prompt: give --prompt TEXT, or text on standard input.")
        answer(prompt, 0)
    else:
        _read_and_answer(answer)
    return 0


def _piped() -> str:
    """What comes on standard input; empty where that is closed."""
    try:
        return "" if sys.stdin is None else sys.stdin.read().strip()
    except (OSError, ValueError) as error:  # closed, or not in its encoding
        raise UserError(f"standard input cannot be read ({error}): give --prompt TEXT.") from None


def _read_and_answer(answer: Any) -> None:
    print("an empty line or Ctrl-D ends")
    number = 0
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            print()
            return
        if not prompt:
            return
        try:
            answer(prompt, number)
        except UserError as error:  # of this prompt alone
            print(f"error: {error}")
        number += 1


def _answer(model: Any, tokenizer: Any, prompt: str, options: argparse.Namespace, number: int) -> str:
    from unisd.data.prompts import encode_prompt
    from unisd.data.thoughts import completion_text
    from unisd.models.load import context_length
    from unisd.models.tokens import eos_ids, pad_id
    from unisd.rollout.engine import Sampling
    from unisd.rollout.transformers_engine import generate

    ids, context = encode_prompt(tokenizer, prompt), context_length(model)
    if context is not None and len(ids) >= context:
        raise UserError(
            f"the prompt has {len(ids)} tokens, and the model's context is {context}: shorten it."
        )
    completion = generate(
        model,
        [ids],
        Sampling(options.max_new_tokens, options.temperature or 1.0),
        eos_ids=eos_ids(model, tokenizer),
        pad_id=pad_id(model, tokenizer),
        keys=[(options.seed, 0, number, 0)] if options.temperature > 0 else None,
    )[0]
    return completion_text(tokenizer, completion.ids)


def _base_of(folder: str) -> str:
    """The model that a run of ours started from."""
    try:
        name = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{folder} has no results.json that names its base: give it, --compare MODEL."
        ) from None
    return str(name)
