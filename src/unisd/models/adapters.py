"""Adapters of peft as folders: what they name as their base, and what fits onto it."""

from __future__ import annotations

import functools
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unisd.errors import UserError

logger = logging.getLogger(__name__)

# as peft and transformers name them; this module is imported before they are
ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
)
BASE = "base_model_name_or_path"


def without_adapter(model: Any) -> Any:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_base_is_kept(adapters: Mapping[str, Any]) -> None:
    """Raise `UserError` if a model without its adapters is not the one that they were made for.

    Drift, a comparison with it, a chat beside it and a part of its change take it for that. Some
    initialisations take the adapter's beginning out of the base, and biases are trained in place.

    Args:
        adapters: configurations of peft by name, as a model's `peft_config` holds them.
    """
    for config in adapters.values():
        kind = getattr(config, "init_lora_weights", True)
        if isinstance(kind, str) and kind.lower() not in ("gaussian", "eva", "orthogonal", "mica"):
            raise UserError(
                f"init_lora_weights={kind} changes the base's weights, so that the model without its adapter"
                " is not the initial one: give the base itself, or use True, gaussian or eva."
            )
        if (bias := getattr(config, "bias", "none")) != "none":
            raise UserError(
                f"the adapter trains the base's biases (bias={bias}), so that the model without it is not the"
                " initial one: give the base itself, or use bias=none."
            )


def is_adapter(name: str | Path) -> bool:
    """Whether a folder holds an adapter, and no model.

    Raises:
        UserError: it holds both.
    """
    folder = Path(name).expanduser()
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    if not (folder / MODEL_CONFIG).is_file():
        return True  # else it may be left over, without weights
    weights = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if weights:
        raise UserError(
            f"{name} holds an adapter ({ADAPTER_CONFIG}) and a model ({weights[0].name}): move one of them"
            " into a separate folder, and give that folder."
        )
    return True


def base_of(name: str, folder: Path) -> str:
    """The base that an adapter names; a relative path also from the adapter's own folder.

    Raises:
        UserError: it names none.
    """
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get(BASE)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / ADAPTER_CONFIG} cannot be read: {error}.") from None
    if not base:
        raise UserError(f"the adapter {name} does not name its base model; set {BASE} in {ADAPTER_CONFIG}")
    beside = folder / base
    return str(beside) if not Path(base).exists() and beside.is_dir() else str(base)


def from_everywhere(name: str) -> str:
    """A model's name as it is found from every folder: of a file or folder its whole path."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def name_base(folder: Path, base: Any) -> None:
    """Write into a saved adapter the name by which its base is found from everywhere."""
    file = folder / ADAPTER_CONFIG
    content = json.loads(file.read_text(encoding="utf-8"))
    opened = getattr(base, "opened_as", None) or getattr(base, "name_or_path", None)
    if opened and content[BASE] != (name := from_everywhere(opened)):
        content[BASE] = name
        file.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def fit_vocabulary(base: Any, folder: Path) -> None:
    """Give the base as many embeddings as those that were saved with the adapter, if any were.

    Tokens that were added before training are among them.
    """
    from safetensors import safe_open

    embedding = base.get_input_embeddings()
    place = next(name for name, module in base.named_modules() if module is embedding)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        return
    with safe_open(str(folder / ADAPTER_WEIGHTS), framework="pt") as opened:
        saved = {f"base_model.model.{place}.{end}" for end in ("weight", "base_layer.weight")}
        for key in saved & set(opened.keys()):
            rows = opened.get_slice(key).get_shape()[0]
            if rows != embedding.weight.shape[0]:
                base.resize_token_embeddings(rows, mean_resizing=False)


def keep_new_tokens(model: Any) -> None:
    """Save the embeddings with an adapter where the base has other ones than it was opened with.

    peft finds that out for itself only where it reaches the base's configuration, of text alone.
    """
    from transformers import AutoConfig

    base = model.get_base_model()
    try:
        config = AutoConfig.from_pretrained(base.name_or_path, local_files_only=True)
    except (OSError, ValueError):  # a model that was made in memory
        return
    if config.get_text_config().vocab_size != base.config.get_text_config().vocab_size:
        model.saves_embeddings = True
        model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=True)


def open_adapter(base: Any, name: str, folder: Path) -> Any:
    """The base with the adapter of a folder, all of it.

    Raises:
        UserError: the folder lacks a weight, without which the adapter would be another.
    """
    from peft import PeftModel

    if (folder / MODEL_CONFIG).is_file():
        logger.warning("%s is opened as an adapter: its %s has no weights beside it.", name, MODEL_CONFIG)
    fit_vocabulary(base, folder)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, str(folder))
    for warning in told:
        if "missing adapter keys" in (text := str(warning.message)):
            raise UserError(
                f"the adapter {name} lacks weights that its {ADAPTER_CONFIG} requires: give a complete one:"
                f" {text.rpartition('checkpoint: ')[2][:200]}"
            )
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return model


def make_trainable(model: Any) -> None:
    """Let the weights of an adapter that was opened be trained; all others stay as they are."""
    from peft import prepare_model_for_kbit_training

    base = model.get_base_model()
    if getattr(base, "is_loaded_in_8bit", False) or getattr(base, "is_loaded_in_4bit", False):
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    for config in model.peft_config.values():
        config.inference_mode = False
    model.set_adapter(model.active_adapter)


def check_adapter(model: Any, peft_config: Any) -> None:
    """Refuse an adapter that could not be trained, or not be opened again.

    Raises:
        UserError: one by `add_adapter`, of another name, several, or one beside a `peft_config`; a
            `peft_config` that is none, or of another task.
    """
    if peft_config is not None:
        if not hasattr(peft_config, "peft_type"):
            kind = type(peft_config).__name__
            raise UserError(f"peft_config is a {kind}: give peft's LoraConfig, or another of its configs.")
        if peft_config.task_type not in (None, "CAUSAL_LM"):
            raise UserError(
                f"peft_config has task_type={str(peft_config.task_type)!r}, so that the adapter could not be"
                " opened as a language model again: set task_type='CAUSAL_LM'."
            )
    held = getattr(model, "peft_config", None)
    if not held:
        return
    if not hasattr(model, "get_base_model"):
        raise UserError(
            "this model object has an adapter already, of add_adapter or of an earlier trainer: load the"
            " model again, or give what peft.get_peft_model made (trainer.model) without peft_config."
        )
    if peft_config is not None:
        raise UserError(
            "peft_config is given with a model that has an adapter already: leave peft_config out to"
            " continue with that adapter, or merge it with `unisd merge` and give that folder."
        )
    if list(held) != ["default"]:
        raise UserError(
            f"the model has the adapter{'s' if len(held) > 1 else ''} {', '.join(map(repr, held))}: one is"
            " trained and saved, named 'default' (adapter_name of peft.get_peft_model)."
        )
