"""One view onto any causal LM: its final hidden states and the head that turns them into logits.

The losses work on hidden states, so that the `[tokens, vocabulary]` logits never exist. What must
then be true of a model is *checked on the model itself* instead of being assumed from its name,
against the logits that it computes by itself, whole, with its own attention: that our head
reproduces them (softcap, scale, bias), as does our attention; that no later token changes them, nor
a neighbour in a padded batch; and that packed rows (one long row, restarting positions, no mask)
give them, too.

Shapes: B rows, L padded length, N selected tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from unisd.batching import Batch, close, collate, tolerance_of
from unisd.compat import CACHE, cache_argument
from unisd.distributed.sharding import materialized, passage_to
from unisd.errors import UserError
from unisd.kernels.attention import PACKED_SDPA
from unisd.losses.head import Head, softcap_and_scale
from unisd.models.adapters import without_adapter
from unisd.models.load import context_length, ropes
from unisd.models.tokens import defined_tokens, end_tokens

logger = logging.getLogger(__name__)

# on the model, for all who look at it
OWN, KEPT, CHECKED = "attention_before_unisd", "keeps_its_attention", "checked_by_unisd"
CHECKED_TOKENS = 160
"""Of the longest row that a model is checked on: beyond short windows, and blocks of 128 tokens."""
BEGINNING, ENDING = 32, 9
"""Of the row with another ending: the tokens that come before it at most, and its own."""
CHECKED_COLUMNS = 1024
"""Most columns of the logits that are compared: all would take more memory than a step does."""


@dataclass
class Captured:
    """What a forward pass has left: final hidden states `[B,L,H]`, and those of listed layers."""

    final: Tensor | None = None
    layers: dict[int, Tensor] = field(default_factory=dict)
    aux_loss: Tensor | None = None  # of routers, where the pass was asked for it


class Backbone:
    """The transformer below the head of `model` (plain, PEFT-wrapped or quantised).

    Args:
        model: the unwrapped model (no DDP/FSDP wrapper around it).

    Raises:
        UserError: if the head is not a plain linear layer, or does not reproduce the model's own
            logits.
    """

    def __init__(self, model: nn.Module) -> None:
        wrapped: Any = model
        self.model = wrapped
        causal_lm = without_adapter(wrapped)
        self.causal_lm = causal_lm
        _refuse_wrapper(wrapped)
        self.decoder: Any = causal_lm.get_decoder()
        if self.decoder is causal_lm:  # Llama 4 names it otherwise
            self.decoder = getattr(causal_lm, "model", causal_lm)
        if self.decoder is None or self.decoder is causal_lm:
            raise UserError(
                f"{type(causal_lm).__name__} has no separate decoder below its head: not a causal LM that can"
                " be trained here."
            )
        parameters = inspect.signature(causal_lm.forward).parameters
        # as it was before any other view onto this model
        self._own_attention = vars(causal_lm).setdefault(OWN, causal_lm.config._attn_implementation)
        if causal_lm.config._attn_implementation == "sdpa" and not asks_for_attention(causal_lm):
            # and stays: backward passes of checkpointed layers compute it again
            causal_lm.set_attn_implementation(PACKED_SDPA)
        decoder_parameters = inspect.signature(self.decoder.forward).parameters
        self.tells_rows = causal_lm.config._attn_implementation == PACKED_SDPA and all(
            any(p.kind is p.VAR_KEYWORD for p in found.values()) for found in (parameters, decoder_parameters)
        )
        # Of the routers' logits nothing is made but with `router_aux_loss_coef`.
        self._quiet: dict[str, Any] = quiet_routers(causal_lm)
        self._forward_options: dict[str, Any] = {"use_cache": False, **self._quiet}
        if "logits_to_keep" in parameters:  # of no position: the head's output is never needed
            self._forward_options["logits_to_keep"] = torch.zeros(0, dtype=torch.long)
        text_config = causal_lm.config.get_text_config()
        self._softcap, self._scale = softcap_and_scale(text_config)

    @property
    def head_module(self) -> nn.Linear:
        """The output embedding, unwrapped from PEFT's `modules_to_save`."""
        module = self.causal_lm.get_output_embeddings()
        saved = getattr(module, "modules_to_save", None)
        if saved is not None:
            module = saved[module.active_adapters[0]]
        if not isinstance(module, nn.Linear) or hasattr(module, "base_layer"):
            remedy = "take lm_head out of lora_target_modules."
            if hasattr(module, "token_adapter"):  # the embeddings' is the head's, where both are tied
                remedy = (
                    "the head is tied to embeddings with trainable_token_indices: leave those out of the"
                    " peft_config, and give modules_to_save=['embed_tokens', 'lm_head'] to train all tokens."
                )
            raise UserError(
                f"the model's head is a {type(module).__name__}, but a plain linear layer is needed: {remedy}"
            )
        return module

    def head(self, weight: Tensor | None = None, bias: Tensor | None = None) -> Head:
        """The head as the losses take it.

        `weight` and `bias` stand in for the module's own (a teacher's).

        That of a sharded model is at hand after a forward pass, until its backward pass; before, it
        is gathered (all ranks must ask).
        """
        module = self.head_module
        weight = materialized(module.weight) if weight is None else weight
        if bias is None and module.bias is not None:
            bias = materialized(module.bias)
        known = defined_tokens(module)
        if known is not None:  # views, without the rows that stand for no token
            weight, bias = weight[:known], None if bias is None else bias[:known]
        return Head(weight, bias, self._scale, self._softcap, end_tokens(module))

    @contextmanager
    def capture(self, layers: Sequence[int] = ()) -> Iterator[Captured]:
        """While active, a forward pass of the model records hidden states.

        Also one through a wrapper.
        """
        captured = Captured()

        def keep_final(_module: nn.Module, _args: Any, output: Any) -> None:
            captured.final = output[0] if isinstance(output, tuple) else output.last_hidden_state

        def keep_layer(index: int) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                captured.layers[index] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [self.decoder.register_forward_hook(keep_final)]
        blocks = self.blocks() if layers else None
        for index in layers:
            assert blocks is not None
            handles.append(blocks[index].register_forward_hook(keep_layer(index)))
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def forward(
        self, model: nn.Module, batch: Batch, layers: Sequence[int] = (), aux_loss: bool = False
    ) -> Captured:
        """Pass a batch through `model`, keeping hidden states (and the routers' own loss).

        This model or a wrapper around it, whose hooks must run.
        """
        options = self._forward_options | ({"output_router_logits": True} if aux_loss else {})
        with self.capture(layers) as captured:
            output = model(**self._inputs(batch), **options)
        captured.aux_loss = output.aux_loss if aux_loss else None
        return captured

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """Of the model's forward; attention is told where packed rows begin."""
        return {**batch.inputs, **(batch.rows if self.tells_rows else {})}

    def hidden_states(self, batch: Batch, layers: Sequence[int] = ()) -> Captured:
        """Hidden states without the head, which is not needed, and without gradient."""
        with self.capture(layers) as captured:
            self._run(**self._inputs(batch), use_cache=False)
        return captured

    def _run(self, **inputs: Any) -> None:
        passage = passage_to(self.decoder, self.model)
        options = self._quiet if passage is self.decoder else self._forward_options
        passage(**{**options, **inputs})

    def continuations(
        self,
        prompt: Sequence[int],
        completions: Sequence[Sequence[int]],
        pad_id: int,
        device: torch.device | str,
        layers: Sequence[int] = (),
    ) -> tuple[Captured, list[int]]:
        """Hidden states of several completions of one prompt, which is read once; no gradient.

        The prompt has two tokens or more.

        Returns what the pass over the completions left, and the flat index of the first state of
        each: the one after the prompt's last token, which predicts its first token.
        """
        cache = DynamicCache(config=self.causal_lm.config.get_text_config(decoder=True))
        before = len(prompt) - 1
        cached: dict[str, Any] = {cache_argument(self.decoder.forward) or CACHE[0]: cache, "use_cache": True}
        self._run(input_ids=torch.tensor([prompt[:-1]], device=device), **cached)
        cache.batch_repeat_interleave(len(completions))
        # The last token of a completion predicts nothing that is scored.
        tails = collate([[prompt[-1], *completion[:-1]] for completion in completions], False, pad_id, device)
        assert tails.attention_mask is not None
        mask_BL = torch.cat(
            [tails.attention_mask.new_ones(len(completions), before), tails.attention_mask], dim=1
        )
        with self.capture(layers) as captured:
            self._run(
                input_ids=tails.input_ids,
                attention_mask=mask_BL,
                position_ids=tails.position_ids + before,
                **cached,
            )
        return captured, tails.starts

    def freeze_the_rest(self) -> None:
        """Ask for no gradient of what no text passes through.

        The vision tower of a model for images: it would get none, and DDP waits for it.
        """
        parts = [self.decoder, self.causal_lm.get_input_embeddings(), self.causal_lm.get_output_embeddings()]
        used = {id(p) for part in parts for p in part.parameters()}
        rest = [p for p in self.causal_lm.parameters() if p.requires_grad and id(p) not in used]
        for p in rest:
            p.requires_grad_(False)
        if rest:
            logger.info(
                "%d weights outside of the text decoder stay as they are.", sum(p.numel() for p in rest)
            )

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise `UserError` for the first of `layers` that the model does not have.

        Negative ones count from the end.
        """
        for index in layers:
            if not -len(blocks := self.blocks()) <= index < len(blocks):
                raise UserError(f"feature_layers={index}: the model has layers 0 to {len(blocks) - 1}.")

    def blocks(self, remedy: str = "unset feature_layers, to match the final layer.") -> nn.ModuleList:
        """The list of transformer blocks."""
        depth = self.causal_lm.config.get_text_config().num_hidden_layers
        for module in self.decoder.children():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return module
        raise UserError(f"the model's blocks could not be found; {remedy}")

    @property
    def context(self) -> tuple[int | None, str]:
        """Most tokens that a row may have, and what says so."""
        limit, turns = context_length(self.causal_lm), self.longest_exact
        if turns is None or (limit is not None and limit <= turns):
            return limit, "the model's context"
        return turns, "what LongRoPE reads without turning the positions of a row's neighbours"

    @property
    def longest_exact(self) -> int | None:
        """Tokens beyond which the length of one row changes how all rows of a pass are read.

        None where there is no such length. LongRoPE turns all positions otherwise then, and dynamic
        scaling does.
        """
        config = self.causal_lm.config.get_text_config()
        limits = []
        for kind in ropes(config):
            if kind.get("rope_type") == "longrope":
                limits.append(kind.get("original_max_position_embeddings"))
            elif "dynamic" in str(kind.get("rope_type")):
                limits.append(config.max_position_embeddings)
        return min((int(limit) for limit in limits if limit), default=None)

    @property
    def is_checked(self) -> bool:
        """Whether `check` has found this model, in this wrapper, to be read as it should."""
        return vars(self.causal_lm).get(CHECKED) is type(self.model)

    @torch.no_grad()
    def check(self, pad_id: int, packing: str = "auto") -> bool:
        """Check all that is relied on, on the model itself; returns whether rows may be packed.

        Raises:
            UserError: the head does not reproduce the model's logits, later tokens or neighbours
                change them, or `packing="packed"` is not exact.
        """
        was_training = self.causal_lm.training
        self.model.eval()
        try:
            rows = self._rows_to_check()
            own = self._own_logits(rows)
            self._check_own(own)
            if not self._agrees(rows, torch.cat(own), pad_id):
                if all(self._agrees([row], logits, pad_id) for row, logits in zip(rows, own, strict=True)):
                    self._refuse("a padded row", "changes the logits of its neighbours")
                if self.causal_lm.config._attn_implementation == self._own_attention:
                    self._refuse("the head", "does not reproduce its logits (an unknown scaling of logits)")
                # More than the attention itself hangs on the name: it keeps its own.
                self.causal_lm.set_attn_implementation(self._own_attention)
                setattr(self.causal_lm, KEPT, True)
                self.tells_rows = False
                return self.check(pad_id, packing)
            setattr(self.causal_lm, CHECKED, type(self.model))
            if packing == "padded":
                return False
            # Code of its own may look exact here, and not be it in longer rows.
            exact = self._own_attention != "eager" and self._agrees(rows, torch.cat(own), pad_id, packed=True)
            if not exact and packing == "packed":
                raise UserError(
                    "packing=packed is not exact for this architecture and its attention"
                    f" ({self._own_attention}): use packing=auto or padded."
                )
            if not exact:
                logger.warning(
                    "Packed rows are not exact for %s: rows are padded.", type(self.causal_lm).__name__
                )
            return exact
        finally:
            self.model.train(was_training)

    def _refuse(self, what: str, does: str) -> NoReturn:
        raise UserError(
            f"{what} of {type(self.causal_lm).__name__} {does}: this architecture is not supported."
        )

    def _rows_to_check(self) -> list[list[int]]:
        config = self.causal_lm.config.get_text_config()
        limits = (CHECKED_TOKENS, getattr(config, "max_position_embeddings", None), self.longest_exact)
        longest = min(int(limit) for limit in limits if limit)
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randint(config.vocab_size, (length,), generator=generator).tolist()
            for length in (longest, 9, 3)
        ]

    def _own_logits(self, rows: list[list[int]]) -> list[Tensor]:
        """The model's own logits `[T,V]` of each row, and of another ending of the first."""
        ours, device = self.causal_lm.config._attn_implementation, self.head_module.weight.device
        ending = [(token + 1) % (max(rows[0]) + 1) for token in rows[0][-ENDING:]]
        beginning = rows[0][: max(1, min(BEGINNING, len(rows[0]) - ENDING))]
        self.causal_lm.set_attn_implementation(self._own_attention)
        try:
            return [
                self._compared(
                    self.model(
                        input_ids=torch.tensor([ids], device=device), use_cache=False, **self._quiet
                    ).logits[0]
                )
                for ids in (*rows, beginning + ending)
            ]
        finally:
            self.causal_lm.set_attn_implementation(ours)

    def _compared(self, logits_TV: Tensor) -> Tensor:
        """Every so many columns of the defined ones, as a copy."""
        known = len(self.head().weight)
        return logits_TV[:, : known : -(-known // CHECKED_COLUMNS)].clone()

    def _check_own(self, own: list[Tensor]) -> None:
        """Take the row with another ending off the list, and compare it."""
        other = own.pop()
        kept = len(other) - ENDING
        if not _alike(other[:kept], own[0][:kept]):
            raise UserError(
                f"{type(self.causal_lm).__name__} reads later tokens, too: another ending of a text changes"
                " its logits for the beginning. It cannot be trained here: give a causal model (without"
                " bidirectional attention)."
            )

    def _agrees(self, rows: list[list[int]], own_TV: Tensor, pad_id: int, packed: bool = False) -> bool:
        """Whether one pass over rows, decoder and head apart, gives the model's own logits."""
        batch = collate(rows, packed, pad_id, own_TV.device)
        try:
            hidden = self.forward(self.causal_lm, batch).final
        except (RuntimeError, ValueError, TypeError) as error:
            if not packed:
                raise
            # an architecture without position ids, for one
            logger.warning("A packed row cannot be read by %s: %r", type(self.causal_lm).__name__, error)
            return False
        assert hidden is not None
        flat = hidden.flatten(0, 1)
        if len(rows) == 1 and len(own_TV) != len(flat):
            return False
        read = [flat[start : start + len(row)] for start, row in zip(batch.starts, rows, strict=True)]
        ours = [self._compared(self.head().logits(states_TH)) for states_TH in read]
        own = torch.split(own_TV, [len(row) for row in rows])
        if packed:  # nothing is refused for it: better padded than inexact
            return close(torch.cat(ours), torch.cat(own), tolerance_of(own_TV.dtype))
        return all(_alike(*pair) for pair in zip(ours, own, strict=True))

    @torch.no_grad()
    def can_continue(self, pad_id: int) -> bool:
        """Whether completions that share the reading of their prompt get the same states.

        As those of separate rows, tried on the model itself.
        """
        vocabulary = self.causal_lm.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(1)
        prompt, *completions = (
            torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (11, 4, 7)
        )
        was_training = self.causal_lm.training
        self.causal_lm.eval()
        try:
            device = self.head_module.weight.device
            captured, starts = self.continuations(prompt, completions, pad_id, device)
            assert captured.final is not None
            flat = captured.final.flatten(0, 1)
            tolerance = tolerance_of(flat.dtype)
            for start, completion in zip(starts, completions, strict=True):
                alone = self.forward(
                    self.causal_lm, collate([prompt + completion], True, pad_id, device)
                ).final
                assert alone is not None
                if not close(
                    flat[start : start + len(completion)], alone[0, len(prompt) - 1 : -1], tolerance
                ):
                    return False
            return True
        except (
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
        ):  # an architecture with a cache of its own kind
            return False
        finally:
            self.causal_lm.train(was_training)


def quiet_routers(model: Any) -> dict[str, Any]:
    """What a pass is to be told so that routers do not hand out their logits.

    Models saved with `output_router_logits` would, and make a loss of them that nobody takes (in
    decoding it does not even fit). The config stays as it is.
    """
    config = without_adapter(model).config.get_text_config()
    return {"output_router_logits": False} if getattr(config, "output_router_logits", False) else {}


def _refuse_wrapper(model: Any) -> None:
    """Refuse adapters that act in peft's wrapper: losses and scores pass below it."""
    for adapter in getattr(model, "peft_config", {}).values():
        kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
        kind = (
            "activated LoRA (alora_invocation_tokens)"
            if getattr(adapter, "alora_invocation_tokens", None)
            else kind
        )
        if adapter.is_prompt_learning or "alora" in kind or kind == "XLORA":
            raise UserError(
                f"peft_config: {kind} acts around the model, not in its layers, and cannot be trained here:"
                " use LoRA, or another adapter of layers."
            )


def asks_for_attention(model: Any) -> bool:
    """Whether the model's own code does other things under the name "sdpa".

    Found in its code, or by a check in which another name gave other logits. Sparse attention
    (DeepSeek-V3.2, GLM-5) is such a thing: under another name it would be dense.
    """
    return vars(model).get(KEPT, False) or _asks_for_attention(type(model).__module__)


@cache
def _asks_for_attention(module: str) -> bool:
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return False
    return re.search(r"_attn_implementation\s*(==|!=|(not )?in)[^\n]*[\"']sdpa[\"']", source) is not None


def _alike(ours_TV: Tensor, own_TV: Tensor) -> bool:
    """Whether logits are the same to rounding; in 16 bits those of most tokens.

    Rounding alone sends a token to another expert there.
    """
    if ours_TV.shape != own_TV.shape:
        return False
    tolerance = tolerance_of(own_TV.dtype)
    if own_TV.dtype in (torch.float32, torch.float64):
        return close(ours_TV, own_TV, tolerance)
    apart_T = (ours_TV.float() - own_TV.float()).abs().amax(-1)
    return bool(apart_T.median() <= tolerance * own_TV.float().abs().max().clamp_min(1e-6))
