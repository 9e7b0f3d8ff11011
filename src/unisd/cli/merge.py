"""`unisd merge`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from unisd.cli.parser import CommandParser, add_trust


def merge_command(arguments: Sequence[str]) -> int:
    """Make a full model of an adapter and its base, or of a part of what training changed."""
    parser = CommandParser(
        "merge",
        "Merge an adapter into its base model, in float32, and save the full model. The saved model is"
        " read back and compared with the adapter.",
    )
    parser.add_argument(
        "folder", metavar="DIR", help="folder with adapter_config.json; or a full model, with --base"
    )
    parser.add_argument(
        "--output_dir",
        help="folder for the full model (default: DIR-merged; with --scale DIR-merged-L); for several"
        " scales, the folder that will hold theirs",
    )
    parser.add_argument(
        "--scale",
        metavar="L",
        type=_number,
        nargs="+",
        help="base + L x (what training changed): 0 is the base, 1 (default) the whole change; several"
        " values give several models",
    )
    parser.add_argument(
        "--base", help="for --scale with a full model in DIR: the model that it was trained from"
    )
    parser.add_argument(
        "--dtype", default="auto", help="precision of the saved weights (default: the base's)"
    )
    parser.add_argument(
        "--load_in_4bit",
        action="store_true",
        help="merge into the base's 4-bit values, which an adapter trained with --load_in_4bit was"
        " trained on",
    )
    parser.add_argument(
        "--gguf",
        choices=("f16", "q8_0", "q4_k_m"),
        help="also write the model as a GGUF file of this type, with a Modelfile for Ollama; for a full"
        " model in DIR only these two (DIR-gguf). q4_k_m needs llama.cpp's llama-quantize; without it,"
        " its command is printed",
    )
    add_trust(parser)
    options = parser.parse(arguments)
    if options is None:
        return 0

    from unisd.console import loading_libraries, show_progress

    with loading_libraries():
        from unisd.run.merge import Merge, merge

    asked = Merge(**vars(options))
    with show_progress("merging", asked.stages) as advance:
        written = merge(asked, advance)
    for model in written:
        print(model)
    return 0


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number (DIR comes before --scale)") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value
