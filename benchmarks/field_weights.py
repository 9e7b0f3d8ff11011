"""What token weights add to a step's loss at the shape of a 0.5B model (H = 896, V = 151,936), head frozen as under LoRA.

    python benchmarks/field_weights.py [--tokens 128] [--repeats 3]

Prints seconds of one loss with gradient: plain, with `dash` and `confidence_gate` waiting for the pass, and what `contrast_weight` adds to
scoring
(one more projection of the teacher's states). The loss is only a part of a step: shares of a step are smaller.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from unisd.losses import DivergenceSpec, Head, chunked_loss, token_scores
from unisd.mechanisms import StepScores, parse_weight
from unisd.step import Reweigh

ROWS = 4


def least_seconds(repeats: int, works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Least seconds of each, after one round to warm up; the works take turns, so that a busy machine does not favour one."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: min(seconds[1:]) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    N, H, V = options.tokens // ROWS * ROWS, 896, 151_936
    x = SimpleNamespace(student=torch.randn(N, H, requires_grad=True), teacher=torch.randn(N, H), negative=torch.randn(N, H))
    head, targets_N, coefficient_N = Head(0.02 * torch.randn(V, H)), torch.randint(V, (N,)), torch.full((N,), 1 / N)
    mask_BT = torch.ones(ROWS, N // ROWS, dtype=torch.bool)
    scores = StepScores(mask_BT, targets_N.reshape(mask_BT.shape), torch.zeros(mask_BT.shape))

    def loss(name: str | None) -> None:
        waiting = [] if name is None else [parse_weight(name)]
        reweigh = Reweigh(waiting, scores, coefficient_N.reshape(mask_BT.shape), "tokens") if waiting else None
        spec = DivergenceSpec(alpha=0.0, entry_clip=0.05)
        chunked_loss(x.student, head, x.teacher, head, targets_N, spec, coefficient_N, reweigh=reweigh).loss.backward()

    def contrasted() -> None:
        with torch.no_grad():
            chunked_loss(x.negative, head, x.teacher, head, targets_N, DivergenceSpec(alpha=0.0), coefficient_N)

    works: dict[str, Callable[[], Any]] = {
        "loss with gradient": lambda: loss(None),
        "  with dash": lambda: loss("dash"),
        "  with confidence_gate": lambda: loss("confidence_gate"),
        "negative view's log-probabilities": lambda: token_scores(x.negative, head, targets_N),
        "  with contrast_weight": contrasted,
    }
    print(f"{N} tokens, {torch.get_num_threads()} thread(s)")
    for name, seconds in least_seconds(options.repeats, works).items():
        print(f"{name}: {seconds:.3f} s")


if __name__ == "__main__":
    main()
