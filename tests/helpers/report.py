"""Folders of runs and studies for the tests of pages, and a look at what was built."""

from __future__ import annotations

import json
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.studies import FakeExecutor, carried_out, study
from unisd.cli.main import main

HOSTILE = (
    "</script></pre><script>window.hacked=1</script><img src=x"
    " onerror='window.hacked=1'>\u202eevil\ud800\x00\x1b[31m ]]>"
)
LONG = HOSTILE + "<b>" * 33_000  # 100 kB


def record(step: int = 1, tokens: int = 6, text: str = " word") -> dict[str, Any]:
    values = [None, *(0.1 * t for t in range(1, tokens))]
    return {
        "step": step,
        "id": "row-1",
        "prompt": "a prompt",
        "reference": "a reference",
        "correct": True,
        "feedback": "what the <b>grader</b> says",
        "tokens": [text] * tokens,
        "cut": 0,
        "temperature": 1.0,
        "weight": [None, *[1.0] * (tokens - 2), 0.25],
        "teacher_logp": [None, *[-0.5] * (tokens - 1)],
        "student_logp": [None, *[-1.5] * (tokens - 1)],
        "auxiliary_logp": [[None, *[-1.0] * (tokens - 1)], [None, *[-3.0] * (tokens - 1)]],
        "negative_logp": [None, *[-4.0] * (tokens - 1)],
        "entropy": values,
        "divergence": values,
        "clipped": [None, *[False] * (tokens - 2), True],
        "contrast": [None, *[0.1] * (tokens - 2), 2.1],
        "teacher_top": [*[None] * (tokens - 1), "<i>other"],
        "teacher_top_logp": [*[None] * (tokens - 1), -0.25],
    }


def a_run(folder: Path, text: str = "an answer", records: list[dict[str, Any]] | None = None) -> Path:
    """The files of a run, with `text` as its answers and tokens."""
    folder.mkdir(parents=True)
    share = {"value": 0.25, "low": 0.1, "high": 0.5, "n": 4}
    figures = {
        "task_accuracy": share,
        "skills": {text[:50]: share},
        "retention_accuracy": share,
        "retention_skills": None,
        "retention": {},
        "gold_ppl": 2.0,
    }
    after = {
        **figures,
        "retention_ppl": {"forward": 1.01, "reverse": 1.02},
        "task_accuracy": {**share, "value": 0.5},
    }
    cost = {
        "tokens": {"generated": 10, "scored": 20, "trained": 30, "scored_by_view": {"primary": 20}},
        "million_tokens_per_device_hour": 1.5,
        "peak_memory_of": "the whole process",
        "peak_memory_bytes": 1 << 30,
        "flops_estimated": {"total": 3e12},
        "energy": {"kwh": None, "kwh_per_million_tokens": None, "method": "unknown: it needs device_tdp"},
        "by_mechanism": {
            "agreement": {"tokens_scored": 10, "flops": 5, "share_of_flops": 0.25, "seconds_estimated": 2.5}
        },
    }
    results = {
        "recipe": "unisd-star",
        "model": "pocket",
        "task": text[:50],
        "seed": 1,
        "steps": 3,
        "wall_s": 12.0,
    }
    results |= {
        "phases_s": {"rollout": 1.0, "score": 2.0, "student": 3.0},
        "before": figures,
        "after": after,
        "cost": cost,
        "acquisition": {"accuracy": None, "items": None},
        "retention": [],
        "drift": None,
    }
    results |= {"config": {"note": text}, "alarms": [{"name": "collapse", "step": 2, "text": text[:300]}]}
    (folder / "results.json").write_text(json.dumps(results))
    side = {"text": text, "correct": False, "reason": ""}
    example = {
        "id": text[:20],
        "prompt": text,
        "reference": text,
        "before": side,
        "after": {**side, "correct": True},
    }
    part = {"ids": ["1"], "skills": [None], "before": [False], "after": [True], "examples": [example]}
    (folder / "answers.json").write_text(json.dumps({"task": part, "retention": part}))
    values = {"agreement/mean": 0.9, "clip/share": 0.01, "student/entropy": 0.3, "words/all": 2.0}
    lines = [{"step": s, "loss": 1.0 / s, **values} for s in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = [record(text=text[:300])] if records is None else records
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    return folder


def judged(folder: Path, after: list[bool], lost: int = 0, nats: float = 0.0, **config: Any) -> Path:
    """A run whose changes were measured: `after` are its verdicts on rows that were wrong before.

    lost: of its 20 old items. nats: a token, by which the base's own answers became less likely.
    """
    results = json.loads((a_run(folder) / "results.json").read_text())
    gained, rows = sum(after), len(after)
    share = {"value": gained / rows, "low": 0.0, "high": 1.0, "n": rows}
    found = {"kept": 0, "lost": 0, "gained": gained, "neither": rows - gained, "p": 2 * 0.5**gained}
    kept = {"kept": 20 - lost, "lost": lost, "gained": 0, "neither": 0, "p": min(1.0, 2 * 0.5**lost)}
    old = {"accuracy": {"value": 1.0, "low": 0.8, "high": 1.0, "n": 20}, "skills": None}
    new = {"accuracy": {**old["accuracy"], "value": 1 - lost / 20}, "skills": None}
    results["before"] |= {"task_accuracy": {**share, "value": 0.0}, "skills": None, "retention": {"old": old}}
    results["after"] |= {"task_accuracy": share, "skills": None, "retention": {"old": new}}
    results["acquisition"] = {"accuracy": {"change": gained / rows}, "items": found}
    results["retention"] = [{"name": "old", "items": kept, "accuracy": {"after": 1 - lost / 20}}]
    change = {"before": 1.0, "after": 1.1, "change": 0.1}
    results["drift"] = {"kl": {**change, "after": nats}, "reverse": change, "forward": change}
    results["drift"]["nats"] = {"value": nats, "low": nats / 2, "high": 2 * nats}
    (folder / "results.json").write_text(json.dumps({**results, "alarms": [], "config": config}))
    sides = [{"text": str(right), "correct": right, "reason": ""} for right in after]
    before = {"text": "a guess", "correct": False, "reason": ""}
    examples = [
        {"id": f"row-{n}", "prompt": f"prompt {n}", "reference": "r", "before": before, "after": side}
        for n, side in enumerate(sides)
    ]
    ids = [one["id"] for one in examples]
    part = {
        "ids": ids,
        "skills": [None] * rows,
        "before": [False] * rows,
        "after": after,
        "examples": examples,
    }
    (folder / "answers.json").write_text(json.dumps({"task": part}))
    return folder


class Tags(HTMLParser):
    """Elements, their attributes, and the text outside of script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += data


def built(folder: Path) -> tuple[str, Tags]:
    assert main(["report", str(folder), "--no_run_pages"]) == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Tags(text)


def a_study(folder: Path) -> Path:
    spec = study()
    carried_out(folder, spec, FakeExecutor())
    (folder / "study.yaml").write_text(yaml.safe_dump(spec.source))
    return folder


class Browser:
    """Debian's Chromium; fails on a console error or any request."""

    def __init__(self, browser: Any, theme: str, width: int) -> None:
        self.page = browser.new_context(
            color_scheme=theme, viewport={"width": width, "height": 900}
        ).new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on(
            "console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("request", lambda r: self.requests.append(r.url))

    def open(self, path: Path, within_s: float = 2.0) -> Any:
        for left in (2, 1, 0):  # the machine may be busy with something else
            begun = time.monotonic()
            self.page.goto(path.as_uri(), wait_until="load")
            if time.monotonic() - begun < within_s:
                break
            assert left, "three times too slow"
        assert not self.errors
        assert {url for url in self.requests if not url.startswith("data:")} == {path.as_uri()}
        return self.page
