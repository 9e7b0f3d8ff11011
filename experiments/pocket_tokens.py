"""Where do the weights fall? `python -m experiments.pocket_tokens [--folder docs/results]`.

Looks at the tokens that the untouched base writes to the training prompts. A token *carries the
fact* where the teacher under the right reference and under the wrong one differ by a nat or more.
For these and for all others: their share, their share of the divergence, and the mean weight of
each reliability weight, apart for rows whose reference is right and rows whose reference is wrong.
A weight that tells wrong supervision from right is lower on the fact's tokens of the wrong rows
than of the right ones. Writes `pocket-tokens.md`; a minute on two cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from unisd.console import markdown_table
from unisd.methods.registry import parse_weight
from unisd.methods.scores import StepScores
from unisd.pocket.task import PocketTask
from unisd.run.inputs import load_data, load_model
from unisd.run.resolve import parse
from unisd.trainer import UniSDTrainer

APART = 1.0  # nats between l+ and l- from which a token carries the fact
WEIGHTS = {
    "token agreement, gamma 0.01": "agreement_token:gamma=0.01",
    "token agreement, gamma 1": "agreement_token:gamma=1",
    "sequence agreement, gamma 1": "agreement_sequence:gamma=1",
    "corroboration": "corroboration",
}


def scores(noise: float, seed: int) -> tuple[StepScores, Tensor]:
    """Score every training row under the untouched base.

    Returns also which rows [B] have a wrong reference.
    """
    with tempfile.TemporaryDirectory() as folder:
        # A weight besides agreement: only then are the teacher's own log-probabilities scored
        # before the loss.
        flags = ["--recipe", "unisd-star", "--token_weights", "corroboration", "--noise", str(noise)]
        flags += ["--seed", str(seed), "--output_dir", folder]
        options, config = parse(flags)
        data = load_data(options, config.seed)
        # Where the reference is wrong, the other one is the right one: the fact's tokens are where
        # the two part.
        for row, clean in zip(data.train, PocketTask().load("train", seed=config.seed), strict=True):
            if row["noisy"]:
                row["negative_context"] = clean["privileged_context"]
        model, tokenizer, _ = load_model(options)
        trainer = UniSDTrainer(model, config, data.train, processing_class=tokenizer)
        numbers = [(number, 0) for number in range(len(data.train))]
        rows = trainer._requests(numbers, trainer._rollout(numbers))
        trainer.scorer.needs |= {"teacher"}  # no weight looks at it; the choice of tokens below does
        found, _ = trainer.scorer.score(rows, config.device)
    return found, torch.tensor([bool(row["noisy"]) for row in data.train])


def table(found: StepScores, wrong_B: Tensor) -> list[str]:
    """Markdown lines, one per group of tokens."""
    assert found.teacher_logp is not None and found.negative_logp is not None and found.divergence is not None
    fact_BT = found.mask & ((found.teacher_logp - found.negative_logp).abs() >= APART)
    weights = {}
    for name, spec in WEIGHTS.items():
        value = parse_weight(spec)(found)
        weights[name] = value if value.dim() == 2 else value[:, None].expand(found.mask.shape)
    lines = []
    total, divergence = found.mask.sum(), found.divergence[found.mask].sum()
    for reference, chosen_B in (("right", ~wrong_B), ("wrong", wrong_B)):
        for name, group_BT in (("carry the fact", fact_BT), ("others", found.mask & ~fact_BT)):
            chosen_BT = group_BT & chosen_B[:, None]
            if not chosen_BT.any():
                continue
            means = [f"{float(weight[chosen_BT].mean()):.4f}" for weight in weights.values()]
            parts = (float(chosen_BT.sum() / total), float(found.divergence[chosen_BT].sum() / divergence))
            lines.append([reference, name, *(f"{100 * part:.1f}" for part in parts), *means])
    return markdown_table(
        ("reference", "tokens", "share of tokens, %", "share of divergence, %", *weights), lines
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--noise", type=float, default=0.3, help="share of wrong references")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("docs/results"))
    args = parser.parse_args(argv)
    disable_progress_bar()
    parts = [
        "# Which tokens carry the fact, and what weighs them\n\n`python -m experiments.pocket_tokens --seed"
        f" {args.seed}`"
    ]
    for noise in (0.0, args.noise):
        parts += [f"## {100 * noise:.0f} % wrong references", "\n".join(table(*scores(noise, args.seed)))]
    text = "\n\n".join(parts)
    (args.folder / "pocket-tokens.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
