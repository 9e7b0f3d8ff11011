"""Measures the `before` of a run once for all runs that share it.

Figures in a folder, keyed by everything that they depend on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unisd import __version__
from unisd.config import UniSDConfig
from unisd.files import check_writable, write_json
from unisd.run.inputs import RunData
from unisd.run.options import RunOptions


def key_of(options: RunOptions, config: UniSDConfig, data: RunData, rendered: Any = None) -> str:
    """Hash the model, the evaluated rows and the limits of their answers.

    Seeds and training options are not among them. `rendered`: `rendering.rendered_with`.
    """
    folder = Path(options.model_name_or_path)
    files = sorted(folder.glob("*")) if folder.is_dir() else [folder] if folder.is_file() else []
    parts = {
        "version": __version__,
        "model": [options.model_name_or_path, options.dtype, options.load_in_4bit, options.use_peft],
        "files": [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files],
        "data": [data.name, options.grader, options.task_options],
        "rows": [data.evaluation, [(one.name, one.rows, one.free, one.cap) for one in data.retention]],
        "answers": [config.eval_max_new_tokens, config.max_completion_length, config.rollout_batch_size],
        "kept": options.answers_kept,
        "rendered": rendered,
        "computed": [str(config.device), config.mixed_precision],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def measured_once(folder: str | None, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `measure` does, from `folder`/`key`.json if it is there.

    Several runs at once wait for the first one.

    Without a folder nothing is kept. A run that is killed while it measures leaves nothing, and the
    next one measures.
    """
    if folder is None:
        return measure()
    check_writable(Path(folder), "before_cache")
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / f"{key}.json"
    with (Path(folder) / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            write_json(path, measure())
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
