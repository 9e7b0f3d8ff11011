"""How many tokens a model can read, by its configuration, and what is said of rows beyond that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from tests.families import zoo
from unisd import UserError
from unisd import testing as tiny
from unisd.models.load import context_length

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}


def llama(**rope: Any) -> LlamaForCausalLM:
    sizes = {**tiny.SIZES, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **({"rope_parameters": rope} if rope else {})))


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({}, 64),
        (YARN, 256),
        ({**YARN, "original_max_position_embeddings": 64}, 256),
        ({**YARN, "original_max_position_embeddings": 16}, 64),  # scaled already
        ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, 64),  # says what it reaches
        ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, 128),
    ],
)
def test_scaled_positions_reach_further(rope: dict[str, Any], limit: int) -> None:
    assert context_length(llama(**rope)) == limit


@pytest.mark.parametrize(
    ("name", "limit"), [("gpt-oss", 1024), ("phi3-longrope", 1024), ("llama3", 1024), ("gemma3-vision", 1024)]
)
def test_families_say_what_they_reach(name: str, limit: int) -> None:
    assert context_length(zoo.build(name)[0]) == limit


def test_rows_up_to_the_scaled_limit_are_trained_and_longer_ones_say_what_helps(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * 60, "completion": "y"}] * 8
    with pytest.raises(UserError) as caught:
        tiny.trainer(tmp_path, model=llama(), train_dataset=rows)
    said = str(caught.value)
    assert "over the limit of 54 (the model's context less max_completion_length)" in said
    assert "lower max_completion_length, or give a model with a longer context" in said
    assert "raise max_prompt_length" not in said
    tiny.trainer(tmp_path, model=llama(**YARN), train_dataset=rows)
    with pytest.raises(UserError, match=r"shorten or remove them, or raise max_prompt_length\.$"):
        tiny.trainer(tmp_path, model=llama(**YARN), train_dataset=rows, max_prompt_length=8)


def test_single_tokens_of_a_tied_model_cannot_be_trained(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6], task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="leave those out of the peft_config") as caught:
        tiny.trainer(tmp_path, "qwen3", peft_config=config)
    assert "lora_target_modules" not in str(caught.value)
