"""Tokenizers of bytes in the manner of each family: its markers, its chat template, its ends.

Every text is one token a byte, beside the markers. What differs between families is what prompts
and checkpoints depend on: a system role or none, reasoning that is dropped from past turns, several
tokens that end an answer, no pad token, an end that the template never writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Style:
    """How a family writes a conversation."""

    markers: tuple[str, ...]
    template: str | None  # None: a base model
    eos: str
    bos: str | None = None
    pad: str | None = None
    stops: tuple[str, ...] = ()  # further ends, which the generation config lists
    system: bool = True  # whether the template has such a role


def _turns(user: str, assistant: str, system: str | None, generation: str, start: str = "") -> str:
    """A template from what each role's message becomes; `CONTENT` is the text."""

    def said(form: str) -> str:
        before, after = form.split("CONTENT")
        return f"{before}{{{{ m['content'] }}}}{after}"

    other = "{{ raise_exception('System role not supported') }}" if system is None else said(system)
    return (
        f"{start}{{% for m in messages %}}{{% if m['role'] == 'user' %}}{said(user)}"
        f"{{% elif m['role'] == 'assistant' %}}{said(assistant)}{{% else %}}{other}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{generation}{{% endif %}}"
    )


_CHATML = (
    "<|im_start|>user\nCONTENT<|im_end|>\n", "<|im_start|>assistant\nCONTENT<|im_end|>\n",
    "<|im_start|>system\nCONTENT<|im_end|>\n",
)  # fmt: skip
_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_THINK = ("<think>", "</think>")
_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
)
# Past turns lose their reasoning; `enable_thinking=False` opens an answer without any.
_STRIPS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)

STYLES: dict[str, Style] = {
    "qwen2.5": Style(
        _IM,
        _turns(*_CHATML, "<|im_start|>assistant\n", _DEFAULT_SYSTEM),
        "<|im_end|>",
        pad="<|endoftext|>",
        stops=("<|endoftext|>",),
    ),
    "qwen3": Style(
        (*_IM, *_THINK), _STRIPS_THOUGHTS, "<|im_end|>", pad="<|endoftext|>", stops=("<|endoftext|>",)
    ),
    # As Qwen3, but the template opens the thought itself.
    "qwen3.5": Style(
        (*_IM, *_THINK, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        _STRIPS_THOUGHTS.replace("{% endif %}{% endif %}", "{% else %}<think>\n{% endif %}{% endif %}"),
        "<|im_end|>",
        pad="<|endoftext|>",
    ),
    "chatml": Style(_IM, _turns(*_CHATML, "<|im_start|>assistant\n"), "<|im_end|>", pad="<|endoftext|>"),
    "lfm2": Style(
        ("<|pad|>", "<|startoftext|>", *_IM),
        _turns(*_CHATML, "<|im_start|>assistant\n", "{{ bos_token }}"),
        "<|im_end|>",
        bos="<|startoftext|>",
        pad="<|pad|>",
    ),
    "llama3": Style(
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        _turns(
            *(
                f"<|start_header_id|>{role}<|end_header_id|>\n\nCONTENT<|eot_id|>"
                for role in ("user", "assistant", "system")
            ),
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "{{ bos_token }}",
        ),
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        stops=("<|end_of_text|>",),
    ),
    "llama4": Style(
        ("<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|pad|>"),
        _turns(
            *(
                f"<|header_start|>{role}<|header_end|>\n\nCONTENT<|eot|>"
                for role in ("user", "assistant", "system")
            ),
            "<|header_start|>assistant<|header_end|>\n\n",
            "{{ bos_token }}",
        ),
        "<|eot|>",
        bos="<|begin_of_text|>",
        pad="<|pad|>",
        stops=("<|end_of_text|>",),
    ),
    "mistral": Style(
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"),
        _turns(
            "[INST]CONTENT[/INST]", "CONTENT</s>", "[SYSTEM_PROMPT]CONTENT[/SYSTEM_PROMPT]",
            "", "{{ bos_token }}",
        ),
        "</s>",
        bos="<s>",
    ),
    "mixtral": Style(  # markers are words here, and there is no system role
        ("<unk>", "<s>", "</s>"),
        _turns("[INST] CONTENT [/INST]", " CONTENT</s>", None, "", "{{ bos_token }}"),
        "</s>",
        bos="<s>",
        system=False,
    ),
    "gemma": Style(
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>",
         "<image_soft_token>"),
        _turns(
            "<start_of_turn>user\nCONTENT<end_of_turn>\n", "<start_of_turn>model\nCONTENT<end_of_turn>\n",
            None, "<start_of_turn>model\n", "{{ bos_token }}",
        ),
        "<eos>",
        bos="<bos>",
        pad="<pad>",
        stops=("<end_of_turn>",),
        system=False,
    ),
    "gemma4": Style(
        ("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|image|>"),
        _turns(
            "<|turn>user\nCONTENT<turn|>\n", "<|turn>model\nCONTENT<turn|>\n",
            "<|turn>system\nCONTENT<turn|>\n", "<|turn>model\n", "{{ bos_token }}",
        ),
        "<eos>",
        bos="<bos>",
        pad="<pad>",
        stops=("<turn|>",),
    ),
    "harmony": Style(  # the turn that a template writes ends otherwise than the one that a model writes
        ("<|startoftext|>", "<|endoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>",
         "<|return|>"),
        _turns(
            "<|start|>user<|message|>CONTENT<|end|>",
            "<|start|>assistant<|channel|>final<|message|>CONTENT"
            "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}",
            "<|start|>developer<|message|>CONTENT<|end|>",
            "<|start|>assistant",
            "<|start|>system<|message|>Reasoning: {{ reasoning_effort | default('medium') }}<|end|>",
        ),
        "<|return|>",
        bos="<|startoftext|>",
        pad="<|endoftext|>",
    ),
    "phi4": Style(
        ("<|dummy_87|>", "<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        _turns(
            *(f"<|im_start|>{role}<|im_sep|>CONTENT<|im_end|>" for role in ("user", "assistant", "system")),
            "<|im_start|>assistant<|im_sep|>",
        ),
        "<|im_end|>",
        bos="<|endoftext|>",
        pad="<|dummy_87|>",
    ),
    "phi3": Style(  # a turn ends with a token that is no end of the tokenizer
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        _turns(
            *(f"<|{role}|>CONTENT<|end|>" for role in ("user", "assistant", "system")), "<|assistant|>"
        ),
        "<|endoftext|>",
        pad="<|endoftext|>",
        stops=("<|end|>",),
    ),
    "olmo2": Style(
        ("<|endoftext|>", "<|pad|>"),
        _turns(
            "<|user|>\nCONTENT\n", "<|assistant|>\nCONTENT<|endoftext|>\n", "<|system|>\nCONTENT\n",
            "<|assistant|>\n", "{{ bos_token }}",
        ),
        "<|endoftext|>",
        bos="<|endoftext|>",
        pad="<|pad|>",
    ),
    "deepseek": Style(
        ("<|begin_of_sentence|>", "<|end_of_sentence|>", "<|pad|>", "<|User|>", "<|Assistant|>"),
        _turns(
            "<|User|>CONTENT", "<|Assistant|>CONTENT<|end_of_sentence|>", "CONTENT", "<|Assistant|>",
            "{{ bos_token }}",
        ),
        "<|end_of_sentence|>",
        bos="<|begin_of_sentence|>",
        pad="<|pad|>",
    ),
    "glm": Style(  # an answer ends where the next role begins
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>",
         *_THINK),
        _turns(
            "<|user|>\nCONTENT", "<|assistant|>\n<think></think>\nCONTENT", "<|system|>\nCONTENT",
            "<|assistant|>\n", "[gMASK]<sop>",
        ),
        "<|endoftext|>",
        pad="<|endoftext|>",
        stops=("<|user|>", "<|observation|>"),
    ),
    "granite": Style(
        ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|pad|>"),
        _turns(
            *(
                f"<|start_of_role|>{role}<|end_of_role|>CONTENT<|end_of_text|>\n"
                for role in ("user", "assistant", "system")
            ),
            "<|start_of_role|>assistant<|end_of_role|>",
        ),
        "<|end_of_text|>",
        bos="<|end_of_text|>",
        pad="<|pad|>",
    ),
    "cohere": Style(
        ("<PAD>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
         "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
        _turns(
            *(
                f"<|START_OF_TURN_TOKEN|><|{role}_TOKEN|>CONTENT<|END_OF_TURN_TOKEN|>"
                for role in ("USER", "CHATBOT", "SYSTEM")
            ),
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
            "{{ bos_token }}",
        ),
        "<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
        pad="<PAD>",
    ),
    "jamba": Style(
        ("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|bom|>", "<|eom|>"),
        _turns(
            *(f"<|bom|><|{role}|> CONTENT<|eom|>" for role in ("user", "assistant", "system")),
            "<|bom|><|assistant|> ",
            "{{ bos_token }}",
        ),
        "<|endoftext|>",
        bos="<|startoftext|>",
        pad="<|pad|>",
        stops=("<|eom|>",),
    ),
    "nemotron": Style(
        ("<unk>", "<s>", "</s>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"),
        _turns(
            "<SPECIAL_11>User\nCONTENT\n", "<SPECIAL_11>Assistant\nCONTENT\n<SPECIAL_12>\n",
            "<SPECIAL_10>System\nCONTENT\n", "<SPECIAL_11>Assistant\n", "{{ bos_token }}",
        ),
        "<SPECIAL_12>",
        bos="<s>",
        pad="<SPECIAL_12>",
        stops=("</s>",),
    ),
    "base": Style(("<|endoftext|>", "<|padding|>"), None, "<|endoftext|>", bos="<|endoftext|>"),
}  # fmt: skip


@lru_cache
def tokenizer(style: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a style: its markers first, then the 256 bytes."""
    form = STYLES[style]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*form.markers, *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special: dict[str, Any] = {"bos_token": form.bos, "pad_token": form.pad}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=form.eos,
        additional_special_tokens=list(form.markers),
        chat_template=form.template,
        **{name: token for name, token in special.items() if token is not None},
    )


def ids_of(style: str) -> dict[str, Any]:
    """The token ids that a config names."""
    form, found = STYLES[style], tokenizer(style)
    ids: dict[str, Any] = {
        "eos_token_id": found.eos_token_id, "bos_token_id": found.bos_token_id,
        "pad_token_id": found.pad_token_id,
    }  # fmt: skip
    if form.stops:
        ids["stops"] = [found.eos_token_id, *found.convert_tokens_to_ids(list(form.stops))]
    return ids
