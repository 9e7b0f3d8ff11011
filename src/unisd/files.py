"""The files that a run leaves behind, by name, and how they are read and written.

Light: whatever only reads results starts at once.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from unisd.errors import UserError, flag

RESULTS = "results.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
ANSWERS = "answers.json"
GRAFTING = "grafting.json"
JUDGE = "judge.json"
PROBE = "probe.json"  # the answers that the diagnostics compare with
TRAINED_ON = "trained_on.json"  # which problems, as marks (`data.text.problem_mark`)
REPORT = "report.html"
CONFIG = "config.yaml"  # the options of a run, for the same run again
GRADIENT = "gradient/"  # in METRICS: what a mechanism makes of the gradient
OF_A_RUN = (RESULTS, METRICS, SAMPLES, ANSWERS, PROBE)
"""What nothing else writes: a folder that holds one of them is a run's."""
WRITTEN = (
    *OF_A_RUN,
    *(GRAFTING, JUDGE, REPORT, CONFIG, TRAINED_ON, "README.md", "training_args.bin", "config.json"),
    "generation_config.json",
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model-*-of-*.safetensors"),
    *("adapter_model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates/*.jinja", "preprocessor_config.json", "processor_config.json"),
    *("image_processor_config.json", "video_preprocessor_config.json", "feature_extractor_config.json"),
)
"""Every file that a run may write beside its checkpoints, as patterns: a new run in the folder of
another removes those, so that none is left to be opened together with its own.
"""
Record = dict[str, Any]


def cache_dir() -> Path:
    """The root of the local cache (`UNISD_CACHE`, else ~/.cache/unisd); not created here."""
    return Path(os.environ.get("UNISD_CACHE") or Path.home() / ".cache" / "unisd")


def why_unwritable(folder: Path) -> str | None:
    """What keeps a folder from being made or written into, if anything. Leaves nothing behind."""
    existing = folder
    while not existing.exists() and not existing.is_symlink() and existing != existing.parent:
        existing = existing.parent
    try:
        if not existing.is_dir():
            return f"{existing}: is not a folder"
        with tempfile.TemporaryDirectory(prefix=".unisd-", dir=existing):
            return None
    except OSError as error:
        return f"{existing}: {error.strerror or error}"


def check_writable(folder: Path, option: str = "output_dir") -> None:
    """Find out now, not after an hour of training.

    Raises:
        UserError: the folder of this option is not one, or not writable.
    """
    if reason := why_unwritable(folder):
        raise UserError(f"{option} {folder} cannot be written ({reason}): choose another --{option}.")


def follow_umask(folder: Path) -> None:
    """Give the files of a folder the permissions that new files have.

    safetensors writes files that only their owner may read, whatever the umask says.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600:
            path.chmod(0o666 & ~mask)


def written_in(folder: Path) -> list[Path]:
    """The files of a folder that a run may have written, or would replace."""
    return sorted(path for pattern in WRITTEN for path in folder.glob(pattern) if not path.is_dir())


def check_not_the_model(folder: Path, model: str) -> None:
    """Raise `UserError` if a run would write over the model that it trains, or over its base.

    Args:
        model: a name or path; only folders can be written over.
    """
    places = [Path(model).expanduser()] if model else []
    with suppress(OSError, ValueError, AttributeError):
        adapter = json.loads((places[0] / "adapter_config.json").read_text("utf-8")) if places else {}
        places += [Path(adapter["base_model_name_or_path"])] if adapter else []
    for place in places:
        if not place.is_dir():
            continue
        parts = place.resolve().parts[len(folder.resolve().parts) :]
        if place.resolve() == folder.resolve():
            raise UserError(
                f"output_dir {folder} is the folder of the model itself ({place}), which the trained one"
                f" would replace: choose another {flag('output_dir')}."
            )
        if place.resolve().is_relative_to(folder.resolve()) and parts[0].startswith(("checkpoint-", ".")):
            raise UserError(
                f"the model {place} is a checkpoint in output_dir {folder}, where a run removes and replaces"
                f" checkpoints: choose another {flag('output_dir')}."
            )


def write_text(path: str | Path, text: str) -> None:
    """Write a file that the user asked for, with the folders above it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


def write_lines(path: str | Path, records: Iterable[Record]) -> None:
    """As `write_text`: one JSON object a line."""
    write_text(path, "".join(json.dumps(record, default=str) + "\n" for record in records))


def write_json(path: Path, content: Record) -> None:
    """As `write_whole`."""
    write_whole(path, json.dumps(content, indent=2, default=str) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: readers may look while the run writes."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # two processes may write the same
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def parsed(text: str | bytes) -> Any:
    """What a text holds as JSON; None where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: nested too deep
        return None


def left_by_run(model: str | Path | None, name: str) -> Record:
    """A JSON file that the run of a model, or of one of its checkpoints, has left; else empty."""
    if not model:
        return {}
    folder = Path(model).expanduser()
    folder = folder.parent if folder.resolve().name.startswith("checkpoint-") else folder
    with suppress(OSError, ValueError):  # no folder, or not of a run of ours
        found = json.loads((folder / name).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def config_of_run(model: str | Path | None) -> Record:
    """The options of the run that left a model, as `results.json` keeps them; else empty."""
    config = left_by_run(model, RESULTS).get("config")
    return config if isinstance(config, dict) else {}


def read_lines(path: Path) -> list[Record]:
    """The objects of a JSON-lines file; lines that a kill cut short are left out."""
    records = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        record = parsed(line)
        if isinstance(record, dict):
            records.append(record)
    return records


def is_evaluation(record: Record) -> bool:
    """Whether a line of `metrics.jsonl` is of an evaluation, not of an optimizer step."""
    return any(name.startswith("eval_") for name in record)


def keep_until(path: Path, step: int) -> list[Record]:
    """Drop the records of later steps (which a resumed run does again) and a line that a kill cut
    short; returns the others.
    """
    if not path.exists():
        return []
    kept = [record for record in read_lines(path) if record["step"] <= step]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def append_line(path: Path, record: Record) -> None:
    """Add one line, on the disk when this returns.

    A line that an earlier kill cut short is removed first.
    """
    line = json.dumps(record, default=str).encode() + b"\n"
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that names a key twice, of which PyYAML keeps the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        assert node is not None
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.YAMLError(f"{key.value!r} is given twice{key.start_mark}")
            seen.add(key.value)
        return node


def read_yaml(path: Path) -> Record:
    """The mapping in a YAML file.

    Raises:
        UserError: not a file, not YAML, a key that is given twice, or not a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of option names to values.")
    return content
