"""What a saved model needs beside its weights, so that it opens everywhere and as what it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from unisd.models.adapters import name_base
from unisd.models.load import without_adapter

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
"""Of models for images and sound: how those are read, which training on text does not change."""


def complete(folder: Path, model: Any) -> None:
    """Add to a saved model or adapter what `save_pretrained` of it and its tokenizer leave out."""
    base = without_adapter(model)
    if base is not model:
        name_base(folder, base)
    for name in PROCESSOR_FILES:
        if (source := _file_of(base, name)) is not None and not (folder / name).exists():
            shutil.copyfile(source, folder / name)


def _file_of(base: Any, name: str) -> str | None:
    """A file of the model that was opened, where it has one, without asking the hub."""
    path = getattr(base, "name_or_path", None)
    if not path:
        return None
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        found: str | None = cached_file(path, name, local_files_only=True, **quiet)
    except (OSError, ValueError):  # a folder that is no more
        return None
    return found
