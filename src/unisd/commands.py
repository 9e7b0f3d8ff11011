"""`unisd eval`, `unisd merge` and `unisd chat`: what one does with a saved model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from unisd.errors import UserError


class CommandParser(argparse.ArgumentParser):
    """argparse, with mistakes as `UserError`."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"unisd {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> Any:
        raise UserError(f"{message} (see {self.prog} --help).")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace | None:
        """None after `--help`."""
        try:
            return self.parse_args(list(arguments))
        except SystemExit:
            return None


def evaluate(arguments: list[str]) -> int:
    """Task accuracy, retention skills, and with a base the retention perplexities of a saved model."""
    parser = CommandParser("eval", "Task accuracy, retention skills and, with --base, retention perplexities.")
    parser.add_argument("--model_name_or_path", "--model", default="pocket", help="a folder (model or adapter) or a name")
    parser.add_argument("--base", help="the model that it was adapted from, for retention perplexities")
    parser.add_argument("--task", default="pocket")
    parser.add_argument("--data_files", nargs="+", help="files that the task reads")
    parser.add_argument("--n", type=int, default=500, help="most rows of each evaluation (default: 500)")
    parser.add_argument("--max_new_tokens", type=int, help="cap on each answer (default: the task's)")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse(arguments)
    if options is None:
        return 0
    if options.n < 1:
        raise UserError(f"--n {options.n}: at least one row is needed.")

    from unisd import evaluation, measure, tasks
    from unisd.console import make_console, number, quiet_libraries, show_table

    quiet_libraries()
    task = tasks.get(options.task, **({"data_files": options.data_files} if options.data_files else {}))
    model, tokenizer = _load(options.model_name_or_path, options.dtype)
    cap = options.max_new_tokens or task.max_new_tokens
    sets = {"task": task.load("test", limit=options.n), "retention": task.retention_rows(limit=options.n)}
    if "test_hard" in task.splits:
        sets["test_hard"] = task.load("test_hard", limit=options.n)
    figures: dict[str, Any] = {"model": options.model_name_or_path, "task": options.task}
    lines = []
    for name, rows in sets.items():
        graded = measure.graded(model, tokenizer, rows, task.grade, cap, options.batch_size)
        figures[f"{name}_accuracy"], figures[f"{name}_skills"] = graded
        for label, value in ((name, graded[0]), *((f"  {skill}", value) for skill, value in (graded[1] or {}).items())):
            if value is not None:
                lines.append([label, measure.percent(value), str(value["n"])])
    figures["gold_ppl"] = evaluation.gold_ppl(model, tokenizer, sets["task"])
    lines.append(["perplexity of the references", number(figures["gold_ppl"]), str(len(sets["task"]))])
    if options.base is not None:
        base, _ = _load(options.base, options.dtype)
        rows = sets["retention"] or sets["task"]
        figures |= measure.drift(model, base, tokenizer, rows, cap, options.batch_size)
        for way, value in figures["retention_ppl"].items():
            lines.append([f"retention perplexity, {way}", number(value, 4), str(len(rows))])
    show_table(make_console(), (options.model_name_or_path, "value", "rows"), lines)
    if options.json:
        _write_json(Path(options.json), figures)
    return 0


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror}.") from None


def _is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def _load(name: str, dtype: str = "auto") -> tuple[Any, Any]:
    """A model (an adapter folder gets its base beneath it) ready for inference, and its tokenizer."""
    import torch

    from unisd.models import load_model_and_tokenizer

    model, tokenizer, _ = load_model_and_tokenizer(name, dtype=dtype)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model.to(device or "cpu").eval(), tokenizer


def merge(arguments: list[str]) -> int:
    """Make a full model of an adapter and its base."""
    parser = CommandParser("merge", "Merge a LoRA adapter into its base model, in float32, and save the full model.")
    parser.add_argument("folder", metavar="DIR", help="folder with adapter_config.json")
    parser.add_argument("--output_dir", help="where the full model goes (default: DIR-merged)")
    parser.add_argument("--dtype", default="auto", help="precision of the saved weights (default: the base's)")
    options = parser.parse(arguments)
    if options is None:
        return 0
    folder = Path(options.folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one that `unisd train --use_peft` wrote.")
    if not _is_adapter(folder):
        full = " It is a full model already: nothing needs merging." if (folder / "config.json").is_file() else ""
        raise UserError(f"{folder} holds no adapter (adapter_config.json).{full}")
    output = Path(options.output_dir) if options.output_dir else folder.with_name(f"{folder.name}-merged")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already: choose another --output_dir.")

    from unisd.console import quiet_libraries
    from unisd.outputs import check_writable

    quiet_libraries()
    check_writable(output)
    import torch

    model, tokenizer = _load(str(folder))
    target = model.dtype if options.dtype == "auto" else getattr(torch, options.dtype, None)
    if not isinstance(target, torch.dtype):
        raise UserError(f"--dtype {options.dtype} is no precision: use float32, bfloat16 or float16.")
    # In float32: rounding the sum of base and adapter once is all the error there is.
    merged = model.float().merge_and_unload().to(target)
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"written to {output}: a full model in {str(target).removeprefix('torch.')}")
    return 0


def chat(arguments: list[str]) -> int:
    """Answer prompts, one by one (no memory), if wanted beside the base model."""
    parser = CommandParser("chat", "Try a model; each prompt stands alone, as in training.")
    parser.add_argument("folder", metavar="DIR", help="model or adapter folder, or a model name")
    parser.add_argument("--compare", metavar="BASE", help="another model beside it; `base`: the one it was adapted from")
    parser.add_argument("--prompt", help="answer this one prompt and end")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse(arguments)
    if options is None:
        return 0

    from unisd.console import make_console, quiet_libraries, show_answers

    quiet_libraries()
    console = make_console()
    model, tokenizer = _load(options.folder)
    speakers: list[tuple[str, Any, bool]] = [(options.folder, model, False)]
    if options.compare == "base" and _is_adapter(options.folder):
        speakers.insert(0, ("base", model, True))
    elif options.compare is not None:
        name = _base_of(options.folder) if options.compare == "base" else options.compare
        speakers.insert(0, (name, _load(name)[0], False))

    def answer(prompt: str, number: int) -> None:
        texts = []
        for name, speaker, bare in speakers:
            with speaker.disable_adapter() if bare else nullcontext():
                texts.append((name, _answer(speaker, tokenizer, prompt, options, number)))
        show_answers(console, texts)

    if options.prompt is not None:
        answer(options.prompt, 0)
    elif not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise UserError("there is no prompt: give --prompt TEXT, or text on standard input.")
        answer(prompt, 0)
    else:
        _read_and_answer(answer)
    return 0


def _read_and_answer(answer: Any) -> None:
    print("an empty line or Ctrl-D ends")
    number = 0
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            print()
            return
        if not prompt:
            return
        answer(prompt, number)
        number += 1


def _answer(model: Any, tokenizer: Any, prompt: str, options: argparse.Namespace, number: int) -> str:
    from unisd.models import eos_ids
    from unisd.prompts import encode_prompt
    from unisd.rollout import Sampling, generate

    ends = eos_ids(model, tokenizer)
    completion = generate(
        model,
        [encode_prompt(tokenizer, prompt)],
        Sampling(options.max_new_tokens, options.temperature or 1.0),
        eos_ids=ends,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0],
        keys=[(options.seed, 0, number, 0)] if options.temperature > 0 else None,
    )[0]
    return str(tokenizer.decode(completion.ids, skip_special_tokens=True))


def _base_of(folder: str) -> str:
    """The model that a run of ours started from."""
    try:
        name = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder} has no results.json that names its base: give it, --compare MODEL.") from None
    return str(name)
