"""Makes full models of an adapter and its base, or of two full models: base + L x the change.

What is written is read back by plain transformers and compared, in float32, with what it has to
compute: the adapter's logits. Folders appear whole and compared, or not at all.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unisd.errors import UserError
from unisd.files import check_writable, config_of_run, follow_umask
from unisd.models.adapters import base_of, check_base_is_kept, is_adapter, without_adapter
from unisd.models.generation import mend_generation_config
from unisd.models.load import load_model_and_tokenizer, load_tokenizer, resolve
from unisd.models.saving import copy_processor, copy_tokenizer
from unisd.run.comparison import Difference, logits_of, prompts_for
from unisd.run.gguf_export import GgufFile, check_exportable, export_gguf

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INSIDE_ADAPTERS = {"base_layer", "original_module", "token_adapter"}
"""Parts of the name that a weight of the base has beneath an adapter."""


@dataclass
class Merge:
    """What `unisd merge` is asked for; the names are those of its options.

    Raises:
        UserError: nothing that can be merged, or nowhere to write it.
    """

    folder: str
    output_dir: str | None = None
    scale: Sequence[float] | None = None
    base: str | None = None
    dtype: str = "auto"
    load_in_4bit: bool = False
    trust_remote_code: bool = False
    gguf: str | None = None
    outputs: dict[float, Path] = field(init=False)

    def __post_init__(self) -> None:
        self._check()
        folder, output = Path(self.folder), Path(self.output_dir) if self.output_dir else None
        if self.scale is None:
            kind = "merged" if self.merges else "gguf"
            self.outputs = {1.0: output or folder.resolve().with_name(f"{folder.resolve().name}-{kind}")}
        elif output is None:
            named = folder.resolve().name
            self.outputs = {one: folder.resolve().with_name(f"{named}-merged-{one:g}") for one in self.scale}
        else:
            several = len(self.scale) > 1
            self.outputs = {one: output / f"{one:g}" if several else output for one in self.scale}
        if len({*self.outputs.values()}) < len(self.scale or [1]):
            raise UserError(
                f"--scale {' '.join(f'{one:g}' for one in self.scale or ())}: one is given twice."
            )
        for output in self.outputs.values():
            if output.exists() and (not output.is_dir() or any(output.iterdir())):
                raise UserError(f"{output} exists already: choose another --output_dir.")
            check_writable(output)

    def _check(self) -> None:
        folder = Path(self.folder)
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give one that `unisd train --use_peft` wrote.")
        full = (folder / "config.json").is_file()
        if self.base is None and not is_adapter(folder) and not (full and self.gguf and not self.scale):
            hint = (
                " It is a full model already: nothing needs merging. (Part of what its training changed:"
                " --base NAME --scale L. As a GGUF file: --gguf f16.)"
            )
            raise UserError(f"{folder} holds no adapter (adapter_config.json).{hint if full else ''}")
        if self.base is not None and not full:
            raise UserError(
                f"--base is for a full model, and {folder} is not one: an adapter names its base."
            )
        if self.base is not None and self.scale is None:
            raise UserError(f"--base needs --scale L: at 1, {folder} is what you get.")
        if self.base is not None and self.load_in_4bit:
            raise UserError("--load_in_4bit is for adapters: unset it, or --base.")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise UserError(f"--dtype {self.dtype} is not a precision: use {', '.join(DTYPES)}.")

    @property
    def merges(self) -> bool:
        """Whether there is anything to merge; a full model alone is only written as GGUF."""
        return self.base is not None or is_adapter(self.folder)

    @property
    def stages(self) -> int:
        """How often `merge` tells that it has come further."""
        of_each = 2 * self.merges + bool(self.gguf)
        return int(self.merges) + of_each * len(self.outputs)


@dataclass(frozen=True)
class Written:
    """A model that was saved, read back and found right."""

    folder: Path
    scale: float
    dtype: torch.dtype
    difference: Difference
    of_what: str
    change: float  # of the logits, from the base's
    untied: bool

    def __str__(self) -> str:
        part = "" if self.scale == 1 else f", the base and {self.scale:g} x the change"
        untied = (
            "; head and embedding are two matrices now (tie_word_embeddings is false)" if self.untied else ""
        )
        return (
            f"written to {self.folder}: a full model in {_name(self.dtype)}{part}{untied}\n"
            f"  read back and compared with {self.of_what}: {self.difference};"
            f" the change itself is up to {self.change:.2g}{self._hint}"
        )

    @property
    def _hint(self) -> str:
        lost = self.change > 0 and self.difference.largest > self.change / 2
        return ", not much more than rounding: --dtype float32 keeps it" if lost else ""


@dataclass
class _Source:
    """A model whose weights can be set to base + L x change, all in float32.

    `base` and `whole` are empty where only all of the change is wanted: the model has it.
    """

    model: Any
    base: dict[str, Tensor]
    whole: dict[str, Tensor]
    ties: _Ties
    dtype: torch.dtype
    tokenizer_from: str
    processor_from: str
    prompts: list[list[int]]
    unchanged: Tensor  # logits of the base,
    expected: Tensor  # and with all of the change, by the adapter itself
    of_what: str


@dataclass
class _Ties:
    """The weights of a model that go by several names, each name with a value of its own now."""

    names: list[list[str]]
    keys: dict[str, str]
    configs: list[tuple[Any, bool]]

    @classmethod
    def cut(cls, model: Any) -> _Ties:
        configs = {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values()
        said = [(config, bool(getattr(config, "tie_word_embeddings", False))) for config in configs]
        return cls(_separate(model), dict(model.all_tied_weights_keys), said)

    def restore(self, model: Any) -> bool:
        """Tie again what has one value still; False if something has not."""
        weights = _weights(model)
        of_base = [[name for name in map(_plain, names) if name in weights] for names in self.names]
        groups = [names for names in of_base if names]
        one = all(_same(weights[names[0]], weights[name]) for names in groups for name in names[1:])
        for config, said in self.configs:
            if said:
                config.tie_word_embeddings = one
        model.all_tied_weights_keys = self.keys if one else {}
        for first, *others in groups if one else ():
            for name in others:
                module, _, last = name.rpartition(".")
                setattr(model.get_submodule(module), last, model.get_parameter(first))
        return one


def _separate(model: Any) -> list[list[str]]:
    """Give each name of a weight a value of its own; the names of those that had several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    several = [group for group in names.values() if len(group) > 1]
    for _, *others in several:
        for name in others:
            module, _, last = name.rpartition(".")
            own = nn.Parameter(model.get_parameter(name).detach().clone(), requires_grad=False)
            setattr(model.get_submodule(module), last, own)
    return several


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal but for the order of float32 sums."""
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= 1e-6 * one.abs().max())


def merge(asked: Merge, advance: Callable[[int], None]) -> list[Written | GgufFile]:
    """Write the models that were asked for: all of them, or none.

    Raises:
        UserError: what was read back is not what the adapter computes.
    """
    if asked.gguf:
        _check_gguf(asked)
    source = None
    if asked.merges:
        source = _adapted(asked) if asked.base is None else _tuned(asked)
        advance(1)
    parent = next(iter(asked.outputs.values())).absolute().parent  # of all of them
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".unisd-merge-", dir=parent) as aside:
            folders = {scale: Path(aside) / f"{scale:g}" for scale in asked.outputs}
            written: list[Written | GgufFile] = []
            if source is not None:
                written += [
                    _write(source, scale, folder, asked, advance) for scale, folder in folders.items()
                ]
            source = None  # its memory is for the models that are written next
            for scale, folder in folders.items() if asked.gguf else ():
                whole = folder if asked.merges else Path(asked.folder)
                written.append(export_gguf(whole, folder, str(asked.gguf), asked.outputs[scale]))
                advance(1)
            for scale, folder in folders.items():
                folder.replace(asked.outputs[scale])
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise
    return written


def _check_gguf(asked: Merge) -> None:
    """Raise `UserError` before anything is loaded that no GGUF file can be made of."""
    from transformers import AutoConfig

    folder = Path(asked.folder)
    model = resolve(base_of(asked.folder, folder) if is_adapter(folder) else asked.folder)
    tokenizer_from = asked.folder if (folder / "tokenizer_config.json").is_file() else model
    trust = {"trust_remote_code": asked.trust_remote_code}
    tokenizer = load_tokenizer(tokenizer_from, **trust)
    check_exportable(AutoConfig.from_pretrained(model, **trust), tokenizer, asked.folder)


def _adapted(asked: Merge) -> _Source:
    """The base with the adapter merged into it."""
    folder = asked.folder
    if not asked.load_in_4bit and _trained_in_4bit(Path(folder)):
        logger.warning(
            "%s was trained on its base in 4 bits: this merges it into the base's own values. --load_in_4bit"
            " merges it into those used in training.",
            folder,
        )
    adapted, tokenizer, info = load_model_and_tokenizer(
        folder,
        dtype="float32",
        trust_remote_code=asked.trust_remote_code,
        load_in_4bit=asked.load_in_4bit,
        dequantize=True,
    )
    kind = adapted.active_peft_config
    if not hasattr(adapted, "merge_and_unload"):
        raise UserError(
            f"an adapter of type {kind.peft_type.value} cannot be merged, as it changes no weights: use it as"
            " it is."
        )
    bare = without_adapter(adapted)
    prompts = prompts_for(bare, tokenizer, getattr(kind, "trainable_token_indices", None))
    expected = logits_of(adapted, prompts)
    with adapted.disable_adapter():
        unchanged = logits_of(adapted, prompts)
    # Each matrix gets its own part of the change: one that is head and embedding would get both.
    ties = _Ties.cut(bare)
    parts = {*asked.outputs} != {1.0}
    if parts:
        check_base_is_kept(adapted.peft_config)
    base = {_plain(name): p.clone() for name, p in _weights(bare).items()} if parts else {}
    try:
        merged = adapted.merge_and_unload()
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"the adapter {folder} cannot be merged: {' '.join(str(error).split())}") from error
    source = _Source(
        model=merged,
        base=base,
        whole={name: p.clone() for name, p in _weights(merged).items()} if parts else {},
        ties=ties,
        dtype=_dtype(asked, info.path),
        tokenizer_from=folder if (Path(folder) / "tokenizer_config.json").is_file() else info.path,
        processor_from=info.path,
        prompts=prompts,
        unchanged=unchanged,
        expected=expected,
        of_what="the adapter",
    )
    _check_merged(source)
    return source


def _tuned(asked: Merge) -> _Source:
    """A full model beside the one that it was trained from."""
    options: dict[str, Any] = {"dtype": "float32", "trust_remote_code": asked.trust_remote_code}
    model, tokenizer, info = load_model_and_tokenizer(asked.folder, **options)
    before, _, base_info = load_model_and_tokenizer(str(asked.base), **options)
    if base_info.adapter is not None:
        raise UserError(
            f"--base {asked.base} is an adapter: give the model that {asked.folder} was trained from."
        )
    base = {name: p.clone() for name, p in _weights(before).items()}
    ties = _Ties.cut(model)
    whole = {name: p.clone() for name, p in _weights(model).items()}
    for name in sorted({*base, *whole}):
        mine, theirs = (tuple(found[name].shape) if name in found else "absent" for found in (whole, base))
        if mine != theirs:
            raise UserError(
                f"{asked.folder} was not trained from --base {asked.base}: {name} is {mine} in it, and"
                f" {theirs} in the base."
            )
    prompts = prompts_for(model, tokenizer)
    return _Source(
        model=model,
        base=base,
        whole=whole,
        ties=ties,
        dtype=_dtype(asked, info.path),
        tokenizer_from=info.path,
        processor_from=info.path,
        prompts=prompts,
        unchanged=logits_of(before, prompts),
        expected=logits_of(model, prompts),
        of_what=asked.folder,
    )


def _check_merged(source: _Source) -> None:
    difference = Difference.of(logits_of(source.model, source.prompts), source.expected)
    if not difference.is_rounding:
        raise UserError(
            f"this adapter cannot be merged: with it merged into its base, the {difference}. Nothing was"
            " written: use the adapter as it is."
        )


def _write(
    source: _Source, scale: float, folder: Path, asked: Merge, advance: Callable[[int], None]
) -> Written:
    """Save the base and `scale` times the change, and compare what is read back."""
    model, kind = source.model, type(source.model)
    as_float32 = {"dtype": torch.float32, "trust_remote_code": asked.trust_remote_code}
    if source.base:
        _separate(model)
        for name, parameter in model.named_parameters():
            parameter.data = torch.lerp(source.base[name], source.whole[name], scale)
    tied = source.ties.restore(model)
    exact = source.expected if scale == 1 else logits_of(model, source.prompts)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(source.dtype)
    mend_generation_config(model)
    model.save_pretrained(folder)
    copy_processor(source.processor_from, folder)
    copy_tokenizer(source.tokenizer_from, folder, asked.trust_remote_code)
    follow_umask(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    rounded = logits_of(model, source.prompts)
    if not bool(rounded.isfinite().all()):
        raise UserError(
            f"in {_name(source.dtype)} the model computes no finite logits: choose another --dtype. Nothing"
            " was written."
        )
    advance(1)
    if not source.base:
        source.model = model = None  # there need not be two in memory
    read = logits_of(kind.from_pretrained(folder, **as_float32).eval(), source.prompts)
    advance(1)
    if not (difference := Difference.of(read, rounded)).is_rounding:
        raise UserError(
            f"what was saved cannot be read back: the {difference}. Nothing was written: use the adapter as"
            " it is."
        )
    return Written(
        folder=asked.outputs[scale],
        scale=scale,
        dtype=source.dtype,
        difference=Difference.of(read, exact),
        of_what=source.of_what if scale == 1 else "the same sum in float32",
        change=Difference.of(exact, source.unchanged).largest,
        untied=bool(source.ties.names) and not tied,
    )


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters under all of their names."""
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


def _plain(name: str) -> str:
    """The name that a weight of the base has without an adapter around it."""
    return ".".join(part for part in name.split(".") if part not in INSIDE_ADAPTERS)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(asked: Merge, path: str) -> torch.dtype:
    """The precision that was asked for, or that of the base as it is saved."""
    from transformers import AutoConfig

    if asked.dtype != "auto":
        return DTYPES[asked.dtype]
    config = AutoConfig.from_pretrained(path, trust_remote_code=asked.trust_remote_code)
    saved = config.dtype or config.get_text_config(decoder=True).dtype
    return saved if saved in DTYPES.values() else torch.float32


def _trained_in_4bit(folder: Path) -> bool:
    """Whether the run that wrote this folder, or this checkpoint, says so."""
    return bool(config_of_run(folder).get("load_in_4bit"))
