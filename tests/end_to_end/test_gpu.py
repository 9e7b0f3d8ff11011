"""On a CUDA device: the kernels that a CPU does not have, and the same steps as on a CPU.

`pytest -m gpu`.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.helpers.attention import final_and_gradients
from tests.helpers.losses import problem, run
from tests.helpers.steps import STAR
from unisd import testing as tiny
from unisd.backbone import Backbone
from unisd.kernels import attention
from unisd.kernels.attention import PACKED_SDPA
from unisd.losses.chunked import chunked_loss
from unisd.losses.head import Head
from unisd.losses.plain import plain_loss
from unisd.methods.divergence import DivergenceSpec
from unisd.testing import trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance."""
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_packed_rows_by_flash_attention(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 no further from float64 than transformers' own masked attention in bfloat16 (half
    as far again, for luck).
    """
    found: dict[str, list[torch.Tensor]] = {}
    for name, dtype, implementation in (
        ("exact", torch.float64, "sdpa"),
        ("masked", torch.bfloat16, "sdpa"),
        ("flash", torch.bfloat16, PACKED_SDPA),
    ):
        backbone = Backbone(tiny.model(family, dtype=dtype).to(CUDA))
        if implementation == "sdpa":
            backbone.causal_lm.set_attn_implementation("sdpa")
            backbone.tells_rows = False
        calls: list[Any] = []
        kernel = attention.varlen_attn

        def watched(*args: Any, calls: list[Any] = calls, kernel: Any = kernel, **kwargs: Any) -> Any:
            calls.append(kwargs)
            return kernel(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(attention, "varlen_attn", watched)
            found[name] = final_and_gradients(backbone)
        assert bool(calls) == (name == "flash")
    for exact, masked, flash in zip(found["exact"], found["masked"], found["flash"], strict=True):
        assert off(flash, exact) <= 1.5 * off(masked, exact) + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_chunked_loss(dtype: torch.dtype, alpha: float) -> None:
    x = problem(dtype, tokens=29, vocabulary=9001)

    def move(value: torch.Tensor) -> torch.Tensor:
        return value.detach().to(CUDA).requires_grad_(value.requires_grad)

    for name in ("hidden", "weight", "bias", "teacher_hidden", "targets", "coefficient"):
        setattr(x, name, move(getattr(x, name)))
    x.teacher = Head(move(x.teacher.weight), move(x.teacher.bias))
    spec = DivergenceSpec(alpha=alpha, temperature=0.7)
    clip = float(run(plain_loss, x, spec)[0].divergence_N.median()) * 1.01  # half of the tokens
    plain, plain_grads = run(plain_loss, x, spec, token_clip=clip)
    ours, grads = run(chunked_loss, x, spec, token_clip=clip, chunk_tokens=7)
    assert float(ours.loss.detach()) == pytest.approx(
        float(plain.loss.detach()), rel=1e-5 if dtype == torch.float32 else 2e-2
    )
    if dtype == torch.bfloat16:
        assert all(off(a, b) < 2e-2 for a, b in zip(grads, plain_grads, strict=True))
        return
    # Two float32 computations of a JSD's gradient, a difference of like numbers, are 3e-5 apart:
    # both are held against float64.
    for name in ("hidden", "weight", "bias", "teacher_hidden", "coefficient"):
        value = getattr(x, name)
        setattr(x, name, value.detach().double().requires_grad_(value.requires_grad))
    x.teacher = Head(x.teacher.weight.double(), x.teacher.bias.double())
    _, exact_grads = run(plain_loss, x, spec, token_clip=clip)
    for a, b, exact in zip(grads, plain_grads, exact_grads, strict=True):
        assert off(a, exact) < 1.5 * off(b, exact) + 1e-6


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lora", [False, True])
def test_the_steps_of_a_cpu(tmp_path: Path, lora: bool) -> None:
    for name in ("cpu", "cuda"):
        peft = (
            LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
            if lora
            else None
        )
        built = trainer(
            tmp_path / name,
            use_cpu=name == "cpu",
            max_steps=4,
            packing="packed",
            completion_source="reference",
            peft_config=peft,
            **STAR,
        )
        assert built.args.device.type == name
        built.train()
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}, {"packing": "padded"}])
def test_half_precision_weights_with_an_adapter(tmp_path: Path, options: dict[str, Any]) -> None:
    peft = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = tiny.model("qwen3", dtype=torch.bfloat16)
    common = {"use_cpu": False, "max_steps": 3, "completion_source": "reference", "peft_config": peft, **STAR}
    trainer(tmp_path / "half", model=model, **common, **options).train()
    trainer(tmp_path / "whole", model=tiny.model("qwen3", dtype=torch.bfloat16).float(), **common).train()
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "whole"), rel=0.1)


def test_resume(tmp_path: Path) -> None:
    common = {"use_cpu": False, "save_strategy": "steps", "save_steps": 2, **STAR}
    trainer(tmp_path / "whole", max_steps=4, **common).train()
    trainer(tmp_path / "parts", max_steps=2, **common).train()
    trainer(tmp_path / "parts", max_steps=4, **common).train(resume_from_checkpoint=True)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_the_students_loop_does_not_wait_for_the_device(tmp_path: Path) -> None:
    built = trainer(tmp_path, use_cpu=False, bf16=True, record_samples=0, **STAR)
    assert built.packed
    batches, count = built.get_batch_samples(
        iter(built.get_train_dataloader()), built.args.gradient_accumulation_steps, CUDA
    )
    built.model.train()
    batches = list(batches)
    built.compute_loss(built.model, batches[0], num_items_in_batch=count).backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            built.compute_loss(built.model, batches[1], num_items_in_batch=count).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    # transformers looks at the mask, once a pass
    waits = [place for place in waits if not place.startswith("masking_utils.py")]
    assert not waits
