"""What a folder with a model holds beside its weights."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from unisd.errors import UserError

OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)


def savable(generation_config: Any) -> Any:
    """The generation config, such that transformers saves it.

    A temperature or a nucleus without `do_sample` is refused at a save, though not at a load.
    Where nothing is said of `do_sample`, they mean sampling; beside a false one they mean nothing.

    Raises:
        UserError: it contradicts itself in another way.
    """
    try:
        generation_config.validate(strict=True)
        return generation_config
    except ValueError:
        mended = copy.deepcopy(generation_config)
        if mended.do_sample is None:
            mended.do_sample = True
        for name in () if mended.do_sample else OF_SAMPLING:
            setattr(mended, name, None)
    try:
        mended.validate(strict=True)
    except ValueError as error:
        raise UserError(
            f"the model's generation_config.json cannot be saved again: {' '.join(str(error).split())}"
        ) from None
    return mended


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
