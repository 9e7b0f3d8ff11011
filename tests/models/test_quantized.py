"""QLoRA on a CPU: 4-bit base weights that nothing changes, and a teacher that differs in the
adapter alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unisd import UniSDConfig, UniSDTrainer
from unisd.models.load import load_model_and_tokenizer
from unisd.pocket import BASE_DIR
from unisd.tasks import get

pytestmark = pytest.mark.real


def test_gradients_pass_through_weights_that_have_been_evaluated() -> None:
    """In eval mode bitsandbytes would give a CPU that computes in bf16 a layout of the weights
    whose product has no gradient.
    """
    model, _, _ = load_model_and_tokenizer(str(BASE_DIR), load_in_4bit=True)
    x = model.get_input_embeddings()(torch.arange(8)[None]).detach()

    def gradient() -> torch.Tensor:
        given = x.clone().requires_grad_()
        model.train()(inputs_embeds=given).logits.square().sum().backward()
        assert given.grad is not None
        return given.grad

    before = gradient()
    with torch.no_grad():
        model.eval()(inputs_embeds=x)
    torch.testing.assert_close(gradient(), before)


@pytest.mark.parametrize("kind", ["base", "ema"])
def test_teachers_of_a_quantised_model(kind: str, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM, LoraConfig

    model, tokenizer, _ = load_model_and_tokenizer(str(BASE_DIR), load_in_4bit=True)
    packed = {name: p.detach().clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert packed
    rate, history = 0.25, []
    args = UniSDConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=1,
        learning_rate=1e-2, teacher_model_kind=kind, teacher_update_rate=rate, agreement="token",
        contrastive_weight=0.1, feature_weight=0.1, max_completion_length=16,
        save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = UniSDTrainer(
        model, args, get("pocket").load("train", limit=12), processing_class=tokenizer, peft_config=adapter
    )
    trained = trainer.teacher.parameters
    assert all("lora" in name for name in trained)
    initial = {name: p.detach().clone() for name, p in trained.items()}
    update = trainer.teacher.update

    def remember(step: int) -> None:
        history.append({name: p.detach().clone() for name, p in trained.items()})
        update(step)

    trainer.teacher.update = remember  # type: ignore[method-assign]
    trainer.train()
    assert len(history) == 3
    for name, p in trainer.model.named_parameters():
        if p.dtype == torch.uint8:
            assert torch.equal(p, packed[name.removeprefix("base_model.model.").replace(".base_layer", "")])
    for name, start in initial.items():
        expected = start
        for weights in history if kind == "ema" else []:
            expected = (1 - rate) * expected + rate * weights[name]
        torch.testing.assert_close(trainer.teacher.state[name], expected)
    assert any(not torch.equal(history[-1][name], initial[name]) for name in initial)
    trainer.save_model()
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path).peft_config["default"].r == 4
