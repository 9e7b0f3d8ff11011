"""Small studies, and runs that write their files at once."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from unisd.run import grafting
from unisd.study import runner
from unisd.study.design import Study, from_dict, runs_of
from unisd.study.executor import Finished, Job
from unisd.study.store import Store


def study(**values: Any) -> Study:
    return from_dict({"mechanisms": ["ema", "clip"], "seeds": [1, 2], "design": "full", **values})


class FakeExecutor:
    """Finishes every job at once, with the files that a run writes; `fails` gives exit codes by job
    and attempt.
    """

    def __init__(self, slots: int = 2, fails: dict[str, list[int]] | None = None) -> None:
        self.slots = slots
        self.fails = fails or {}
        self.last_words = "unisd: error: this is why"
        self.submitted: list[str] = []
        self.queue: list[Job] = []

    def submit(self, job: Job) -> None:
        assert len(self.queue) < self.slots
        self.submitted.append(job.name)
        self.queue.append(job)

    def wait(self) -> Finished:
        job = self.queue.pop(0)
        code = self.fails.get(job.name, [0]).pop(0) if self.fails.get(job.name) else 0
        job.log.write_text(f"one line\n{self.last_words}\n")
        if code == 0:
            folder = Path(job.command[job.command.index("--output_dir") + 1])
            write_run(
                folder, yaml.safe_load(Path(job.command[job.command.index("--config") + 1]).read_text())
            )
        return Finished(job.name, code)

    def close(self) -> None:
        pass


def write_run(folder: Path, options: dict[str, Any], problems: int = 40) -> None:
    """A run's files: EMA gives 25 points on the task, the clip nothing; each takes time."""
    rng = random.Random(json.dumps(options, sort_keys=True))
    ema, clip = options.get("teacher_model_kind") != "base", "token_clip" not in options
    parts = {}
    for part, chance in (("task", 0.5 + 0.25 * ema), ("retention", 0.9)):
        after = [
            random.Random(f"{part} {i}").random() * 0.8 + 0.2 * rng.random() < chance for i in range(problems)
        ]
        parts[part] = {
            "ids": [f"{part}-{i}" for i in range(problems)],
            "before": [False] * problems,
            "after": after,
        }
        parts[part] |= {"skills": [None] * problems, "examples": []}

    def figures(when: str) -> dict[str, Any]:
        shares = {part: sum(found[when]) / problems for part, found in parts.items()}
        found = {
            f"{part}_accuracy": {"value": v, "low": v, "high": v, "n": problems} for part, v in shares.items()
        }
        return {
            **found,
            "skills": None,
            "retention_skills": None,
            "retention": {},
            "gold_ppl": 1.5,
            "retention_ppl": {"forward": 1.01, "reverse": 1.02},
        }

    flops = 100.0 + 50 * clip
    cost = {
        "tokens": {
            "generated": 10,
            "prefilled": 5,
            "scored": 30,
            "trained": 20,
            "scored_by_view": {"primary": 30},
            "completion": 10,
        },
        "flops_estimated": {"rollout": 1.0, "score": 1.0, "student": flops - 2, "total": flops},
        "million_tokens_per_device_hour": 1.0,
        "peak_memory_bytes": 1 << 20,
        "peak_memory_of": "a test",
        "train_s": 2.0,
        "energy": {"kwh": None, "method": "unknown", "tdp_w": None, "kwh_per_million_tokens": None},
        "by_mechanism": {},
    }
    named = {"recipe": "unisd-star", "model": "pocket", "task": "task", "seed": options["seed"], "steps": 1}
    results = named | {"before": figures("before"), "after": figures("after"), "cost": cost}
    results |= {"acquisition": {"accuracy": None, "items": None}, "retention": [], "drift": None}
    results |= {"wall_s": 3.0, "config": {}, "phases_s": {"eval": 1.0}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text("weights")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "step_time": 1.0 + 0.5 * clip}) + "\n")
    (folder / "answers.json").write_text(json.dumps(parts))
    if scales := options.get("graft_scales"):
        marks = {part: [True] * problems for part in parts}  # a part knows all
        point = {"task": "task", "gold_ppl": 1.4, "correct": marks}
        point |= {f"{part}_accuracy": {"value": 1.0, "low": 1.0, "high": 1.0} for part in parts}
        grafting.add(folder, [{"scale": scale, **point} for scale in (0.0, *scales, 1.0)])
    (folder / "results.json").write_text(json.dumps(results))


def carried_out(folder: Path, spec: Study, executor: Any, **options: Any) -> tuple[bool, Store]:
    store = Store(folder)
    known = store.runs()
    left = [run for run in runs_of(spec) if run.id not in known]
    said: list[str] = []
    try:
        return runner.carry_out(spec, left, store, executor, said.append, **options), store
    finally:
        store.close()
