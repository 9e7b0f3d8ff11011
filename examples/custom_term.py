"""A term of the loss of your own, its test, and a run, in one file outside the package.

This one adds a squared distance of log-probabilities, (l - l+)^2, so that a token that the student
writes is pulled to what the teacher thinks of it. A term sees values of tokens; `contrast` and
`features` are such terms, too.

    python examples/custom_term.py                       # a few steps on the pocket model
    python -m pytest examples/custom_term.py             # its test

In a package, an entry point under `unisd.terms` makes it known to the command: `unisd train
--terms squared:coefficient=0.1,cap=4`.
"""

from __future__ import annotations

import torch

from unisd import TermInputs, UniSDConfig, UniSDTrainer, get_task, load_model_and_tokenizer, register_term


@register_term("squared")
def squared(inputs: TermInputs, cap: float = 9.0) -> torch.Tensor:
    """min((l - l+)^2, cap) `[N]`; the gradient flows through l."""
    return (inputs.student_logp - inputs.teacher_logp).square().clamp(max=cap)


def test_squared() -> None:
    l, right = torch.tensor([-1.0, -9.0], requires_grad=True), torch.tensor([-3.0, -1.0])  # noqa: E741
    values = squared(TermInputs(l, right, right, right), cap=16.0)
    assert values.tolist() == [4.0, 16.0]
    assert torch.autograd.grad(values.sum(), l)[0].tolist() == [4.0, 0.0]  # none above the cap


def main(output_dir: str = "unisd-output/custom-term", max_steps: int = 5) -> UniSDTrainer:
    model, tokenizer, _ = load_model_and_tokenizer("pocket")
    task = get_task("pocket")
    args = UniSDConfig(
        output_dir=output_dir,
        max_steps=max_steps,
        max_completion_length=48,
        teacher_prompt_template=task.teacher_prompt_template,
        terms=["squared:coefficient=0.1"],
    )
    rows = task.load("train", limit=64)
    trainer = UniSDTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
