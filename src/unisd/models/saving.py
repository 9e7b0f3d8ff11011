"""What a saved model needs beside its weights, so that it opens everywhere and as what it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.utils import CONFIG_NAME, cached_file

from unisd.errors import UserError
from unisd.files import follow_umask
from unisd.models.adapters import name_base, without_adapter

_COMPARED = (torch.float32, torch.bfloat16, torch.float16)
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
"""Of models for images and sound: how those are read, which training on text does not change."""


def copy_tokenizer(source: str, folder: Path, trust_remote_code: bool = False) -> Any:
    """Save the tokenizer of a model (a folder or hub id) as it is, with its chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    tokenizer.save_pretrained(folder)
    return tokenizer


def copy_processor(source: str, folder: Path) -> None:
    """Copy what a model (a folder or hub id) says of images, sounds and films, and its code."""
    for name in PROCESSOR_FILES:
        if (found := _file_of(source, name)) is not None and not (folder / name).exists():
            shutil.copyfile(found, folder / name)
    config = Path(source) / "config.json"
    if config.is_file() and "auto_map" in config.read_text(encoding="utf-8"):
        for code in Path(source).glob("*.py"):  # a model whose code comes with it
            if not (folder / code.name).exists():
                shutil.copyfile(code, folder / code.name)


def complete(folder: Path, model: Any) -> None:
    """Add to a saved model or adapter what `save_pretrained` of it and its tokenizer leave out.

    That others may read it, where the umask says so, is among that.
    """
    base = without_adapter(model)
    if base is not model:
        name_base(folder, base)
    if source := getattr(base, "name_or_path", None):
        copy_processor(source, folder)
    follow_umask(folder)


def check_as_saved(model: Any) -> None:
    """Raise `UserError` if a base in memory is no longer the one of its files.

    An adapter that is trained on it would be opened on those: by the first row of each weight, as
    training and merging change all of them. A base whose files are not at hand is not compared.
    """
    from safetensors import safe_open

    if getattr(model, "is_quantized", False):
        return
    name = getattr(model, "opened_as", None) or getattr(model, "name_or_path", None) or ""
    held = {key: weight for key, weight in model.named_parameters() if weight.dtype in _COMPARED}
    for file in _weight_files(str(name)):
        with safe_open(str(file), framework="pt") as stored:
            for key in held.keys() & {*stored.keys()}:
                weight, saved = held[key], stored.get_slice(key)
                if weight.is_meta or not weight.dim() or saved.get_shape() != list(weight.shape):
                    continue
                row, mine = saved[:1], weight[:1].detach().cpu()
                if row.dtype not in _COMPARED:
                    continue
                # It may have been loaded in 16 bits, and widened since.
                if not any(torch.equal(row.to(kind).to(mine.dtype), mine) for kind in _COMPARED):
                    raise UserError(
                        f"the model is not the one of {name} any more ({key} differs), and an adapter is"
                        " opened on that: save it first (save_pretrained), and load it from there."
                    )


def _weight_files(name: str) -> list[Path]:
    """The files of a model's weights, in a folder or the cache of the hub."""
    found = _file_of(name, CONFIG_NAME) if name else None
    return [] if found is None else sorted(Path(found).parent.glob("model*.safetensors"))


def _file_of(path: str, name: str) -> str | None:
    """A file of a model, where it has one, without asking the hub."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        found: str | None = cached_file(path, name, local_files_only=True, **quiet)
    except (OSError, ValueError):  # a folder that is no more
        return None
    return found
