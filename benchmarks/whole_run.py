"""Measures a whole SDFT job of ours and of TRL: from the start of a process to its saved model.

One process at a time, each with the same model folder, the same rows and as many new tokens.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.options import Options, Ratios, Rows
from benchmarks.settings import Star
from benchmarks.shapes import TEACHER_TEMPLATE, build, examples, tokenizer
from unisd.errors import UserError
from unisd.models.load import SMOLLM2, resolve

STEPS = {SMOLLM2: 4, "qwen2.5-0.5b": 1}
"""Optimizer steps by shape; these two are measured where none is named."""
COMPLETIONS = (64, 128, 256)
SIDES = ("ours", "ours default", "trl", "trl topk_logits")
"""`unisd train` with gradient checkpointing as TRL's trainer, and without, its default."""
PHASES = ("import", "load", "rollout", "score", "update", "save")


@dataclass(frozen=True)
class Job:
    """What a process is told, as JSON: the same on both sides."""

    folder: str  # of the model
    rows: str
    evaluated: str
    steps: int
    batch: int
    accumulation: int
    completion: int
    teacher_template: str = TEACHER_TEMPLATE
    alpha: float = Star.alpha
    temperature: float = Star.temperature
    ema_rate: float = Star.ema_rate
    learning_rate: float = Star.learning_rate

    @property
    def new_tokens(self) -> int:
        return self.steps * self.batch * self.accumulation * self.completion


def run(o: Options) -> tuple[Rows, Ratios]:
    """Measure the same SDFT job as `unisd train` and as a script with TRL's trainer, on a CPU.

    `--shape` and `--completion` name one of the two shapes and of the three lengths. SmolLM2 has
    its own weights; those of other shapes are random.
    """
    shapes = list(STEPS) if o.shape == "all" else [o.shape]
    lengths = [o.completion] if o.completion else list(COMPLETIONS)
    rows: Rows = []
    ratios: Ratios = {}
    with tempfile.TemporaryDirectory(prefix="unisd-bench-") as place:
        for shape in shapes:
            folder = Path(place) / shape
            words = _model_folder(shape, o, folder)
            job = _job(folder, words, STEPS.get(shape, 1), o)
            for length in lengths:
                found = _measured(replace(job, completion=length), o)
                rows += [{"impl": f"{shape}, {length} tokens: {side}", **row} for side, row in found.items()]
                for side in [side for side in SIDES[:2] if {side, "trl"} <= found.keys()]:
                    name = "_".join([shape, str(length), *side.split()[1:]])
                    for what, key in (("time", "time_s"), ("memory", "peak_memory_mb")):
                        ratios[f"{name}_{what}_vs_trl"] = found[side][key] / found["trl"][key]
            shutil.rmtree(folder)
    return rows, ratios


def _model_folder(shape: str, o: Options, folder: Path) -> list[str]:
    """Write the model without an end token, so that no answer ends early.

    Returns words of one token each.
    """
    if shape == SMOLLM2:
        source = resolve(SMOLLM2)
        shutil.copytree(source, folder)
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # it closes answers with another end
        tokens = AutoTokenizer.from_pretrained(source)
        tokens.chat_template = None
        # a space begins the word: the first of a text is another token, on both sides
        words = [word[1:] for word in tokens.get_vocab() if word[0] == "Ġ" and word[1:].isalpha()]
        words = sorted(word for word in words if word.isascii())
    else:
        # Beside a Qwen2 transformers takes every tokenizer for one of bytes: it knows no such word.
        model = build(shape, o.device, o.dtype, o.layers, family="llama")
        model.save_pretrained(folder)
        tokens = tokenizer(model.config.vocab_size)
        words = [f"t{i}" for i in range(3, model.config.vocab_size)]
        del model
        gc.collect()
    tokens.eos_token = None
    tokens.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        told = json.loads((folder / name).read_text(encoding="utf-8"))
        told["eos_token_id"] = None
        (folder / name).write_text(json.dumps(told), encoding="utf-8")
    return words


def _job(folder: Path, words: Sequence[str], steps: int, o: Options) -> Job:
    """Write rows for all steps, and one to report on, which `unisd train` does not go without."""
    count = steps * o.batch * o.accumulation
    # numbers of words, in the place of tokens
    drawn = examples(len(words) + 3, count + 1, (o.prompt, o.prompt), (1, 1))
    lines = []
    for row in drawn:
        said = [words[i - 3] for i in row.teacher]
        texts = {
            "prompt": " ".join(said[: o.prompt]),
            "privileged_context": " ".join(said[o.prompt :]),
        }
        lines.append(json.dumps(texts) + "\n")
    rows, evaluated = folder / "rows.jsonl", folder / "evaluated.jsonl"
    rows.write_text("".join(lines[:count]), encoding="utf-8")
    evaluated.write_text(lines[count], encoding="utf-8")
    return Job(str(folder), str(rows), str(evaluated), steps, o.batch, o.accumulation, o.completion)


def _measured(job: Job, o: Options) -> dict[str, dict[str, Any]]:
    """Run both sides in turn, as often as `--repetitions` says; of each the median run."""
    sides = [side for side in SIDES if side in (o.impls or SIDES[:3])]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(o.repetitions):
        for side in sides:
            runs[side].append(_process(side, job))
    medians = {}
    for side, found in runs.items():
        times = sorted(one["time_s"] for one in found)
        middle = next(one for one in found if one["time_s"] == statistics.median_low(times))
        memory = statistics.median(one["peak_memory_mb"] for one in found)
        medians[side] = middle | {"peak_memory_mb": memory, "times_s": times, "repetitions": len(found)}
    return medians


def _process(side: str, job: Job) -> dict[str, Any]:
    """Carry the job out in a process of its own: its seconds, tokens and peak memory."""
    with tempfile.TemporaryDirectory(prefix="unisd-bench-") as place:
        told, output, log = Path(place) / "job.json", Path(place) / "out", Path(place) / "log"
        told.write_text(json.dumps(asdict(job)), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.one_run", side, str(told), str(output)]
        with log.open("wb") as written:
            start = time.perf_counter()
            process = subprocess.Popen(
                [*command, repr(start)], stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.STDOUT
            )
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise UserError(f"{side} ended with code {process.returncode}:\n{log.read_text()[-3000:]}")
        if not (output / "adapter_model.safetensors").is_file():
            raise UserError(f"{side} saved no adapter:\n{log.read_text()[-3000:]}")
        found = json.loads((Path(place) / "found.json").read_text(encoding="utf-8"))
    if found["tokens"] != job.new_tokens:
        raise UserError(f"{side} wrote {found['tokens']} tokens, not {job.new_tokens}: nothing to compare.")
    cpu = usage.ru_utime + usage.ru_stime
    row = {"time_s": seconds, "cpu_s": cpu, "peak_memory_mb": found["peak_memory_mb"]}
    row["tokens"] = found["tokens"]
    for phase in PHASES:
        row[f"{phase}_s"], row[f"{phase}_cpu_s"] = found["wall_s"][phase], found["cpu_s"][phase]
    row["other_s"] = seconds - sum(found["wall_s"].values())
    row["other_cpu_s"] = cpu - sum(found["cpu_s"].values())
    return row
