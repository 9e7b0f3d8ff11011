"""Help to test plug-ins offline: tiny models, a tokenizer of bytes, rows, an engine, a trainer.

    from unisd import testing

    def test_my_weight(tmp_path):
        trainer = testing.trainer(tmp_path, "qwen3", token_weights=["my_weight"])
        loss, gradients = testing.gradients(trainer)

Models are random, with 2 layers of 32 units: a step takes a fraction of a second on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from inspect import signature
from pathlib import Path
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

from unisd.config import UniSDConfig
from unisd.rollout.engine import Completion, NoiseKey, Sampling
from unisd.trainer import UniSDTrainer

__all__ = ["FAMILIES", "SIZES", "FixedEngine", "gradients", "model", "rows", "tokenizer", "trainer"]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] =="
    " 'assistant' %}<|end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


@lru_cache
def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes: 262 tokens, of which the first 6 are special.

    Ids 0, 1 and 2 are pad, BOS and EOS. `chat=False`: without a chat template, as base models.
    """
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


# Of every family; a test may add one: `FAMILIES["mine"] = lambda: MyModel(MyConfig(**SIZES))`.
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
    """Return a random causal LM of a family (one of `FAMILIES`), in eval mode.

    Its distributions are sharp enough to differ between contexts.
    """
    torch.manual_seed(seed)
    built = FAMILIES[family]().to(dtype)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0 if "embed" not in name else 3.0)
    return built.eval()


def rows(count: int = 8, contexts: int = 3) -> list[dict[str, Any]]:
    """Return rows of different lengths with all that UniSD* uses, each with so many `contexts`."""
    return [
        {
            "prompt": f"What is {i} + {i * 3}?" + " Think." * (i % 3),
            "privileged_context": f"It is {i * 4}.",
            "auxiliary_contexts": [f"What is {k} + {i}? It is {k + i}." for k in range(contexts)],
            "negative_context": f"It is {i * 4 + 1}.",
        }
        for i in range(count)
    ]


class FixedEngine:
    """Answers with given completions (lists of token ids), whatever the model's weights are.

    Generation `g` of row `i` of the dataset gets `completions[(i + g) % len(completions)]`, cut at
    `max_new_tokens`. Greedy prompts, which have no row, get them in order.
    """

    returns_logps = False

    def __init__(self, completions: Sequence[Sequence[int]]) -> None:
        self.completions = completions

    def sync(self) -> None:
        pass

    def generate(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[NoiseKey] | None, sampling: Sampling
    ) -> list[Completion]:
        numbers = range(len(prompts)) if keys is None else [row + g for _, _, row, g in keys]
        chosen = [list(self.completions[number % len(self.completions)]) for number in numbers]
        most = sampling.max_new_tokens
        return [Completion(ids[:most], truncated=len(ids) > most) for ids in chosen]

    def sleep(self) -> None:
        pass


def trainer(output_dir: str | Path, family: str = "llama", **options: Any) -> UniSDTrainer:
    """Return a trainer on the CPU: 8 rows, a tiny model, steps of 4 micro-batches of 2 rows.

    `options` are those of :class:`UniSDConfig` and the arguments of :class:`UniSDTrainer` (`model`,
    `train_dataset`, `engine`, `peft_config`, ...); both come before the defaults here.
    """
    given = {name: options.pop(name) for name in signature(UniSDTrainer).parameters if name in options}
    if "model" not in given:
        given["model"] = model(family)
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_completion_length": 10,
        "temperature": 1.0,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 3,
        # Bytes are tokens here: the built-in templates would be most of every sequence.
        "teacher_prompt_template": "{prompt} Ref: {privileged_context} Now you.",
        "auxiliary_prompt_template": "{context} {prompt}",
    }
    defaults = {
        "args": UniSDConfig(**settings | options),
        "train_dataset": rows(),
        "processing_class": tokenizer(),
    }
    return UniSDTrainer(**defaults | given)


def gradients(built: UniSDTrainer, perturb: float = 0.05) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients (by parameter name) of the first optimizer step, without an update.

    The student is first moved off its teacher by noise of `perturb` times the mean size of each
    parameter, so that loss and gradients are not near zero.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                parameter += perturb * parameter.abs().mean() * noise
    batches, count = built.get_batch_samples(
        iter(built.get_train_dataloader()), built.args.gradient_accumulation_steps, built.args.device
    )
    built.model.zero_grad()
    built.model.train()
    total = 0.0
    for batch in batches:
        loss = built.compute_loss(built.model, batch, num_items_in_batch=count)
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in built.model.named_parameters() if p.grad is not None}
