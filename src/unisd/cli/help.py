"""`unisd train --help`: every option under its mechanism, with its default and its meaning."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from typing import Any

from unisd.options.parser import OptionParser
from unisd.options.table import GROUPS
from unisd.run.options import RUN_GROUPS

EXAMPLES = """\
examples:
  unisd train                              the embedded pocket model learns new facts
  unisd train --recipe sdft --seed 1       another published method
  unisd train --train_file rows.jsonl --model_name_or_path DIR --use_peft
                                           your rows (prompt, privileged_context), your model, LoRA
  unisd train --config run.yaml --seed 2   options from a file; flags win
  unisd train --recipe opsd --dry_run      check and show what would run, train nothing
"""
ABOUT = {
    "run": "what to run",
    "model": "the language model that teaches itself",
    "adapter": "LoRA",
    "data": "where rows come from",
    "rollout": "the student answers the prompt",
    "vllm": "vLLM writes the student's answers (extra: vllm)",
    "teacher": "the same model under the reference (B. EMA)",
    "divergence": "what the student learns from the teacher (Eq. 7-8)",
    "agreement": "A. weights from agreement over auxiliary contexts",
    "contrast": "C. towards the reference, away from a wrong one (Eq. 4-5)",
    "features": "D. matching hidden states (Eq. 6)",
    "terms": "more terms of the loss, by registered name",
    "clipping": "E. bounded divergence",
    "scoring": "the pass without gradient",
    "diagnostics": "is the run healthy? words of doubt, leaks, collapse",
    "evaluation": "before, during and after training",
    "safety": "what keeps a long run from losing work",
    "training": "the most used of transformers' TrainingArguments (--help_all shows all)",
    "inherited": "the other options of transformers' TrainingArguments",
}
HEADINGS = (*RUN_GROUPS, *GROUPS)
COLUMN = 34


def help_text(parser: OptionParser, everything: bool = False, width: int | None = None) -> str:
    """The help page; `everything` adds the options inherited from transformers."""
    if everything:
        parser.add_inherited()
    width = width or max(80, min(120, shutil.get_terminal_size((110, 24)).columns))
    lines = [
        f"usage: {parser.prog} [--config FILE.yaml] [--recipe NAME] [--model_name_or_path M]",
        "                   [--task T | --train_file F | --dataset_name D] [--OPTION VALUE ...]",
        "",
        *_wrapped(
            "Train a causal language model by self-distillation: it learns from itself under the"
            " reference. Gains and forgetting are measured. Later sources override earlier ones:"
            " defaults (shown below) < recipe (`unisd"
            " recipes NAME`) < task < --config < flags.",
            "",
            width,
        ),
        "",
        EXAMPLES,
    ]
    for heading in HEADINGS:
        if heading == "inherited" and not everything:
            continue
        members = [item for item in parser.fields.values() if group_of(item) == heading]
        lines.append(f"{heading}: {ABOUT[heading]}")
        for item in members:
            lines += _entry(item, width)
        if heading == "run":
            lines += _columns("--config FILE.yaml", "Options from a YAML file, by the names below.", width)
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def group_of(item: dataclasses.Field[Any]) -> str:
    """The heading under which help shows an option; the last for what transformers declares."""
    return str(item.metadata.get("group", HEADINGS[-1]))


def _entry(item: dataclasses.Field[Any], width: int) -> list[str]:
    default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
    value = (
        " ".join(map(str, default))
        if isinstance(default, (list, tuple))
        else str(getattr(default, "value", default))
    )
    shown = (
        "unset" if default is None or value == "" else value.lower() if isinstance(default, bool) else value
    )
    return _columns(
        f"--{item.name} [{shown}]",
        " ".join(str(item.metadata.get("help", "")).split()),
        width,
    )


def _columns(left: str, right: str, width: int) -> list[str]:
    body = _wrapped(right, " " * COLUMN, width) or [""]
    if len(left) + 4 > COLUMN:
        return [f"  {left}", *body]
    return [f"  {left}".ljust(COLUMN) + body[0].strip(), *body[1:]]


def _wrapped(text: str, indent: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
