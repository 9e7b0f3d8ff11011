"""Hands a finished run's table and samples to its trackers (`report_to`).

They are measured after the training, at whose end the Trainer closes its trackers. So these are
kept open until the run has told them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from unisd.console import markdown_table
from unisd.run.changes import HEAD, change_lines

logger = logging.getLogger(__name__)

MAX_ROWS = 100
"""Of a table."""
MAX_CELL = 2000
"""Characters of a text in a table."""
PREFIX = "unisd/"
Figures = Mapping[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[Any]]]
"""Header and rows."""


@dataclass(frozen=True)
class Told:
    """What every tracker gets of a finished run."""

    step: int
    figures: Mapping[str, float]
    options: Mapping[str, Any]
    tables: Mapping[str, Table]


def told(results: Figures, answers: Figures, samples: Sequence[Figures], options: Figures) -> Told:
    """Gather it: from results, `answers.json`, `samples.jsonl`, and the options that were given."""
    drift, retention = results["drift"], results["retention"]
    figures = {
        "task_accuracy": (results["after"]["task_accuracy"] or {}).get("value"),
        "task_change": (results["acquisition"]["accuracy"] or {}).get("change"),
        "drift_kl": drift and drift["kl"] and drift["kl"]["after"],
        **{f"retention_{one['name']}": (one["accuracy"] or {}).get("after") for one in retention},
    }
    tables = {
        "results": (HEAD, change_lines(dict(results))),
        "answers": (
            ("part", "id", "prompt", "reference", "before", "right before", "after", "right after"),
            [_answer(part, one) for part, found in answers.items() for one in found["examples"]],
        ),
        "samples": (
            ("step", "id", "prompt", "reference", "answer", "right"),
            [_sample(record) for record in samples if isinstance(record.get("tokens"), list)],
        ),
    }
    return Told(
        results["steps"],
        {name: value for name, value in figures.items() if value is not None},
        {
            name: value if isinstance(value, (bool, int, float)) else str(value)
            for name, value in options.items()
        },
        {name: (header, _some(rows)) for name, (header, rows) in tables.items() if rows},
    )


def _answer(part: str, one: Figures) -> list[Any]:
    sides = [[_cut(one[when]["text"]), one[when]["correct"]] for when in ("before", "after")]
    return [part, one["id"], _cut(one["prompt"]), _cut(one["reference"]), *sides[0], *sides[1]]


def _sample(record: Figures) -> list[Any]:
    texts = [_cut(record["prompt"]), _cut(record["reference"]), _cut("".join(record["tokens"]))]
    return [record["step"], record.get("id", ""), *texts, record.get("correct")]


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CELL else f"{text[:MAX_CELL]}..."


def _some(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """At most `MAX_ROWS` from all over the rows, in their order."""
    every = -(-len(rows) // MAX_ROWS)
    return [list(row) for row in rows[:: max(every, 1)]]


class Trackers:
    """The trackers of a training, open until the context is left.

    callbacks: those of the trainer; all that report to other trackers are left alone.
    """

    def __init__(self, callbacks: Iterable[Any]) -> None:
        self._kept: list[Any] = [one for one in callbacks if isinstance(one, tuple(TELL))]
        self._ends: list[Callable[[], Any]] = []
        for callback in self._kept:
            callback.on_train_end = partial(self._keep_open, callback.on_train_end)

    def _keep_open(self, end: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._ends.append(partial(end, *args, **kwargs))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tell(self, gather: Callable[[], Told]) -> None:
        """Hand it over; what goes wrong with that must not take the run's results along."""
        for callback in self._kept:
            try:
                tell = next(tell for kind, tell in TELL.items() if isinstance(callback, kind))
                tell(callback, gather())
            except Exception as error:
                name, reason = type(callback).__name__, " ".join(str(error).split())
                logger.warning(
                    "%s did not take the results (%s); they are in the output folder.", name, reason
                )
        self.close()

    def close(self) -> None:
        """Do what was to be done at the end of the training."""
        while self._ends:
            self._ends.pop(0)()


def _tell_tensorboard(callback: Any, found: Told) -> None:
    writer = callback.tb_writer
    if writer is None:
        return
    for name, (header, rows) in found.tables.items():
        cells = [[_in_markdown(cell) for cell in row] for row in rows]
        writer.add_text(PREFIX + name, "\n".join(markdown_table(header, cells)), found.step)
    writer.add_hparams(dict(found.options), {PREFIX + name: value for name, value in found.figures.items()})


def _in_markdown(cell: Any) -> str:
    """One cell of a table, in which nothing that a model wrote is Markdown or HTML."""
    text = "" if cell is None else str(cell)
    for character in "\\`*_{}[]()#+-.!~":
        text = text.replace(character, f"\\{character}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", "<br>")


def _tell_wandb(callback: Any, found: Told) -> None:
    wandb = callback._wandb
    if wandb is None or wandb.run is None:
        return
    wandb.log({**_tables(wandb, found), "train/global_step": found.step})
    wandb.run.summary.update({PREFIX + name: value for name, value in found.figures.items()})


def _tell_trackio(callback: Any, found: Told) -> None:
    if callback._initialized:
        figures = {PREFIX + name: value for name, value in found.figures.items()}
        callback._trackio.log(
            {**_tables(callback._trackio, found), **figures, "train/global_step": found.step}
        )


def _tables(library: Any, found: Told) -> dict[str, Any]:
    return {
        PREFIX + name: library.Table(columns=list(header), data=[list(row) for row in rows])
        for name, (header, rows) in found.tables.items()
    }


TELL: Mapping[type, Callable[[Any, Told], None]] = {
    TensorBoardCallback: _tell_tensorboard,
    WandbCallback: _tell_wandb,
    TrackioCallback: _tell_trackio,
}
