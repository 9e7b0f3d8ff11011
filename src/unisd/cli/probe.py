"""`unisd probe`: arguments in, table, advice and what to set out.

What is measured is in `evaluation/teacher_probe.py`, what follows for a run in
`run/recommended.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from unisd.cli.parser import MEASURED, OUTPUT, CommandParser, at_least_one, output_file, refuse_inputs
from unisd.console import loading_libraries, make_console, number, show_progress, show_table
from unisd.data import rendering
from unisd.data.prompts import PromptBuilder
from unisd.data.rows import Row
from unisd.errors import UserError
from unisd.files import write_text
from unisd.run.options import RunOptions
from unisd.run.resolve import resolve_shared, shared_options

if TYPE_CHECKING:  # heavy: imported where the work begins, so that help and mistakes answer at once
    from unisd.config import UniSDConfig
    from unisd.run.recommended import Recommendation

SCHEMA_VERSION = 1
DESCRIPTION = (
    "Before training: is the teacher worth learning from? Measures the model's answers without and with the"
    " reference (in each layout, right and wrong) and with auxiliary contexts, and ends in plain words."
)


def probe_command(arguments: Sequence[str]) -> int:
    """The command; returns its exit code.

    Raises:
        UserError: as `unisd train` for model and data; rows too long for the model.
    """
    parser = CommandParser("probe", DESCRIPTION, shared_options("probe"))
    measured, output = parser.under(MEASURED), parser.under(OUTPUT)
    for name, dest, default, text in (
        ("max_train_rows", "n", 64, "training rows to probe"),
        ("eval_max_new_tokens", "max_new_tokens", 256, "maximum tokens per answer"),
        ("rollout_batch_size", "batch_size", 64, "rows generated at once"),
    ):
        measured.add_argument(
            f"--{name}", dest=dest, type=int, default=default, help=f"{text} (default: {default})"
        )
    output.add_argument("--json", type=output_file, metavar="FILE", help="write the figures to this file")
    output.add_argument(
        "--write_config",
        type=output_file,
        metavar="RUN.yaml",
        help="write the recommended options to this new file, for unisd train --config",
    )
    own = parser.parse(arguments)
    if own is None:
        return 0
    at_least_one(
        max_train_rows=own.n, eval_max_new_tokens=own.max_new_tokens, rollout_batch_size=own.batch_size
    )
    with loading_libraries():
        options, config = resolve_shared(own, "probe")
    refuse_inputs(
        {"--json": own.json, "--write_config": own.write_config},
        (options.train_file, options.eval_file, options.data_files),
    )
    if own.write_config is not None and own.write_config.is_file():
        raise UserError(
            f"--write_config {own.write_config}: the file exists: remove it, or give another name."
        )
    report, recommended = probe(options, config, own.n, own.max_new_tokens, own.batch_size)
    if own.json:
        write_text(own.json, json.dumps(report, indent=2) + "\n")
    if own.write_config is not None:
        recommended.write(own.write_config, report["advice"])
        print(f"written: {own.write_config}; start it with: unisd train --config {own.write_config}")
    else:
        print("--write_config run.yaml writes this down for unisd train --config run.yaml")
    return 0


def probe(
    options: RunOptions, config: UniSDConfig, n: int, max_new_tokens: int, batch_size: int
) -> tuple[dict[str, Any], Recommendation]:
    """Measure and print; returns the report, and what is recommended for a run."""
    from unisd.evaluation.teacher_probe import Limits, Probe
    from unisd.run.inputs import load_data, load_model
    from unisd.run.recommended import recommend

    console = make_console()
    data = load_data(options, config.seed)
    rows = [*data.train, *data.evaluation][:n] if len(data.train) < n else data.train[:n]
    model, tokenizer, _ = load_model(options, training=False)
    model.to(config.device)
    rendering.set_options(tokenizer, config.chat_template_kwargs)
    rendering.check_rows(tokenizer, rows, data.name)
    if not rendering.has_template(tokenizer):
        console.print(
            "note: the tokenizer has no chat template; prompts are plain text", markup=False, highlight=False
        )
    prompts = PromptBuilder(
        tokenizer,
        "append",
        config.teacher_prompt_template,
        config.auxiliary_prompt_template,
        teacher_options=config.teacher_chat_template_kwargs,
    )
    rows, overlong = _fitting(rows, prompts, model, max_new_tokens)
    with _progress() as (on_phase, on_rows):
        measured = Probe(
            model,
            tokenizer,
            rows,
            data.grade,
            prompts,
            limits=Limits(max_new_tokens, config.num_auxiliary_contexts, batch_size),
            on_phase=on_phase,
            on_rows=on_rows,
        ).run()
    report = {
        "schema_version": SCHEMA_VERSION,
        "model": options.model_name_or_path,
        "task": data.name,
        **measured,
    }
    report["overlong"] = overlong
    lengths = [len(prompts.teacher(row)) for row in rows]
    found = recommend(options, report, model, tokenizer, data.train, lengths)
    report |= {"recommended": found.values, "predicted": found.predicted}
    _print(console, report)
    _print_recommendation(console, found)
    return report, found


def _fitting(
    rows: list[Row], prompts: PromptBuilder, model: Any, max_new_tokens: int
) -> tuple[list[Row], int]:
    """Rows whose prompts leave room for an answer, and how many do not."""
    from unisd.models.load import context_length

    context = context_length(model)
    if context is None:
        return rows, 0
    fitting = [row for row in rows if len(prompts.teacher(row)) + max_new_tokens <= context]
    if not fitting:
        raise UserError(
            f"no row leaves room for {max_new_tokens} new tokens in the model's context of {context}: "
            "lower --eval_max_new_tokens or shorten the rows."
        )
    return fitting, len(rows) - len(fitting)


def _print(console: Console, report: dict[str, Any]) -> None:
    from unisd.evaluation.grading import percent
    from unisd.evaluation.teacher_probe import LAYOUTS

    lines = []

    def add(name: str, figures: dict[str, Any] | None, divergence: float | None = None) -> None:
        if figures is None:
            return
        likelihood = figures.get("nll", figures.get("copying_nll"))
        lines.append(
            [
                name,
                percent(figures.get("accuracy")),
                number(divergence),
                number(likelihood),
                number(figures.get("mean_length"), ".0f"),
                str(figures.get("truncated", "-")),
                str(figures["n"]),
            ]
        )

    add("student, plain prompt", report["student"])
    for layout in LAYOUTS:
        add(f"teacher, {layout}", report["teacher"][layout], report["teacher"][layout]["divergence"])
    wrong = report["wrong_reference"]
    add("teacher, wrong reference", wrong, wrong and wrong["divergence_from_right"])
    add("auxiliary contexts", report["auxiliary"], report["auxiliary"] and report["auxiliary"]["spread"])
    header = ("", "accuracy", "nats/token", "reference NLL", "tokens", "truncated", "rows")
    show_table(console, header, lines, f"{report['model']} on {report['task']}")
    for note in (*_notes(report), "", report["advice"]):
        console.print(note, markup=False, highlight=False)


def _print_recommendation(console: Console, found: Recommendation) -> None:
    from unisd.run.recommended import predicted_line

    console.print()
    show_table(console, ("set", "to", "why"), found.lines, "Settings for a first run")
    console.print(predicted_line(found.predicted), markup=False, highlight=False)


def _notes(report: dict[str, Any]) -> list[str]:
    """What the figures mean, and what they leave out."""
    from unisd.evaluation.teacher_probe import COMPARED_TOKENS

    notes = [
        "nats/token: KL from teacher to student on the student's own answers (wrong reference: from the right"
        " one; auxiliary: spread)."
    ]
    if report["n_compared"] < report["n"]:
        notes.append(
            f"Distributions are compared on {report['n_compared']} rows and their first {COMPARED_TOKENS}"
            " tokens, spread on half of them."
        )
    if "nll" in report["student"]:
        notes.append(
            "reference NLL of a teacher that sees the reference is copying; the advice does not use it."
        )
    if report["overlong"]:
        notes.append(f"{report['overlong']} row(s) are too long for the model's context and were left out.")
    return notes


@contextmanager
def _progress() -> Iterator[tuple[Any, Any]]:
    """One part after the other as `show_progress` shows it."""
    with ExitStack() as part:
        advance = None

        def on_phase(name: str, count: int) -> None:
            nonlocal advance
            part.close()
            advance = part.enter_context(show_progress(name, count))

        def on_rows(count: int) -> None:
            assert advance is not None
            advance(count)

        yield on_phase, on_rows
