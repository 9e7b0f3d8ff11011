"""Checkpoints that are whole or not there: written aside, checksummed, flushed, then renamed.

A checkpoint is built in `.saving/checkpoint-N` beside the others. Its last file is `manifest.json`,
with the size and SHA-256 of every other one; then everything is flushed to the disk and the folder
is renamed to `checkpoint-N`. A kill, a full disk or a crash of the machine at any moment leaves the
older checkpoints as they were, and what they left of the new one is never taken for a checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unisd.errors import UserError, by_caller
from unisd.files import METRICS, RESULTS, follow_umask

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STAGING = ".saving"  # folder inside the output folder
ASIDE = "set-aside"  # another one, for checkpoints of steps that a resumed run does again
STATE = "trainer_state.json"
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "shards", "global_step*")  # in one of these it lies


def staging_folder(output_dir: str | Path) -> Path:
    """Where a checkpoint is built: on the same file system as its final place, so that the last
    step is a rename.
    """
    return Path(output_dir) / STAGING


def clear_staging(output_dir: str | Path) -> None:
    """Remove what an earlier save that was cut short has left."""
    shutil.rmtree(staging_folder(output_dir), ignore_errors=True)


def publish(output_dir: str | Path, name: str) -> Path:
    """Seal the checkpoint that lies in the staging folder and put it in its place; returns that
    place.

    An older checkpoint of the same name is replaced. By one process, after all ranks have written
    their files.
    """
    staged, final = staging_folder(output_dir) / name, Path(output_dir) / name
    follow_umask(staged)
    write_manifest(staged)
    _sync_tree(staged)
    replaced = staging_folder(output_dir) / f"{name}.replaced"
    if final.exists():
        final.rename(replaced)
    staged.rename(final)
    _sync_folder(final.parent)
    clear_staging(output_dir)
    return final


def set_aside_after(output_dir: str | Path, step: int) -> None:
    """Move the checkpoints of later steps into `set-aside`: a run that goes on from `step` leaves
    their branch.

    Beside the new ones they would count as the newest, for `save_total_limit` and for the next
    resume. Nothing is removed.
    """
    for number, folder in _numbered(output_dir):
        if number <= step:
            continue
        places = (
            Path(output_dir) / ASIDE / (folder.name + end)
            for end in ("", *(f".{again}" for again in range(2, 10_000)))
        )
        place = next(place for place in places if not place.exists())
        place.parent.mkdir(exist_ok=True)
        folder.rename(place)
        logger.warning("%s is of a step that comes again: moved to %s.", folder.name, place)


def write_manifest(folder: Path) -> None:
    """Size and SHA-256 of every file of `folder`, as `manifest.json` in it."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in _files(folder)
    }
    (folder / MANIFEST).write_text(
        json.dumps({"version": 1, "files": files}, indent=1) + "\n", encoding="utf-8"
    )


def problem_of(folder: str | Path, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it is whole.

    Args:
        contents: also compare checksums (reads every byte); without it only names and sizes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        files: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))[
            "files"
        ]
    except FileNotFoundError:
        return (
            f"it has no {MANIFEST}, so it is not a checkpoint of a run like this, or it was only partly"
            " copied"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    if STATE not in files:
        return f"it has no {STATE}"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
        if contents and _sha256(path) != expected["sha256"]:
            return f"the content of {name} has changed (checksum)"
    return None


def last_complete_checkpoint(output_dir: str | Path, contents: bool = False) -> Path | None:
    """The newest whole checkpoint of a run, or None; broken ones that are newer are named in a
    warning.
    """
    for _, folder in sorted(_numbered(output_dir), reverse=True):
        problem = problem_of(folder, contents)
        if problem is None:
            return folder
        logger.warning("%s is passed over: %s.", folder, problem)
    return None


def require_whole(folder: str | Path, contents: bool = True) -> None:
    """Raise `UserError` if the checkpoint is broken; the message names the newest good one beside
    it.

    contents: as for `problem_of`.
    """
    problem = problem_of(folder, contents)
    if problem is None:
        return
    good = last_complete_checkpoint(Path(folder).parent, contents=True)
    remedy = (
        f"resume from {good}, the newest complete one"
        if good is not None
        else "there is no complete one beside it, start again"
    )
    raise UserError(f"checkpoint {folder} is broken: {problem}: {remedy}.")


def step_of(folder: str | Path) -> int:
    """The optimizer step that a checkpoint was saved after."""
    state: dict[str, Any] = json.loads((Path(folder) / STATE).read_text(encoding="utf-8"))
    return int(state["global_step"])


def holds_optimizer(folder: str | Path) -> bool:
    """Whether a checkpoint can be resumed from: with save_only_model it has the weights alone."""
    return any(any(Path(folder).glob(name)) for name in OPTIMIZER)


def require_optimizer(folder: str | Path) -> None:
    """Raise `UserError` if a checkpoint holds weights only: its moments would begin anew."""
    if not holds_optimizer(folder):
        option = by_caller("--model_name_or_path", "model")
        raise UserError(
            f"{folder} holds no optimizer (save_only_model), so it cannot be resumed: start a new run from"
            f" the model in it ({option}; `unisd merge` makes a model of an adapter), and unset"
            " save_only_model if that run is to be resumed."
        )


def require_unused(output_dir: str | Path, checkpoint: str | Path | None = None) -> None:
    """Raise `UserError` if a run would mix its files with those of another.

    Args:
        checkpoint: which the run goes on from; its own folder is the run's.
    """
    folder = Path(output_dir)
    if checkpoint is not None and Path(checkpoint).resolve().parent == folder.resolve():
        return
    found = [name for name in (METRICS, RESULTS) if (folder / name).exists()]
    found = [path.name for _, path in sorted(_numbered(folder))][-1:] + found
    if found:
        raise UserError(
            f"{folder} holds another run ({', '.join(found)}): continue it with resume_from_checkpoint=True,"
            " choose another output_dir, or remove these files."
        )


def saving_failed(error: Exception, output_dir: str | Path, name: str) -> UserError:
    """The message for a disk that was full while `name` was saved: nothing is lost but the steps
    since the last checkpoint.
    """
    good = last_complete_checkpoint(output_dir)
    kept = (
        f"{good.name} is complete: free some space, then resume from it"
        if good
        else "free some space, then start again"
    )
    reason = "" if isinstance(error, OSError) else f" ({type(error).__name__})"
    return UserError(
        f"the disk was full while {name} was saved in {output_dir}{reason}; {kept}, or choose another"
        " output_dir."
    )


def disk_is_full(error: BaseException) -> bool:
    """Also as safetensors and torch say it, in exceptions of their own."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    said = str(error)
    texts = ("No space left on device", "PytorchStreamWriter failed writing", "iostream error")
    # what torch says as it closes a file that it could not write
    full = (
        full
        or any(text in said for text in texts)
        or ("inline_container" in said and "unexpected pos" in said)
    )
    return full or (error.__context__ is not None and disk_is_full(error.__context__))


def _numbered(output_dir: str | Path) -> list[tuple[int, Path]]:
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    return [
        (int(path.name.rpartition("-")[2]), path)
        for path in folders
        if path.name.rpartition("-")[2].isdigit()
    ]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_tree(folder: Path) -> None:
    """To the disk: a rename that outlives a power cut must not point to files that do not."""
    for path in [*_files(folder), folder / MANIFEST]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync_folder(path)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
