"""Measures what each token weight adds to an optimizer step of a 0.5B model.

As a share of the step.

    python -m benchmarks.field_weights [--shape qwen2.5-0.5b] [--completion 16] [--repetitions 4]
        [--threads 2]

Whole steps of the trainer under LoRA with an EMA teacher, without generation (which would only make
the shares smaller): the reference step and the same step with one weight, in turn, so that a busy
machine favours none. Times are the least of the rounds. A model cut to a few layers (`--layers 2`)
makes for more rounds in the same time, and for larger shares: what a weight adds does not depend on
the depth. `contrast_weight` needs the teacher under a wrong reference: it is compared with a step
without that view, and with one that has it already for the contrast term.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch

from benchmarks import ours
from benchmarks.measure import interleave
from benchmarks.settings import Star
from benchmarks.shapes import SHAPES, build, examples, twin
from benchmarks.steps import primed
from unisd.console import markdown_table

CONTRAST: dict[str, Any] = {"contrastive_weight": 0.01, "contrastive_margin": 0.1}
# Name -> options, and the step that it is compared with.
STEPS: dict[str, tuple[dict[str, Any], str | None]] = {
    "no weight": ({}, None),
    "dash": ({"token_weights": ["dash"]}, "no weight"),
    "position": ({"token_weights": ["position"]}, "no weight"),
    "confidence_gate": ({"token_weights": ["confidence_gate"]}, "no weight"),
    "entropy_trust": ({"token_weights": ["entropy_trust"]}, "no weight"),
    "contrast_weight": ({"token_weights": ["contrast_weight"]}, "no weight"),
    "contrast term": (CONTRAST, None),
    "contrast term and contrast_weight": (
        {**CONTRAST, "token_weights": ["contrast_weight"]},
        "contrast term",
    ),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int, help="cut the model's depth")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument(
        "--prompt", type=int, default=32, help="tokens of each prompt; references have as many"
    )
    parser.add_argument("--completion", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--repetitions", type=int, default=4, help="most rounds over all steps")
    parser.add_argument(
        "--seconds", type=float, default=480, help="no new round that would end later than this"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.getLogger("unisd").setLevel(logging.ERROR)
    base = build(args.shape, torch.device("cpu"), torch.float32, args.layers)
    lengths = (args.prompt, args.prompt), (args.completion, args.completion)
    rows = examples(base.config.vocab_size, args.rows, *lengths, reference=args.prompt, contexts=0)
    trainers = {
        name: primed(ours.trainer(twin(base), rows, Star(), options, args.rows))
        for name, (options, _) in STEPS.items()
    }
    steps = {name: lambda built=built: ours.step(built) for name, built in trainers.items()}
    samples = interleave(steps, torch.device("cpu"), args.repetitions, args.seconds, warm_up=False)
    least = {name: min(sample.times) for name, sample in samples.items()}
    lines = []
    for name, (_, other) in STEPS.items():
        share = "" if other is None else f"{100 * (least[name] / least[other] - 1):+.1f} % of {other}"
        lines.append([name, f"{least[name]:.3f}", share])
    tokens = args.rows * args.completion
    rounds = len(samples["no weight"].times)
    print(
        f"{args.shape}, {tokens} loss tokens of {args.rows} rows, {args.threads} thread(s), least of {rounds}"
        " round(s)"
    )
    print("\n".join(markdown_table(("step", "seconds", "added"), lines)))


if __name__ == "__main__":
    main()
