"""`unisd merge`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unisd.cli.parser import CommandParser, add_trust
from unisd.errors import UserError
from unisd.files import check_writable


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def load_any(name: str, dtype: str = "auto", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A model (an adapter folder gets its base beneath it) ready for inference, and its
    tokenizer.
    """
    import torch

    from unisd.models.load import load_model_and_tokenizer

    model, tokenizer, _ = load_model_and_tokenizer(name, dtype=dtype, trust_remote_code=trust_remote_code)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model.to(device or "cpu").eval(), tokenizer


def merge_command(arguments: Sequence[str]) -> int:
    """Make a full model of an adapter and its base."""
    parser = CommandParser(
        "merge", "Merge a LoRA adapter into its base model, in float32, and save the full model."
    )
    parser.add_argument("folder", metavar="DIR", help="folder with adapter_config.json")
    parser.add_argument("--output_dir", help="where the full model goes (default: DIR-merged)")
    parser.add_argument(
        "--dtype", default="auto", help="precision of the saved weights (default: the base's)"
    )
    add_trust(parser)
    options = parser.parse(arguments)
    if options is None:
        return 0
    folder = Path(options.folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one that `unisd train --use_peft` wrote.")
    if not is_adapter(folder):
        full = (
            " It is a full model already: nothing needs merging."
            if (folder / "config.json").is_file()
            else ""
        )
        raise UserError(f"{folder} holds no adapter (adapter_config.json).{full}")
    output = Path(options.output_dir) if options.output_dir else folder.with_name(f"{folder.name}-merged")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already: choose another --output_dir.")

    from unisd.console import quiet_libraries

    quiet_libraries()
    check_writable(output)
    import torch

    model, tokenizer = load_any(str(folder), trust_remote_code=options.trust_remote_code)
    target = model.dtype if options.dtype == "auto" else getattr(torch, options.dtype, None)
    if not isinstance(target, torch.dtype):
        raise UserError(f"--dtype {options.dtype} is no precision: use float32, bfloat16 or float16.")
    # In float32: rounding the sum of base and adapter once is all the error there is.
    merged = model.float().merge_and_unload().to(target)
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"written to {output}: a full model in {str(target).removeprefix('torch.')}")
    return 0
