"""A reliability weight of your own, without touching the trainer.

A weight is one pure function of the step's scores. It declares what it looks at; the trainer
computes those views and no others. This one trusts tokens on which the teacher is sure: w =
exp(-beta * H(q)), with H the teacher's entropy in nats.

    python examples/custom_weight.py

A package makes its weights available to the command too (`unisd train --token_weights
sure_teacher:beta=0.5`) by an entry point:

    [project.entry-points."unisd.token_weights"]
    sure_teacher = "my_package.weights:sure_teacher"
"""

from __future__ import annotations

import argparse

import torch

from unisd import StepScores, UniSDConfig, UniSDTrainer, get_task, load_model_and_tokenizer, register_weight


@register_weight("sure_teacher", level="token", needs=frozenset({"entropy"}), normalizer="weights")
def sure_teacher(scores: StepScores, beta: float = 1.0) -> torch.Tensor:
    """`[B,T]` weights in (0, 1]: 1 where the teacher is certain."""
    assert scores.teacher_entropy is not None
    return torch.exp(-beta * scores.teacher_entropy)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max_steps", type=int, default=10)
    parser.add_argument("--output_dir", default="unisd-output/custom-weight")
    options = parser.parse_args()

    model, tokenizer, _ = load_model_and_tokenizer("pocket")
    task = get_task("pocket")
    args = UniSDConfig(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        learning_rate=1e-3,
        max_completion_length=48,
        teacher_prompt_template=task.teacher_prompt_template,
        token_weights=["sure_teacher:beta=0.5"],
    )
    trainer = UniSDTrainer(
        model, args, train_dataset=task.load("train", limit=64), processing_class=tokenizer
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "weight/sure_teacher/mean" in line]
    print(
        f"mean weight, first and last step: {logged[0]['weight/sure_teacher/mean']:.3f},"
        f" {logged[-1]['weight/sure_teacher/mean']:.3f}"
    )


if __name__ == "__main__":
    main()
