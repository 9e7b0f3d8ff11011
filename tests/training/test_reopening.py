"""A checkpoint is read as it was written, whatever names its files have: the run goes on from it
with the same bits, the best model is the one that was best, and what does not fit is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tests.families import zoo
from unisd import UserError
from unisd import testing as tiny
from unisd.training.checkpoints import write_manifest

# Each writes names, or shapes, other than those of its modules.
RENAMED = ["qwen3-moe", "gemma3-vision", "qwen3.5-vision", "gpt-neox"]


def build(folder: Path, family: str | None, **options: Any) -> Any:
    if family is not None:
        options["model"], options["processing_class"] = zoo.build(family)
    often = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "learning_rate": 1e-2}
    small = {"gradient_accumulation_steps": 1, "max_completion_length": 6, "agreement": "none"}
    return tiny.trainer(folder, train_dataset=tiny.rows(4), **{**often, **small, **options})


def weights_of(built: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in built.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.long
@pytest.mark.parametrize("family", RENAMED)
def test_a_run_goes_on_with_the_same_bits(tmp_path: Path, family: str) -> None:
    whole = build(tmp_path, family)
    whole.train()
    wanted = weights_of(whole)
    resumed = build(tmp_path, family)
    assert not same(weights_of(resumed), wanted)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 3
    assert same(weights_of(resumed), wanted)


def best_of_two(folder: Path, family: str | None, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A run whose first step is the better one, and its weights after that step."""
    choice = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    often = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": tiny.rows(2)}
    built = build(folder, family, **{"max_steps": 2, **choice, **often, **options})
    kept: list[dict[str, torch.Tensor]] = []

    def evaluate(*args: Any, **kwargs: Any) -> dict[str, float]:
        kept.append(weights_of(built))
        return {"eval_loss": float(built.state.global_step)}

    built.evaluate = evaluate
    built.train()
    assert not same(kept[0], kept[1])
    return built, kept[0]


@pytest.mark.long
@pytest.mark.parametrize("family", RENAMED)
def test_the_best_model_is_the_one_that_was_best(tmp_path: Path, family: str) -> None:
    built, wanted = best_of_two(tmp_path, family)
    assert same(weights_of(built), wanted)


@pytest.mark.long
def test_the_best_adapter_is_the_one_that_was_best(tmp_path: Path) -> None:
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    built, wanted = best_of_two(tmp_path, None, peft_config=adapter)
    assert same(weights_of(built), wanted)


def changed(folder: Path, name: str, change: Any) -> None:
    """Write a checkpoint's weights anew, changed, as a whole checkpoint."""
    weights = load_file(folder / name)
    change(weights)
    save_file(weights, folder / name, metadata={"format": "pt"})
    write_manifest(folder)


def drop(weights: dict[str, torch.Tensor]) -> None:
    del weights[next(name for name in weights if "layers.1.self_attn.q_proj" in name)]


def rename(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.7.self_attn.q_proj.weight"] = torch.zeros(32, 32)


def cut(weights: dict[str, torch.Tensor]) -> None:
    name = "model.embed_tokens.weight"
    weights[name] = weights[name][:-2].contiguous()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, r"it lacks model\.layers\.1\.self_attn\.q_proj\.weight"),
        (rename, r"it has another model\.layers\.7\.self_attn\.q_proj\.weight"),
        (cut, r"it has another model\.embed_tokens\.weight"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path: Path, change: Any, said: str) -> None:
    build(tmp_path, None, max_steps=1).train()
    changed(tmp_path / "checkpoint-1", "model.safetensors", change)
    with pytest.raises(UserError, match=said) as caught:
        build(tmp_path, None).train(resume_from_checkpoint=True)
    assert "resume with the model and the options of that run" in str(caught.value)


def test_weights_of_another_adapter_are_refused(tmp_path: Path) -> None:
    def adapted(*modules: str) -> Any:
        config = LoraConfig(r=2, target_modules=[*modules], task_type="CAUSAL_LM")
        return build(tmp_path, None, max_steps=1, peft_config=config)

    adapted("q_proj").train()
    changed(tmp_path / "checkpoint-1", "adapter_model.safetensors", drop)
    with pytest.raises(UserError, match=r"it lacks base_model\..*layers\.1\.self_attn\.q_proj"):
        adapted("q_proj").train(resume_from_checkpoint=True)


def test_the_cache_stays_on_in_what_is_saved(tmp_path: Path) -> None:
    built = build(tmp_path, None, max_steps=1)
    built.train()
    built.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        assert json.loads((folder / "config.json").read_text())["use_cache"] is True
