"""Writes a full model as one GGUF file for llama.cpp, Ollama and LM Studio, with a Modelfile.

Tensors, hyper-parameters and tokenizer are written by the package `gguf`; the file is then opened
by transformers and compared with the model. Only what was verified so is written: Llama, Qwen2 and
Qwen3 with byte-level BPE. For all else there is llama.cpp's own script.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unisd.data.rendering import OPTIONS, closing_token, has_template
from unisd.errors import UserError, one_line
from unisd.models.gguf import alone
from unisd.models.tokens import eos_ids, known_tokens
from unisd.run.comparison import Difference, logits_of, prompts_for
from unisd.run.ollama import modelfile

TYPES = ("f16", "q8_0", "q4_k_m")
QUANTIZER = "llama-quantize"
"""llama.cpp's program, for the types that the package `gguf` cannot write."""
ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""Model types of transformers, and what `gguf` calls them."""
PRE_TOKENIZERS = {
    "smollm": [("Digits", True), ("ByteLevel", True)],
    "gpt-2": [("ByteLevel", True)],
    "qwen2": [
        (
            "Split",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        ("ByteLevel", False),
    ],
    "llama-bpe": [
        (
            "Split",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        ("ByteLevel", False),
    ],
}
"""llama.cpp's name of each way to cut a text into words, and how `tokenizer.json` says it."""
REMEDY = "convert the full model with llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file that was written, read back and found right."""

    path: Path
    type: str
    difference: Difference
    template: bool  # whether the Modelfile has one of its own
    then: str = ""  # the command that quantises it further, where that is left to the user

    def __str__(self) -> str:
        template = "" if self.template else (
            "; without a TEMPLATE, because the chat template is more than marks around turns: Ollama"
            " guesses one"
        )  # fmt: skip
        then = (
            f"\n  {QUANTIZER} of llama.cpp is not installed; q4_k_m takes: {self.then}" if self.then else ""
        )
        return (
            f"written to {self.path}: {self.type}, and a Modelfile for `ollama create NAME -f Modelfile`"
            f"{template}\n  read back and compared with the full model: {self.difference}{then}"
        )


def check_exportable(config: Any, tokenizer: Any, name: str) -> None:
    """Find out before anything is merged whether a model can be written as GGUF.

    Raises:
        UserError: no package `gguf`, or an architecture or tokenizer that is not written here.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError('--gguf needs the package gguf: pip install "unisd[gguf]".')
    reason = _unwritable(config) or _unwritable_tokenizer(tokenizer)
    if reason is None and known_tokens(tokenizer) > config.vocab_size:
        reason = f"its tokenizer knows {known_tokens(tokenizer)} tokens, its embedding {config.vocab_size}"
    if reason is not None:
        raise UserError(f"--gguf cannot write {name}, as {reason}: merge without --gguf, and {REMEDY}.")


def _unwritable(config: Any) -> str | None:
    if config.model_type not in ARCHITECTURES:
        return f"{config.model_type} is none of {', '.join(ARCHITECTURES)}"
    rope = config.rope_parameters["rope_type"]
    if rope not in (("default", "linear", "llama3") if config.model_type == "llama" else ("default",)):
        return f"its positions are scaled by {rope!r}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return "some layers attend only to a window"
    return None


def _unwritable_tokenizer(tokenizer: Any) -> str | None:
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return "its tokenizer has no tokenizer.json"
    if not _core(tokenizer)["model"].get("merges") or _pre_tokenizer(tokenizer) is None:
        return "its tokenizer is not a known kind of byte-level BPE"
    return None


def export_gguf(folder: Path, into: Path, asked: str, shown: Path) -> GgufFile:
    """Write the full model of a folder into another one, and compare what is read back.

    Args:
        asked: one of `TYPES`; q4_k_m is made of f16 by llama.cpp, where that is installed.
        shown: the name that `into` has in the end.

    Raises:
        UserError: what is read back is not what was written.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    into.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = prompts_for(model, tokenizer)
    exact = logits_of(model, prompts)
    kind = "q8_0" if asked == "q8_0" else "f16"
    file = into / f"model-{kind}.gguf"
    _write(model, tokenizer, kind, file, shown.resolve().name)
    rounded = logits_of(model, prompts)
    config, ends = model.config, eos_ids(model, tokenizer)
    del model  # there need not be two in memory
    read = _read_back(file, config, tokenizer, prompts)
    if not (difference := Difference.of(read, rounded)).is_rounding:
        raise UserError(
            f"the GGUF file cannot be read back: the {difference}. Nothing was written: merge without --gguf,"
            f" and {REMEDY}."
        )
    then = ""
    if asked == "q4_k_m":
        wanted = into / f"model-{asked}.gguf"
        if (program := shutil.which(QUANTIZER)) is not None:
            file, kind = _quantize(program, file, wanted), asked
            read = _read_back(file, config, tokenizer, prompts)
        else:
            then = f"{QUANTIZER} {shown / file.name} {shown / wanted.name} Q4_K_M"
    text, template = modelfile(tokenizer, file.name, ends, begins_with_bos(tokenizer))
    (into / "Modelfile").write_text(text, encoding="utf-8")
    return GgufFile(shown / file.name, kind, Difference.of(read, exact), template, then)


def _quantize(program: str, file: Path, wanted: Path) -> Path:
    done = subprocess.run([program, str(file), str(wanted), "Q4_K_M"], capture_output=True, text=True)
    if done.returncode or not wanted.is_file():
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{QUANTIZER} failed ({said}). Nothing was written: use --gguf f16 or q8_0.")
    file.unlink()
    return wanted


def _read_back(file: Path, config: Any, tokenizer: Any, prompts: list[list[int]]) -> Tensor:
    """The logits of the file as transformers opens it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": file.name}
    try:
        with alone(file) as place:
            read = AutoConfig.from_pretrained(place, **options)
            # Of what the file says transformers does not read these.
            read.head_dim, read.rope_parameters = _head_dim(config), config.rope_parameters
            kind = AutoModelForCausalLM
            model = kind.from_pretrained(place, config=read, dtype=torch.float32, **options).eval()
            found = AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # transformers' reader stumbles anywhere
        raise UserError(
            f"transformers cannot read the GGUF file back ({one_line(error)}). Nothing was written: merge"
            f" without --gguf, and {REMEDY}."
        ) from error
    if any(found.convert_ids_to_tokens(i) != token for token, i in tokenizer.get_vocab().items()):
        raise UserError(
            f"the GGUF file has other tokens than the model. Nothing was written: merge without --gguf, and"
            f" {REMEDY}."
        )
    return logits_of(model, prompts)


def _write(model: Any, tokenizer: Any, kind: str, file: Path, name: str) -> None:
    """Write the file, and give the model's weights the values that they have in it."""
    import gguf

    config = model.config
    arch = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name(name)
    _write_sizes(writer, config)
    _write_tokenizer(writer, tokenizer, config.vocab_size)
    file_type = gguf.LlamaFileType.MOSTLY_Q8_0 if kind == "q8_0" else gguf.LlamaFileType.MOSTLY_F16
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if (factors := _frequency_factors(model)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for own_name, parameter in model.named_parameters():
        known = names.get_name(own_name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise UserError(
                f"--gguf has no name for {own_name}: merge without --gguf, and {REMEDY}. Nothing was written."
            )
        _write_weight(writer, known, parameter, kind, _heads(config, own_name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_weight(writer: Any, name: str, parameter: Tensor, kind: str, heads: int | None) -> None:
    """Add one tensor, and leave in the parameter what its precision has kept of it."""
    from gguf import GGMLQuantizationType, quants

    values = parameter.detach().float().numpy()
    if parameter.dim() == 1:  # norms and biases are small, and kept exactly
        writer.add_tensor(name, _interleaved(values, heads))
        return
    # q8_0 takes blocks of 32 values
    fits = kind == "q8_0" and values.shape[-1] % 32 == 0
    stored = GGMLQuantizationType.Q8_0 if fits else GGMLQuantizationType.F16
    if stored == GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
        raise UserError(
            f"{name} has values beyond those of float16: use --gguf q8_0, or {REMEDY}. Nothing was written."
        )
    encoded = quants.quantize(values, stored)  # by row: their order does not matter
    parameter.data = torch.from_numpy(quants.dequantize(encoded, stored).astype(np.float32))
    writer.add_tensor(name, _interleaved(encoded, heads), raw_dtype=stored)


def _interleaved(rows: np.ndarray, heads: int | None) -> np.ndarray:
    """Rows of each head as llama.cpp has them: the two halves of a rotated pair are neighbours."""
    if heads is None:
        return np.ascontiguousarray(rows)
    by_half = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(by_half.swapaxes(1, 2)).reshape(rows.shape)


def _heads(config: Any, name: str) -> int | None:
    """How many heads a projection has whose rows llama.cpp wants interleaved."""
    if config.model_type != "llama":
        return None
    count = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return next((heads for part, heads in count.items() if f".{part}." in name), None)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _write_sizes(writer: Any, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _frequency_factors(model: Any) -> np.ndarray | None:
    """By what a model divides the frequencies of its positions (llama3, linear); None: nothing."""
    config, rotary = model.config, model.model.rotary_emb
    if config.rope_parameters["rope_type"] == "default":
        return None
    dim = _head_dim(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, dim, 2).float() / dim)
    factors: np.ndarray = (plain / rotary.inv_freq.float()).numpy()
    return factors


def _core(tokenizer: Any) -> dict[str, Any]:
    """What `tokenizer.json` holds."""
    core: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return core


def _pre_tokenizer(tokenizer: Any) -> str | None:
    """llama.cpp's name of the way in which this tokenizer cuts words; None: it is none of them."""
    pre = _core(tokenizer)["pre_tokenizer"] or {"type": None}
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    told = []
    for step in steps:
        pattern = step.get("pattern", {}).get("Regex")
        told.append((step["type"], step.get("use_regex", step.get("individual_digits", pattern))))
        if step.get("add_prefix_space") or step.get("invert"):
            return None
    return next((name for name, known in PRE_TOKENIZERS.items() if known == told), None)


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether every text gets a BOS token before it."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _write_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    from gguf import TokenType

    added = tokenizer.added_tokens_decoder
    texts = {i: token for token, i in tokenizer.get_vocab().items()}
    types = [TokenType.UNUSED if i not in texts else TokenType.NORMAL for i in range(rows)]
    for i, token in added.items():
        types[i] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    merges = _core(tokenizer)["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    if (end := closing_token(tokenizer)) is not None:
        writer.add_eot_token_id(end)
    writer.add_add_bos_token(begins_with_bos(tokenizer))
    if has_template(tokenizer):
        # What the run set of the template (thinking off, say) goes into its head.
        kept = tokenizer.init_kwargs.get(OPTIONS) or {}
        head = "".join(f"{{%- set {name} = {value!r} -%}}" for name, value in kept.items())
        writer.add_chat_template(head + tokenizer.get_chat_template())
