"""`unisd prepare`: contexts and wrong references built and shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisd.cli.parser import OUTPUT, CommandParser, output_file, refuse_inputs
from unisd.console import loading_libraries, make_console, show_table
from unisd.data.prompts import PromptBuilder
from unisd.data.rendering import set_options
from unisd.data.rows import Row
from unisd.data.text import prompt_text
from unisd.files import write_lines
from unisd.run.options import RunOptions
from unisd.run.resolve import resolve_shared, shared_options

if TYPE_CHECKING:  # heavy: imported where the work begins, so that help and mistakes answer at once
    from unisd.config import UniSDConfig

DESCRIPTION = (
    "Build auxiliary contexts and wrong references for the rows of a task or a file, look at them, and write"
    " rows that `unisd train --train_file` takes."
)


def prepare_command(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    parser = CommandParser("prepare", DESCRIPTION, shared_options("prepare"), heading="what is built")
    parser.under(OUTPUT).add_argument(
        "--output", type=output_file, metavar="FILE.jsonl", help="write the rows to this file"
    )
    own = parser.parse(arguments)
    if own is None:
        return 0
    with loading_libraries():
        options, config = resolve_shared(own, "prepare")
    if "agreement_contexts" not in options.explicit:
        # here nothing is built unasked, whatever the default recipe says
        options = replace(options, agreement_contexts="columns")
    refuse_inputs({"--output": own.output}, (options.train_file, options.eval_file, options.data_files))
    _prepare(options, config, own.output)
    return 0


def _prepare(options: RunOptions, config: UniSDConfig, output: Path | None) -> None:
    """Build, show and write the rows."""
    from unisd.models.load import context_length
    from unisd.run.inputs import load_data, load_model
    from unisd.run.prepare import prepare
    from unisd.scoring.requests import RequestBuilder

    data = load_data(options, config.seed, whole=True)
    loaded: list[tuple[Any, Any]] = []

    def load() -> tuple[Any, Any]:
        if not loaded:
            model, tokenizer, _ = load_model(options, training=False)
            set_options(tokenizer, config.chat_template_kwargs)
            loaded.append((model.to(config.device), tokenizer))
        return loaded[0]

    model, tokenizer = load()
    prompts = PromptBuilder(
        tokenizer,
        config.teacher_prompt_layout,
        config.teacher_prompt_template,
        config.auxiliary_prompt_template,
        teacher_options=config.teacher_chat_template_kwargs,
    )
    context = context_length(model)
    limit = RequestBuilder(config, prompts, (), (), context).teacher_room
    rows = prepare(data, options, config, load)
    print(data.contexts)
    if options.eval_file:
        print(f"{options.eval_file}: read and compared with these rows, and not changed")
    _show(rows, prompts, config, limit, options.model_name_or_path)
    if output:
        write_lines(output, rows)
        print(f"{len(rows)} rows written to {output}")
        if options.agreement_contexts != "columns" and data.task is None:
            print("a context may show any of these rows: report on others (unisd train --eval_file)")


def _show(rows: Sequence[Row], prompts: PromptBuilder, config: UniSDConfig, limit: int, model: str) -> None:
    """Counts, lengths against the limit, and one example of each kind."""
    views = {
        "student prompt": [prompts.student(row) for row in rows],
        "with the reference": [prompts.teacher(row) for row in rows],
        "with a wrong reference": [prompts.negative(row) for row in rows if row.get("negative_context")],
        "with an auxiliary context": [
            ids
            for row in rows
            if row.get("auxiliary_contexts")
            for ids in prompts.auxiliary(row, config.num_auxiliary_contexts)
        ],
    }
    lines = []
    for name, found in views.items():
        lengths = sorted(map(len, found)) or [0]
        over = sum(length > limit for length in lengths)
        lines.append([name, str(len(found)), str(lengths[len(lengths) // 2]), str(lengths[-1]), str(over)])
    show_table(
        make_console(), (f"{len(rows)} rows", "texts", "median tokens", "longest", f"over {limit}"), lines
    )
    print(
        f"tokens of {model}; {limit}: what its context and"
        f" max_completion_length={config.max_completion_length} leave, or the option"
    )
    example = next((row for row in rows if row.get("auxiliary_contexts")), rows[0])
    for name, text in (
        ("prompt", prompt_text(example["prompt"])),
        ("reference", str(example.get("privileged_context"))),
        *(("auxiliary context", text) for text in (example.get("auxiliary_contexts") or [])[:2]),
        ("wrong reference", str(example.get("negative_context") or "-")),
    ):
        print(f"{name}:\n  " + text[:600].replace("\n", "\n  "))
