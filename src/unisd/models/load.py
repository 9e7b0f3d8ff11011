"""Models by name: a path or hub id as in transformers, a `.gguf` file, `pocket`, or `smollm2-135m`.

`load_model_and_tokenizer` also opens a folder with a peft adapter (its base is loaded by the name
the adapter gives). Nothing runs remote code or downloads anything unless asked: a hub id is a
request for that model.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from unisd.console import warnings_as_notes
from unisd.errors import UserError, by_caller, first_line
from unisd.models import adapters
from unisd.models import gguf as gguf_cache
from unisd.models.adapters import without_adapter
from unisd.models.tokens import mark_defined
from unisd.models.weights import open_model

logger = logging.getLogger(__name__)

POCKET = "pocket"
SMOLLM2 = "smollm2-135m"
AUTO_BF16_FROM = 50_000_000
"""Parameters; below, bf16 saves little and costs accuracy."""

_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@dataclass(frozen=True)
class ModelInfo:
    """What was loaded."""

    name: str  # as asked for
    path: str  # local folder or hub id given to transformers
    parameters: int  # without adapter
    dtype: torch.dtype
    adapter: str | None = None  # folder of a peft adapter, if one was loaded


def resolve(name_or_path: str) -> str:
    """Find the local folder of a model; a hub id is returned unchanged.

    GGUF files are converted into the local cache.

    Raises `UserError`: not a model folder, no such path, GGUF without the package `gguf`, SmolLM2
    not installed.
    """
    name = str(name_or_path)
    if name == POCKET:
        base = Path(str(resources.files("unisd.pocket") / "base"))
        if not (base / "config.json").is_file():
            raise UserError(f"the pocket model is missing from this installation ({base}); reinstall unisd")
        return str(base)
    if name == SMOLLM2:
        return str(gguf_cache.converted(gguf_cache.smollm2_file()))
    path = Path(name).expanduser()
    if name.lower().endswith(".gguf"):
        return str(gguf_cache.converted(path))
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise UserError(
                f"{name} is not a model: no config.json in that folder; give a folder that save_pretrained"
                " wrote"
            )
        return str(path)
    if path.exists():
        raise UserError(f"{name} is not a model: it is a file; give a model folder, a .gguf file or a hub id")
    if not _HUB_ID.fullmatch(name):
        raise UserError(
            f"no model at {name}: there is no such folder; give an existing folder, a hub id, {POCKET} or"
            f" {SMOLLM2}"
        )
    return name


def can_checkpoint(model: Any) -> bool:
    """Say whether the model's layers can be computed again in the backward pass."""
    return bool(getattr(without_adapter(model), "supports_gradient_checkpointing", True))


def ropes(config: Any) -> list[dict[str, Any]]:
    """How positions are told: one way for all layers, or one for each kind of them."""
    found = getattr(config, "rope_parameters", None) or {}
    return [rope for rope in (found, *found.values()) if isinstance(rope, dict)]


def context_length(model: Any) -> int | None:
    """Return how many tokens the model can read, or None where it does not say.

    Positions that are scaled by its configuration (YaRN) reach further than those it was built for.
    """
    config = model.config.get_text_config(decoder=True)
    own: int | None = getattr(config, "max_position_embeddings", None)
    for rope in ropes(config) if own is not None else ():
        if rope.get("rope_type") in ("yarn", "dynamic") and rope.get("factor"):
            trained = rope.get("original_max_position_embeddings") or own
            own = max(own or 0, int(rope["factor"] * trained))
    return own


def native_bf16() -> bool:
    """Say whether bf16 is computed by the hardware itself rather than by emulation.

    The hardware is the accelerator, or the CPU where there is none.
    """
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        module = getattr(torch, accelerator.type, None) if accelerator is not None else None
        supported = getattr(module, "is_bf16_supported", None)
        return bool(supported is not None and supported(including_emulation=False))
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return match is not None and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(match[1].split())


def _dtype(dtype: str | torch.dtype, parameters: int) -> torch.dtype:
    dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        return torch.bfloat16 if parameters > AUTO_BF16_FROM and native_bf16() else torch.float32
    if dtype not in _DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; use auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _load(what: str, name: str, path: str, build: Any) -> Any:
    """Run one transformers loader and turn what it says of a wrong name into one line."""
    try:
        with warnings_as_notes():
            return build()
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)[:200]
        # not of a wrong name: a package that is missing, say, or an architecture too new
        if Path(path).is_dir() or not isinstance(error, OSError):
            raise UserError(f"cannot load the {what} of {name}: {reason}") from error
        raise UserError(
            f"no model {name}: neither a local folder nor available from the Hugging Face hub"
            f" ({reason}); check the spelling and the network, or give a local folder, {POCKET} or"
            f" {SMOLLM2}"
        ) from error


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model, always with a pad token.

    It is one that exists already: embeddings are not resized.
    """
    from transformers import AutoTokenizer

    path = resolve(name_or_path)
    tokenizer = _load(
        "tokenizer",
        name_or_path,
        path,
        lambda: AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code),
    )
    if tokenizer.pad_token is None:
        special = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
        if special is None:
            raise UserError(
                f"the tokenizer of {name_or_path} has neither pad nor end token; set pad_token in its config"
            )
        tokenizer.pad_token = special
    tokenizer.padding_side = "left"
    return tokenizer


def load_model_and_tokenizer(
    name_or_path: str,
    *,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
    dequantize: bool = False,
) -> tuple[Any, Any, ModelInfo]:
    """Model (evaluation mode, on the CPU), tokenizer and facts about them.

    Args:
        dtype: `auto`: bf16 where the hardware computes it natively and the model has more than 50 M
            parameters, else float32; or the name of one.
        load_in_4bit: needs bitsandbytes.
        dequantize: give weights that are quantised, in the folder or by `load_in_4bit`, as floats.

    Raises:
        UserError: the name is not a model, or a package that it needs is not installed.
    """
    from transformers import AutoConfig

    name = str(name_or_path)
    path = resolve(name)
    quantized = {"load_in_4bit": load_in_4bit, "dequantize": dequantize}
    if adapters.is_adapter(path):
        return _load_adapter(name, Path(path), dtype=dtype, trust_remote_code=trust_remote_code, **quantized)
    config = _load(
        "configuration",
        name,
        path,
        lambda: AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code),
    )
    kind = _kind_of(config, name, trust_remote_code)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        skeleton = _load(
            "architecture", name, path,
            lambda: kind.from_config(config, trust_remote_code=trust_remote_code),
        )  # fmt: skip
    parameters = sum(p.numel() for p in skeleton.parameters())
    options: dict[str, Any] = {"dtype": _dtype(dtype, parameters), "trust_remote_code": trust_remote_code}
    if load_in_4bit:
        options["quantization_config"] = _four_bits(options["dtype"])
    model = _load("weights", name, path, lambda: open_model(kind, name, path, **options)).eval()
    model.opened_as = adapters.from_everywhere(name)
    model = _settle_quantized(model, options["dtype"], **quantized)
    mark_defined(model, tokenizer)
    return model, tokenizer, ModelInfo(name, path, parameters, options["dtype"])


def _settle_quantized(model: Any, dtype: torch.dtype, load_in_4bit: bool, dequantize: bool) -> Any:
    if dequantize and getattr(model, "hf_quantizer", None) is not None:
        model = model.dequantize(dtype)
        # What made 4-bit weights of the files has no way back; there is nothing to undo any more.
        made_by = getattr(model, "_weight_conversions", None) or ()
        model._weight_conversions = [conversion for conversion in made_by if _has_way_back(conversion)]
        return model
    for module in model.modules() if load_in_4bit else ():
        # bitsandbytes: products in that layout of the weights have no gradient
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _has_way_back(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def _load_adapter(name: str, folder: Path, **options: Any) -> tuple[Any, Any, ModelInfo]:
    """Load a peft adapter on the base that it names.

    The tokenizer saved beside the adapter wins over the base's.
    """
    base_name = adapters.base_of(name, folder)
    try:
        model, tokenizer, info = load_model_and_tokenizer(base_name, **options)
    except UserError as error:
        raise UserError(f"the adapter {name} needs its base model: {error}") from error
    if info.adapter is not None:
        raise UserError(
            f"the adapter {name} names another adapter as its base, {base_name}: merge that one first, with"
            " `unisd merge`, and set base_model_name_or_path in adapter_config.json."
        )
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(str(folder), trust_remote_code=options["trust_remote_code"])
    adapted = _load("adapter", name, str(folder), lambda: adapters.open_adapter(model, name, folder))
    mark_defined(adapted, tokenizer)
    return adapted.eval(), tokenizer, replace(info, name=name, adapter=str(folder))


def _kind_of(config: Any, name: str, trust_remote_code: bool) -> Any:
    """The class of transformers that opens a model, with all its parts.

    One for images as a whole, although text alone passes through it.

    Raises:
        UserError: it is no causal language model.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{name} is an encoder-decoder ({config.model_type}): give a causal language model, which"
            " has only a decoder."
        )
    if trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    trust = by_caller("--trust_remote_code", "trust_remote_code=True")
    raise UserError(
        f"{name} is a {config.model_type}, which is not a causal language model that transformers knows: give"
        f" another model, or {trust} where its code comes with it."
    )


def _four_bits(compute: torch.dtype) -> Any:
    import importlib.util

    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError('load_in_4bit needs bitsandbytes: pip install "unisd[quantization]"')
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


NOT_IGNORED = r"The following \w+_pattern keys did not match .*: \['\.\*\\\\\.gate_up_proj'\]"
"""peft doubles the rank of experts' fused maps by a pattern of its own, and then looks for it among
modules alone: experts are parameters, and have that rank.
"""


def with_adapter(model: Any, peft_config: Any, seed: int, gradient_checkpointing: bool) -> Any:
    """Add a new adapter to the model; its factors are drawn with `seed`.

    A quantised model is prepared for training first.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import set_seed

    peft_config = _where_it_counts(model, peft_config)

    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
    peft_config = _without_refused_dropout(model, peft_config)
    set_seed(seed)  # the Trainer would seed only after the adapter's factors are drawn
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", NOT_IGNORED, RuntimeWarning)
            adapted = get_peft_model(model, peft_config)
    except ValueError as error:
        names = sorted(
            {
                name.rpartition(".")[2]
                for name, module in model.named_modules()
                if hasattr(module, "in_features")
            }
        )
        raise UserError(
            f"lora_target_modules: {str(error).splitlines()[0]} Its linear modules: {', '.join(names)}."
        ) from None
    _say_reach(adapted)
    return adapted


def _without_refused_dropout(model: Any, peft_config: Any) -> Any:
    """Set lora_dropout to 0 where the adapter would change experts, which peft refuses it for.

    Found out on a model without storage: a refusal leaves half an adapter behind.
    """
    from peft import get_peft_model

    dropout = getattr(peft_config, "lora_dropout", 0)
    if not dropout or not any(map(_is_experts, model.parameters())):
        return peft_config
    try:
        with torch.device("meta"):
            get_peft_model(type(model)(copy.deepcopy(model.config)), copy.deepcopy(peft_config))
    except ValueError as error:
        if "lora_dropout" not in str(error):
            return peft_config
        logger.warning("lora_dropout is 0 here instead of %g: adapters of experts cannot have any.", dropout)
        peft_config = copy.copy(peft_config)
        peft_config.lora_dropout = 0.0
    return peft_config


def _is_experts(weight: torch.Tensor) -> bool:
    """Whether it is the weights of several linear maps; a convolution has one line a channel."""
    return weight.dim() == 3 and weight.shape[1] > 1


def _say_reach(adapted: Any) -> None:
    """Say what share of a mixture of experts the adapter reaches: often the smaller one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    own = {
        name: p
        for name, p in adapted.named_parameters()
        if not any(part.startswith(("lora_", "modules_to_save")) for part in name.split("."))
    }
    if not any(map(_is_experts, own.values())):
        return
    reached: set[str] = set()
    for name, module in adapted.named_modules():
        if isinstance(module, BaseTunerLayer):
            single = getattr(module, "parameter_name", None)
            reached |= {
                full
                for full in own
                if full.startswith(f"{name}.") and single in (None, full.rpartition(".")[2])
            }
    share = sum(own[name].numel() for name in reached) / sum(p.numel() for p in own.values())
    experts = (
        "among them experts" if any(_is_experts(own[name]) for name in reached) else "experts are not adapted"
    )
    logger.warning("The adapter reaches %.0f %% of the weights: %s.", 100 * share, experts)


def _where_it_counts(model: Any, peft_config: Any) -> Any:
    """Leave targets out of the configuration whose adapter nothing would pass through.

    `all-linear` would adapt a vision tower too, and in layers of the Mamba kind the last map, whose
    weight their kernels read themselves. Routers that are linear maps with other outputs (Llama 4)
    peft could not wrap.
    """
    decoder = model.get_decoder()
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    head = next(
        (name for name, module in model.named_modules() if module is model.get_output_embeddings()), ""
    )
    others = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    others = [name for name in others if not name.startswith(f"{prefix}.") and name != head]
    left_out = [rf"(?!{re.escape(prefix)}\.).*"] if prefix and others else []
    if getattr(peft_config, "target_modules", None) == "all-linear":
        mixers = [name for name, module in model.named_modules() if _is_state_space(module)]
        places = "|".join(sorted({re.escape(name.rpartition(".")[2]) for name in mixers}))
        left_out += [rf".*\.({places})\.out_proj"] if mixers else []
        left_out += [rf".*\.{name}" for name in sorted(_routers(model))]
    if not left_out or getattr(peft_config, "exclude_modules", "") is not None:
        return peft_config
    within = copy.copy(peft_config)
    within.exclude_modules = "|".join(left_out)
    return within


def _routers(model: torch.nn.Module) -> set[str]:
    """Last names of routers that inherit from a linear map (Llama 4, PhiMoE)."""
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module).__name__.endswith("Router")
    }


def _is_state_space(module: torch.nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("A_log", "D", "out_proj"))
