"""The next paper in an afternoon: a target of your own, its test and a run, in one file.

The file lies outside of the package.

Say a paper mixes the teacher with the same teacher on the plain prompt, q' = (1 - a) q + a b. That
is one function. It declares the second distribution it needs, and the trainer scores it: one more
forward pass, and no other change.

    python examples/next_paper.py               # a few steps on the pocket model
    python -m pytest examples/next_paper.py     # its test

In a package, an entry point under `unisd.targets` makes it known to the command: `unisd
train --target arithmetic:a=0.2`.
"""

from __future__ import annotations

import math

import torch

from unisd import TargetInputs, UniSDConfig, UniSDTrainer, get_task, load_model_and_tokenizer, register_target


@register_target("arithmetic", sources=("teacher/plain",))
def arithmetic(inputs: TargetInputs, a: float = 0.2) -> torch.Tensor:
    """log((1 - a) q + a b) `[C,V]`, in logs, so that nothing underflows."""
    (plain,) = inputs.sources.values()
    return torch.logaddexp(inputs.teacher_logp + math.log1p(-a), plain + math.log(a))


def test_arithmetic() -> None:
    q, b = (torch.randn(4, 7, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    found = arithmetic(TargetInputs(q, q, {"teacher/plain": b}), a=0.3)
    torch.testing.assert_close(found.exp(), 0.7 * q.exp() + 0.3 * b.exp())


def main(output_dir: str = "unisd-output/next-paper", max_steps: int = 5) -> UniSDTrainer:
    model, tokenizer, _ = load_model_and_tokenizer("pocket")
    task = get_task("pocket")
    args = UniSDConfig(
        output_dir=output_dir,
        max_steps=max_steps,
        max_completion_length=48,
        teacher_prompt_template=task.teacher_prompt_template,
        target="arithmetic:a=0.2",
    )
    trainer = UniSDTrainer(
        model, args, train_dataset=task.load("train", limit=64), processing_class=tokenizer
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
