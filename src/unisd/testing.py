"""Tiny random models of several families, a byte-level tokenizer and a few rows: everything a unit
test needs, offline.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] =="
    " 'assistant' %}<|end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


@lru_cache
def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Bytes as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[3:],
        chat_template=CHAT_TEMPLATE if chat else None,
    )


SIZES: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)),
    # Tied head and a softcap small enough to bend the logits of a random model.
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES,
            head_dim=8,
            final_logit_softcapping=2.0,
            sliding_window=8,
            query_pre_attn_scalar=8,
            layer_types=None,
        )
    ),
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(**SIZES, logits_scaling=4.0, embedding_multiplier=2.0)
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
}


def model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random model whose distributions are sharp enough to differ between contexts."""
    torch.manual_seed(seed)
    built = FAMILIES[family]().to(dtype)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0 if "embed" not in name else 3.0)
    return built.eval()


def rows(count: int = 8, contexts: int = 3) -> list[dict[str, Any]]:
    """Rows with everything that UniSD* uses, of different lengths."""
    return [
        {
            "prompt": f"What is {i} + {i * 3}?" + " Think." * (i % 3),
            "privileged_context": f"It is {i * 4}.",
            "auxiliary_contexts": [f"What is {k} + {i}? It is {k + i}." for k in range(contexts)],
            "negative_context": f"It is {i * 4 + 1}.",
        }
        for i in range(count)
    ]
