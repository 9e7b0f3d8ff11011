"""`unisd merge` and `unisd chat`: what one does with a saved model; and what the small commands share."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from unisd.artefacts import check_writable, why_unwritable
from unisd.errors import UserError


class CommandParser(argparse.ArgumentParser):
    """argparse, with mistakes as `UserError`.

    Args:
        shared: options of `unisd train` that the command takes too (`parsing.shared_options`).
    """

    def __init__(self, command: str, description: str, shared: argparse.ArgumentParser | None = None) -> None:
        parents = [] if shared is None else [shared]
        super().__init__(prog=f"unisd {command}", description=description, allow_abbrev=False, parents=parents)

    def error(self, message: str) -> Any:
        raise UserError(f"{message} (see {self.prog} --help).")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace | None:
        """None after `--help`."""
        try:
            return self.parse_args(list(arguments))
        except SystemExit:
            return None


def at_least_one(**values: int | None) -> None:
    """Refuse a number below 1, by its flag."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: at least 1 is needed.")


def add_trust(parser: CommandParser) -> None:
    """The flag of commands that load a model without `unisd train`'s options."""
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")


def output_file(text: str) -> Path:
    """Type of a flag that names a file to write: refused before any work if it cannot be written."""
    path = Path(text)
    if path.is_dir():
        reason: str | None = "it is a folder"
    elif path.exists():  # a device too
        reason = None if os.access(path, os.W_OK) else "permission denied"
    else:
        reason = why_unwritable(path.parent)
    if reason is not None:
        raise argparse.ArgumentTypeError(f"{path} cannot be written ({reason})")
    return path


def _is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def load_any(name: str, dtype: str = "auto", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A model (an adapter folder gets its base beneath it) ready for inference, and its tokenizer."""
    import torch

    from unisd.models import load_model_and_tokenizer

    model, tokenizer, _ = load_model_and_tokenizer(name, dtype=dtype, trust_remote_code=trust_remote_code)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model.to(device or "cpu").eval(), tokenizer


def merge(arguments: list[str]) -> int:
    """Make a full model of an adapter and its base."""
    parser = CommandParser("merge", "Merge a LoRA adapter into its base model, in float32, and save the full model.")
    parser.add_argument("folder", metavar="DIR", help="folder with adapter_config.json")
    parser.add_argument("--output_dir", help="where the full model goes (default: DIR-merged)")
    parser.add_argument("--dtype", default="auto", help="precision of the saved weights (default: the base's)")
    add_trust(parser)
    options = parser.parse(arguments)
    if options is None:
        return 0
    folder = Path(options.folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one that `unisd train --use_peft` wrote.")
    if not _is_adapter(folder):
        full = " It is a full model already: nothing needs merging." if (folder / "config.json").is_file() else ""
        raise UserError(f"{folder} holds no adapter (adapter_config.json).{full}")
    output = Path(options.output_dir) if options.output_dir else folder.with_name(f"{folder.name}-merged")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already: choose another --output_dir.")

    from unisd.console import quiet_libraries

    quiet_libraries()
    check_writable(output)
    import torch

    model, tokenizer = load_any(str(folder), trust_remote_code=options.trust_remote_code)
    target = model.dtype if options.dtype == "auto" else getattr(torch, options.dtype, None)
    if not isinstance(target, torch.dtype):
        raise UserError(f"--dtype {options.dtype} is no precision: use float32, bfloat16 or float16.")
    # In float32: rounding the sum of base and adapter once is all the error there is.
    merged = model.float().merge_and_unload().to(target)
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"written to {output}: a full model in {str(target).removeprefix('torch.')}")
    return 0


def chat(arguments: list[str]) -> int:
    """Answer prompts, one by one (no memory), if wanted beside the base model."""
    parser = CommandParser("chat", "Try a model; each prompt stands alone, as in training.")
    parser.add_argument("folder", metavar="DIR", help="model or adapter folder, or a model name")
    parser.add_argument("--compare", metavar="BASE", help="another model beside it; `base`: the one it was adapted from")
    parser.add_argument("--prompt", help="answer this one prompt and end")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    parser.add_argument("--seed", type=int, default=0)
    add_trust(parser)
    options = parser.parse(arguments)
    if options is None:
        return 0

    at_least_one(max_new_tokens=options.max_new_tokens)
    from unisd.console import make_console, quiet_libraries, show_answers

    quiet_libraries()
    console = make_console()
    model, tokenizer = load_any(options.folder, trust_remote_code=options.trust_remote_code)
    speakers: list[tuple[str, Any, Any, bool]] = [(options.folder, model, tokenizer, False)]
    if options.compare == "base" and _is_adapter(options.folder):
        speakers.insert(0, ("base", model, tokenizer, True))
    elif options.compare is not None:
        name = _base_of(options.folder) if options.compare == "base" else options.compare
        speakers.insert(0, (name, *load_any(name, trust_remote_code=options.trust_remote_code), False))

    def answer(prompt: str, number: int) -> None:
        texts = []
        for name, speaker, own_tokenizer, bare in speakers:
            with speaker.disable_adapter() if bare else nullcontext():
                texts.append((name, _answer(speaker, own_tokenizer, prompt, options, number)))
        show_answers(console, texts)

    if options.prompt is not None:
        answer(options.prompt, 0)
    elif not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise UserError("there is no prompt: give --prompt TEXT, or text on standard input.")
        answer(prompt, 0)
    else:
        _read_and_answer(answer)
    return 0


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
        answer(prompt, number)
        number += 1


def _answer(model: Any, tokenizer: Any, prompt: str, options: argparse.Namespace, number: int) -> str:
    from unisd.models import eos_ids
    from unisd.prompts import encode_prompt
    from unisd.rollout import Sampling, generate

    ends = eos_ids(model, tokenizer)
    completion = generate(
        model,
        [encode_prompt(tokenizer, prompt)],
        Sampling(options.max_new_tokens, options.temperature or 1.0),
        eos_ids=ends,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0],
        keys=[(options.seed, 0, number, 0)] if options.temperature > 0 else None,
    )[0]
    return str(tokenizer.decode(completion.ids, skip_special_tokens=True))


def _base_of(folder: str) -> str:
    """The model that a run of ours started from."""
    try:
        name = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder} has no results.json that names its base: give it, --compare MODEL.") from None
    return str(name)
