"""Build models of the measured shapes (random weights), a tokenizer and the rows of a step.

The words of the tokenizer are its ids.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

PAD, EOS = 0, 1
TEACHER_TEMPLATE = "{prompt} {privileged_context}"
AUXILIARY_TEMPLATE = "{context} {prompt}"
"""The published layout: a reference follows the problem, a solved example of another problem comes
before it.
"""
CONTEXTS = 3


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only model."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    experts: int = 0
    """With some, `intermediate` is the width of each, and `EXPERTS_A_TOKEN` of them see a token."""


EXPERTS_A_TOKEN = 8

SHAPES = {
    # Sizes of a test: everything at once in a second.
    "tiny": Shape("llama", 32, 64, 2, 4, 2, 320, False),
    "pocket": Shape("llama", 128, 320, 4, 4, 2, 2048, True),
    "smollm2-135m": Shape("llama", 576, 1536, 30, 9, 3, 49_152, True),
    "qwen2.5-0.5b": Shape("qwen2", 896, 4864, 24, 14, 2, 151_936, True),
    "llama-32k": Shape("llama", 1024, 2816, 12, 16, 8, 32_000, False),
    "qwen3-moe-small": Shape("qwen3_moe", 512, 192, 12, 8, 2, 32_000, True, experts=64),
    "qwen2.5-1.5b": Shape("qwen2", 1536, 8960, 28, 12, 2, 151_936, True),
    "qwen2.5-7b": Shape("qwen2", 3584, 18_944, 28, 28, 4, 152_064, False),
}


def build(
    name: str, device: torch.device, dtype: torch.dtype, layers: int | None = None, family: str | None = None
) -> Any:
    """Build a random model of a shape, in evaluation mode.

    `layers` cuts its depth, `name:8000` gives another vocabulary, `family` another architecture.
    """
    name, _, vocabulary = name.partition(":")
    shape = SHAPES[name]
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    }[family or shape.family]
    routed = {
        "num_experts": shape.experts,
        "num_experts_per_tok": EXPERTS_A_TOKEN,
        "moe_intermediate_size": shape.intermediate,
        "head_dim": shape.hidden // shape.heads,
    }
    config = config_class(
        vocab_size=int(vocabulary) if vocabulary else shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=shape.tied,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        **(routed if shape.experts else {}),
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = model_class(config).to(dtype)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    return model.eval()


def twin(model: Any) -> Any:
    """Build another module tree over the same weights.

    Each implementation may put its own adapters on it.
    """
    shared = {id(tensor): tensor for tensor in model.parameters()}
    return copy.deepcopy(model, memo=shared)


def lora(rank: int = 64) -> LoraConfig:
    """The paper's adapter without its dropout (TRL disables dropout)."""
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Word `t17` is token 17."""
    # Special tokens are found inside other words too: they need names that no word holds.
    words = {"<pad>": PAD, "<eos>": EOS} | {f"t{i}": i for i in range(2, vocabulary)}
    core = Tokenizer(models.WordLevel(vocab=words, unk_token="t2"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


@dataclass(frozen=True)
class Example:
    """Holds one row of a step.

    Token ids of the prompt under each view, and of the completion that all of them score.
    """

    student: list[int]
    teacher: list[int]
    negative: list[int]
    auxiliary: list[list[int]]
    completion: list[int]

    @property
    def text_row(self) -> dict[str, Any]:
        """The same as a row of a dataset, in words."""

        def words(ids: list[int]) -> str:
            return " ".join(f"t{i}" for i in ids)

        length = len(self.student)
        return {
            "prompt": words(self.student),
            "privileged_context": words(self.teacher[length:]),
            "negative_context": words(self.negative[length:]),
            "auxiliary_contexts": [words(view[:-length]) for view in self.auxiliary],
        }


def examples(
    vocabulary: int,
    count: int,
    prompts: tuple[int, int],
    completions: tuple[int, int],
    reference: int = 32,
    contexts: int = CONTEXTS,
    seed: int = 0,
) -> list[Example]:
    """Draw rows with lengths uniform in the given ranges.

    Every context (reference, wrong reference, auxiliary) has `reference` tokens.
    """
    draw = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(length)]

    rows = []
    for _ in range(count):
        prompt, completion = ids(draw.randint(*prompts)), ids(draw.randint(*completions))
        right, wrong = (prompt + ids(reference) for _ in range(2))
        rows.append(
            Example(prompt, right, wrong, [ids(reference) + prompt for _ in range(contexts)], completion)
        )
    return rows
