"""What a folder with a model holds beside its weights."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from unisd.errors import UserError

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)


def savable(generation_config: Any) -> Any:
    """The generation config, such that transformers saves it.

    A temperature or a nucleus without `do_sample` is refused at a save, though not at a load:
    whoever set it meant to sample.

    Raises:
        UserError: it contradicts itself in another way.
    """
    try:
        generation_config.validate(strict=True)
        return generation_config
    except ValueError:
        sampling = copy.deepcopy(generation_config)
        sampling.do_sample = True
    try:
        sampling.validate(strict=True)
    except ValueError as error:
        raise UserError(
            f"the model's generation_config.json cannot be saved again: {' '.join(str(error).split())}"
        ) from None
    return sampling


def copy_tokenizer(source: str, folder: Path, trust_remote_code: bool = False) -> Any:
    """Save the tokenizer of a model (a folder or hub id) as it is, with its chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    tokenizer.save_pretrained(folder)
    return tokenizer


def copy_processor(source: str, folder: Path) -> None:
    """Copy what a model (a folder or hub id) says of images, sounds and videos, if anything."""
    from transformers.utils import cached_file

    for name in PROCESSOR_FILES:
        found = cached_file(
            source,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None:
            shutil.copyfile(found, folder / name)
    if Path(source).is_dir():
        for code in Path(source).glob("*.py"):  # a model whose code comes with it
            shutil.copyfile(code, folder / code.name)
