"""What both engines share: requests, checks of answers, what is taken from the student."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from unisd.config import UniSDConfig
from unisd.errors import UserError
from unisd.files import follow_umask
from unisd.http_client import BadAnswer
from unisd.models.adapters import check_base_is_kept, without_adapter
from unisd.models.tokens import defined_tokens
from unisd.rollout.engine import Completion, NoiseKey, Sampling, seed_of

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM is built for


class VllmEngine:
    """Knows the student, and checks each answer; see `build_engine` for the arguments.

    Attributes:
        weights_version: optimizer step of the weights of the last `sync`; None before the first.
        bare: the student without its adapter.
    """

    def __init__(
        self,
        args: UniSDConfig,
        model: Any,
        accelerator: Accelerator,
        eos_ids: Sequence[int],
        finished_steps: Callable[[], int],
    ) -> None:
        self.model = model
        self.eos_ids = eos_ids
        self.returns_logps = logps_compare(args)
        self.weights_version: int | None = None
        self._accelerator = accelerator
        self._finished_steps = finished_steps
        self._with_adapter = hasattr(model, "peft_config")
        self.bare = without_adapter(model)
        head = self.bare.get_output_embeddings()
        rows = int(head.weight.shape[0])
        self._vocabulary = defined_tokens(head) or rows
        # The lowest that a server takes. One entry a row, in each request: vLLM 0.32 has no shorter
        # way (allowed_token_ids lists the others, bad_words are texts, which these rows lack).
        self.forbidden = dict.fromkeys(range(self._vocabulary, rows), -100.0)
        self._dtype = str(self._precision()).removeprefix("torch.")  # that the engine computes with

    def _precision(self) -> torch.dtype:
        """The precision of the weights: under an adapter the base's."""
        floats = [p for p in self.model.parameters() if p.is_floating_point()]
        base = [p for p in floats if not p.requires_grad] if self._with_adapter else []
        dtype: torch.dtype = (base or floats)[0].dtype
        return dtype

    def _checked(self, ids: Sequence[int], logps: Sequence[float | None], sampling: Sampling) -> Completion:
        """An answer as the trainer takes it. Raises `BadAnswer`: see `completion_of`."""
        completion = completion_of(
            ids,
            logps,
            limit=sampling.max_new_tokens,
            eos_ids=self.eos_ids,
            vocabulary=self._vocabulary,
            version=self.weights_version or 0,
        )
        return completion if self.returns_logps else replace(completion, logps=None)


def sampling_fields(
    sampling: Sampling,
    key: NoiseKey | None,
    eos_ids: Sequence[int],
    forbidden: dict[int, float] | None = None,
) -> dict[str, Any]:
    """One request's options by the names that vLLM gives them, in process and over HTTP.

    Greedy where `key` is None. `forbidden`: the bias against tokens that must not be written.

    All end tokens count, as in `generate`, so the engine's own idea of them is switched off.
    """
    fields: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "ignore_eos": True,
        "stop_token_ids": list(eos_ids),
        "logprobs": 0,  # of the drawn token alone
        "skip_special_tokens": False,
        # A server would take the model's own generation defaults where nothing is said.
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    if forbidden:
        fields["logit_bias"] = forbidden
    if key is None:
        return {**fields, "temperature": 0.0}
    drawn = {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p, "seed": seed_of(key)}
    return {**fields, "temperature": sampling.temperature, **drawn}


def logps_compare(args: UniSDConfig) -> bool:
    """Whether an engine's log-probabilities are of the distribution that the trainer scores.

    That is at its temperature, over all tokens.

    vLLM tells those of the truncated distribution where tokens are cut off (top_p, top_k, min_p):
    larger ones, by the mass cut off.
    """
    untruncated = args.top_p == 1 and args.top_k == 0 and args.min_p == 0
    return untruncated and args.divergence_spec.temperature == args.temperature


def completion_of(
    ids: Sequence[int],
    logps: Sequence[float | None],
    *,
    limit: int,
    eos_ids: Sequence[int],
    vocabulary: int,
    version: int,
) -> Completion:
    """A checked answer.

    Its log-probabilities stay even where the trainer must not compare them (see `logps_compare`).

    Raises:
        BadAnswer: empty, too long, cut off early, ids outside of the vocabulary, or not one
            log-probability a token.
    """
    if not ids or len(ids) > limit:
        raise BadAnswer(f"an answer of {len(ids)} tokens where 1 to {limit} were asked for")
    if len(logps) != len(ids):
        raise BadAnswer(f"{len(logps)} log-probabilities for {len(ids)} tokens")
    if any(
        isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary for token in ids
    ):
        raise BadAnswer(f"a token id outside of the vocabulary of {vocabulary}")
    if any(not isinstance(logp, int | float) or not math.isfinite(logp) or logp > 1e-3 for logp in logps):
        raise BadAnswer("an invalid log-probability")
    ends = set(eos_ids)
    truncated = len(ids) == limit and ids[-1] not in ends
    if not truncated and ids[-1] not in ends:
        raise BadAnswer(f"an answer that stops after {len(ids)} tokens without an end token")
    return Completion(
        list(ids), truncated, [min(float(logp), 0.0) for logp in logps if logp is not None], version=version
    )


# -- the student's side ----------------------------------------------------------------------------


def lora_rank(model: Any) -> int:
    """The smallest rank that vLLM is built for and the adapter fits in.

    Raises:
        UserError: the adapter is of a kind that vLLM does not serve.
    """
    config = model.peft_config[model.active_adapter]
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA" or getattr(
        config, "use_dora", False
    ):
        raise UserError("use_vllm serves plain LoRA adapters only (no DoRA, no other kind): unset use_vllm.")
    if config.modules_to_save or config.bias != "none":
        raise UserError(
            "use_vllm cannot take over an adapter's modules_to_save or bias: leave them out, or unset"
            " use_vllm."
        )
    check_base_is_kept(model.peft_config)  # the engine loads the base itself
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    found = [m.scaling[model.active_adapter] for m in model.modules() if isinstance(m, LoraLayer)]
    if any(not math.isclose(one, scale) for one in found):
        raise UserError(
            "use_vllm takes lora_alpha / r for the scale of all layers: leave rank_pattern and alpha_pattern"
            " out, or unset use_vllm."
        )
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    fitting = [known for known in LORA_RANKS if known >= rank]
    if not fitting:
        raise UserError(
            f"lora_r={rank} is above the largest that vLLM serves ({LORA_RANKS[-1]}): lower it, or unset"
            " use_vllm."
        )
    return fitting[0]


def save_adapter(model: Any, folder: Path) -> None:
    """The active adapter alone, as peft writes it."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    follow_umask(folder)  # the server may be another user's


def full_weights(model: Any) -> dict[str, Tensor]:
    """All weights by their names in a checkpoint, shared with the model.

    Nothing is copied; a tied head is there once.
    """
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return found


def save_full_weights(model: Any, file: Path) -> None:
    """`full_weights` as one safetensors file, put in its place when it is whole."""
    aside = file.with_suffix(".partial")
    save_file({name: value.contiguous().cpu() for name, value in full_weights(model).items()}, str(aside))
    follow_umask(aside.parent)
    aside.replace(file)
