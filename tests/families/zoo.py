"""Every family of models that users bring, tiny and random, with a tokenizer of its manner.

    model, tokenizer = build("qwen3-moe")

Two to four layers of 32 to 64 units, as many as show the family's kinds of layers (windows, states,
experts); weights are drawn from a fixed seed and large enough that contexts matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers

from tests.families.tokenizers_of import ids_of, tokenizer

SEED = 0


@dataclass(frozen=True)
class Family:
    """One architecture with its tokenizer.

    config: makes the configuration from sizes and token ids. traits: what tests ask about.
    """

    title: str
    model_class: str
    config: Callable[[dict[str, Any]], Any]
    style: str
    traits: frozenset[str] = frozenset()

    @property
    def is_here(self) -> bool:
        """Whether the installed transformers has it."""
        return hasattr(transformers, self.model_class)


def _sizes(style: str) -> dict[str, Any]:
    ids = {name: value for name, value in ids_of(style).items() if name != "stops"}
    return {
        "vocab_size": len(tokenizer(style)), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 1024,
        **ids,
    }  # fmt: skip


def _family(
    title: str, prefix: str, style: str, *traits: str, config: str = "", model: str = "", **options: Any
) -> Family:
    """A text model: `{prefix}Config` with our sizes and `options` (None: leave a size out)."""

    def made(sizes: dict[str, Any]) -> Any:
        kept = {name: value for name, value in (sizes | options).items() if value is not None}
        return getattr(transformers, config or f"{prefix}Config")(**kept)

    return Family(title, model or f"{prefix}ForCausalLM", made, style, frozenset(traits))


def _within(
    whole: str,
    text: Family,
    vision: str,
    vision_options: dict[str, Any],
    images: dict[str, str],
    **options: Any,
) -> Callable[[dict[str, Any]], Any]:
    """The configuration of a model for images around that of a text model.

    images: names of the options that hold the id of a marker, and the marker.
    """

    def made(sizes: dict[str, Any]) -> Any:
        found = tokenizer(text.style)
        ids = {name: found.convert_tokens_to_ids(marker) for name, marker in images.items()}
        seeing = getattr(transformers, vision)(**vision_options)
        return getattr(transformers, whole)(
            text_config=text.config(sizes).to_dict(), vision_config=seeing.to_dict(), **ids, **options
        )

    return made


_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16,
    "mamba_expand": 2,
}  # fmt: skip
_LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_MLA = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 2,
    "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "first_k_dense_replace": 1, "head_dim": None,
}  # fmt: skip
_SIGLIP = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4, "vision_use_head": False,
}  # fmt: skip
_SHORT, _LONG = [1.0, 1.1, 1.2, 1.3], [1.0, 2.0, 4.0, 8.0]

_QWEN35 = _family("Qwen3.5", "Qwen3_5", "qwen3.5", "states", config="Qwen3_5TextConfig", **_LINEAR)
_GEMMA3 = _family(
    "Gemma 3", "Gemma3", "gemma", "tied", config="Gemma3TextConfig", sliding_window=16,
    query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip
_GEMMA4 = _family(
    "Gemma 4", "Gemma4", "gemma4", "tied", config="Gemma4TextConfig", sliding_window=16, global_head_dim=8,
    num_hidden_layers=4, hidden_size_per_layer_input=8, num_kv_shared_layers=2,
    vocab_size_per_layer_input=len(tokenizer("gemma4")),
    layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    final_logit_softcapping=30.0,
)  # fmt: skip
_MISTRAL = _family("Mistral 3", "Mistral", "mistral", sliding_window=16)

_PHIMOE = _family(
    "Phi-3.5 MoE", "Phimoe", "phi3", "experts", "router", head_dim=None, num_local_experts=4,
    num_experts_per_tok=2,
)  # fmt: skip
_JETMOE = _family(
    "JetMoE", "JetMoe", "base", "experts", "router", "tied", head_dim=None, kv_channels=8,
    num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2,
)  # fmt: skip
_MAMBA_2 = _family(
    "Mamba 2", "Mamba2", "base", "states", num_attention_heads=None, num_key_value_heads=None, head_dim=8,
    state_size=8, num_heads=8, n_groups=1, chunk_size=16, expand=2,
)  # fmt: skip
_ZAMBA2 = _family(
    "Zamba 2", "Zamba2", "base", "states", "tied", head_dim=None, mamba_d_state=8, mamba_ngroups=1,
    n_mamba_heads=2, mamba_headdim=32, chunk_size=16, num_mem_blocks=1, hybrid_layer_ids=[1],
    layers_block_type=["mamba", "hybrid"], use_mem_rope=True, adapter_rank=4,
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "qwen2.5": _family("Qwen2.5", "Qwen2", "qwen2.5", "tied", tie_word_embeddings=True, head_dim=None),
    "qwen3": _family("Qwen3", "Qwen3", "qwen3", "tied", tie_word_embeddings=True),
    "qwen3-moe": _family("Qwen3 MoE", "Qwen3Moe", "qwen3", "experts", "router", **_MOE),
    "qwen3-next": _family(
        "Qwen3-Next",
        "Qwen3Next",
        "qwen3",
        "experts",
        "router",
        "states",
        shared_expert_intermediate_size=24,
        **_LINEAR,
        **_MOE,
    ),
    "qwen3.5": _QWEN35,
    "qwen3.5-vision": Family(
        "Qwen3.5 (images)",
        "Qwen3_5ForConditionalGeneration",
        _within(
            "Qwen3_5Config",
            _QWEN35,
            "Qwen3_5VisionConfig",
            {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 4,
                "num_position_embeddings": 16,
            },
            {
                "image_token_id": "<|image_pad|>",
                "video_token_id": "<|video_pad|>",
                "vision_start_token_id": "<|vision_start|>",
                "vision_end_token_id": "<|vision_end|>",
            },
        ),
        "qwen3.5",
        frozenset({"states", "vision"}),
    ),
    "llama3": _family(
        "Llama 3",
        "Llama",
        "llama3",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama4": _family(
        "Llama 4 (text)",
        "Llama4",
        "llama4",
        "experts",
        "router",
        config="Llama4TextConfig",
        num_hidden_layers=4,
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size_mlp=48,
        attention_chunk_size=16,
        interleave_moe_layer_step=2,
        floor_scale=32,
    ),
    "mistral3": _MISTRAL,
    "mistral3-vision": Family(
        "Mistral 3 (images)",
        "Mistral3ForConditionalGeneration",
        _within(
            "Mistral3Config",
            _MISTRAL,
            "PixtralVisionConfig",
            {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
            },
            {"image_token_index": "[IMG]"},
            tie_word_embeddings=False,
        ),
        "mistral",
        frozenset({"vision"}),
    ),
    "mixtral": _family("Mixtral", "Mixtral", "mixtral", "experts", "router", num_local_experts=4),
    "gemma2": _family(
        "Gemma 2",
        "Gemma2",
        "gemma",
        "tied",
        sliding_window=16,
        query_pre_attn_scalar=8,
        final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma3": _GEMMA3,
    "gemma3-vision": Family(
        "Gemma 3 (images)",
        "Gemma3ForConditionalGeneration",
        _within(
            "Gemma3Config",
            _GEMMA3,
            "SiglipVisionConfig",
            _SIGLIP,
            {
                "image_token_index": "<image_soft_token>",
                "boi_token_index": "<start_of_image>",
                "eoi_token_index": "<end_of_image>",
            },
            mm_tokens_per_image=4,
        ),
        "gemma",
        frozenset({"tied", "vision"}),
    ),
    "gemma4": _GEMMA4,
    "gemma4-vision": Family(
        "Gemma 4 (images)",
        "Gemma4ForConditionalGeneration",
        _within(
            "Gemma4Config",
            _GEMMA4,
            "Gemma4VisionConfig",
            {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "patch_size": 4,
                "position_embedding_size": 16,
            },
            {"image_token_id": "<|image|>"},
        ),
        "gemma4",
        frozenset({"tied", "vision"}),
    ),
    "gpt-oss": _family(
        "gpt-oss",
        "GptOss",
        "harmony",
        "experts",
        "router",
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
        },
    ),
    "phi4": _family("Phi-4", "Phi3", "phi4", head_dim=None),
    "phi3-longrope": _family(
        "Phi-3 (LongRoPE)",
        "Phi3",
        "phi3",
        "longrope",
        head_dim=None,
        original_max_position_embeddings=256,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "short_factor": _SHORT,
            "long_factor": _LONG,
            "original_max_position_embeddings": 256,
        },
    ),
    "olmo2": _family("OLMo 2", "Olmo2", "olmo2", head_dim=None),
    "olmo3": _family(
        "OLMo 3",
        "Olmo3",
        "chatml",
        sliding_window=16,
        head_dim=None,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "deepseek-v3": _family("DeepSeek V3", "DeepseekV3", "deepseek", "experts", **_MLA),
    "glm4.5": _family(
        "GLM-4.5",
        "Glm4Moe",
        "glm",
        "experts",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
    ),
    "lfm2": _family(
        "LFM2",
        "Lfm2",
        "lfm2",
        "states",
        "tied",
        head_dim=None,
        layer_types=["conv", "full_attention"],
        block_multiple_of=8,
    ),
    "granite": _family(
        "Granite",
        "Granite",
        "granite",
        "tied",
        head_dim=None,
        tie_word_embeddings=True,
        logits_scaling=4.0,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
    ),
    "granite-moe": _family(
        "Granite MoE",
        "GraniteMoe",
        "granite",
        "experts",
        "router",
        "tied",
        head_dim=None,
        tie_word_embeddings=True,
        num_local_experts=4,
        num_experts_per_tok=2,
        logits_scaling=4.0,
    ),
    "granite-hybrid": _family(
        "Granite 4 (hybrid)",
        "GraniteMoeHybrid",
        "granite",
        "experts",
        "router",
        "states",
        "tied",
        head_dim=None,
        tie_word_embeddings=True,
        num_local_experts=4,
        num_experts_per_tok=2,
        logits_scaling=4.0,
        shared_intermediate_size=24,
        layer_types=["linear_attention", "full_attention"],
        **_MAMBA2,
    ),
    "smollm3": _family(
        "SmolLM3",
        "SmolLM3",
        "qwen3",
        "tied",
        head_dim=None,
        tie_word_embeddings=True,
        num_hidden_layers=4,
        no_rope_layer_interval=4,
        bos_token_id=0,
    ),
    "cohere2": _family(
        "Cohere 2",
        "Cohere2",
        "cohere",
        "tied",
        logit_scale=0.25,
        sliding_window=16,
        head_dim=None,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "falcon-h1": _family(
        "Falcon-H1",
        "FalconH1",
        "chatml",
        "states",
        head_dim=None,
        mamba_d_ssm=64,
        lm_head_multiplier=0.5,
        **_MAMBA2,
    ),
    "jamba": _family(
        "Jamba",
        "Jamba",
        "jamba",
        "experts",
        "router",
        "states",
        head_dim=None,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "bamba": _family("Bamba", "Bamba", "base", "states", head_dim=None, attn_layer_indices=[1], **_MAMBA2),
    "nemotron-h": _family(
        "Nemotron-H",
        "NemotronH",
        "nemotron",
        "states",
        num_hidden_layers=None,
        layer_types=["linear_attention", "mlp", "full_attention", "mlp"],
        ssm_state_size=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=1,
        chunk_size=16,
    ),
    "phimoe": _PHIMOE,
    "jetmoe": _JETMOE,
    "mamba2": _MAMBA_2,
    "zamba2": _ZAMBA2,
    "gpt-neox": _family(
        "GPT-NeoX", "GPTNeoX", "base", num_key_value_heads=None, head_dim=None, rotary_pct=0.5
    ),
}


def names() -> list[str]:
    """The families that the installed transformers has."""
    return [name for name, family in FAMILIES.items() if family.is_here]


def build(name: str, seed: int = SEED, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Build a family's tiny model (in evaluation mode) and its tokenizer."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    model = getattr(transformers, family.model_class)(family.config(_sizes(family.style))).to(dtype)
    with torch.no_grad():
        for where, weight in model.named_parameters():
            if weight.dim() == 2 and "router" not in where and "gate.weight" not in where:
                weight.mul_(12.0 if "embed" in where or "lm_head" in where else 8.0)
    ids = ids_of(family.style)
    model.generation_config.eos_token_id = ids.get("stops", ids["eos_token_id"])
    return model.eval(), tokenizer(family.style)


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {name: partial(build, name) for name in FAMILIES}
