"""One view onto any causal LM: its final hidden states and the head that turns them into logits.

The losses work on hidden states, so that the `[tokens, vocabulary]` logits never exist. Two things
must then be true of a model and are *checked on the model itself* instead of being assumed from its
name: that our head reproduces the model's logits (softcap, scale, bias), and that packed rows (one
long row, restarting positions, no mask) give the hidden states of separate rows.

Shapes: B rows, L padded length, N selected tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from unisd.batching import Batch, close, collate, tolerance_of
from unisd.compat import CACHE, cache_argument
from unisd.distributed.sharding import materialized, passage_to
from unisd.errors import UserError
from unisd.kernels.attention import PACKED_SDPA
from unisd.losses.head import Head
from unisd.models.load import without_adapter

logger = logging.getLogger(__name__)


@dataclass
class Captured:
    """What a forward pass has left: final hidden states `[B,L,H]`, and those of listed layers."""

    final: Tensor | None = None
    layers: dict[int, Tensor] = field(default_factory=dict)


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
        self.decoder: nn.Module = causal_lm.get_decoder()
        if self.decoder is None or self.decoder is causal_lm:
            raise UserError(
                f"{type(causal_lm).__name__} has no separate decoder below its head: not a causal LM that can"
                " be trained here."
            )
        parameters = inspect.signature(causal_lm.forward).parameters
        if causal_lm.config._attn_implementation == "sdpa":
            # and stays: backward passes of checkpointed layers compute it again
            causal_lm.set_attn_implementation(PACKED_SDPA)
        decoder_parameters = inspect.signature(self.decoder.forward).parameters
        self.tells_rows = causal_lm.config._attn_implementation == PACKED_SDPA and all(
            any(p.kind is p.VAR_KEYWORD for p in found.values()) for found in (parameters, decoder_parameters)
        )
        self._forward_options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in parameters:  # of no position: the head's output is never needed
            self._forward_options["logits_to_keep"] = torch.zeros(0, dtype=torch.long)
        text_config = causal_lm.config.get_text_config()
        self._softcap: float | None = getattr(text_config, "final_logit_softcapping", None)
        self._scale: float = 1.0
        if getattr(text_config, "logit_scale", None):  # Cohere multiplies
            self._scale = float(text_config.logit_scale)
        elif getattr(text_config, "logits_scaling", None):  # Granite divides
            self._scale = 1.0 / float(text_config.logits_scaling)

    @property
    def head_module(self) -> nn.Linear:
        """The output embedding, unwrapped from PEFT's `modules_to_save`."""
        module = self.causal_lm.get_output_embeddings()
        saved = getattr(module, "modules_to_save", None)
        if saved is not None:
            module = saved[module.active_adapters[0]]
        if not isinstance(module, nn.Linear) or hasattr(module, "base_layer"):
            raise UserError(
                f"the model's head is a {type(module).__name__}, but a plain linear layer is needed: "
                "take lm_head out of lora_target_modules."
            )
        return module

    def head(self, weight: Tensor | None = None, bias: Tensor | None = None) -> Head:
        """The head as the losses take it.

        `weight` and `bias` stand in for the module's own (a teacher's).

        That of a sharded model is at hand after a forward pass, until its backward pass; before, it
        is gathered (all ranks must ask).
        """
        module = self.head_module
        return Head(
            weight=materialized(module.weight) if weight is None else weight,
            bias=(None if module.bias is None else materialized(module.bias)) if bias is None else bias,
            scale=self._scale,
            softcap=self._softcap,
        )

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

    def forward(self, model: nn.Module, batch: Batch, layers: Sequence[int] = ()) -> Captured:
        """Pass a batch through `model`, keeping hidden states.

        This model or a wrapper around it, whose hooks must run.
        """
        with self.capture(layers) as captured:
            model(**self._inputs(batch), **self._forward_options)
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
        options = {} if passage is self.decoder else self._forward_options
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

    def blocks(self) -> nn.ModuleList:
        """The list of transformer blocks."""
        depth = self.causal_lm.config.get_text_config().num_hidden_layers
        for module in self.decoder.children():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return module
        raise UserError(
            "feature_layers: the model's blocks could not be found; unset it to match the final layer."
        )

    @torch.no_grad()
    def check(self, pad_id: int, packing: str = "auto") -> bool:
        """Check head and packing on the model itself; returns whether rows may be packed.

        Raises:
            UserError: if the head does not reproduce the model's logits, or `packing="packed"` is
                not exact.
        """
        was_training = self.causal_lm.training
        self.causal_lm.eval()
        try:
            vocabulary = self.causal_lm.config.get_text_config().vocab_size
            generator = torch.Generator().manual_seed(0)
            rows = [
                torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (5, 9, 3)
            ]
            device = self.head_module.weight.device
            with self.capture() as captured:
                logits = self.causal_lm(
                    input_ids=torch.tensor([rows[1]], device=device), use_cache=False
                ).logits
            assert captured.final is not None
            ours = self.head().logits(captured.final[0])
            tolerance = tolerance_of(logits.dtype)
            if not close(ours, logits[0].float(), tolerance):
                raise UserError(
                    f"the head of {type(self.causal_lm).__name__} does not reproduce its logits (an unknown"
                    " scaling of logits): this architecture is not supported."
                )
            if packing == "padded":
                return False
            exact = self._packing_is_exact(rows, pad_id, device, tolerance)
            if not exact and packing == "packed":
                raise UserError(
                    "packing=packed is not exact for this architecture: use packing=auto or padded."
                )
            if not exact:
                logger.warning(
                    "Packed rows are not exact for %s: rows are padded.", type(self.causal_lm).__name__
                )
            return exact
        finally:
            self.causal_lm.train(was_training)

    def _packing_is_exact(self, rows: list[list[int]], pad_id: int, device: Any, tolerance: float) -> bool:
        try:
            packed = self.forward(self.causal_lm, collate(rows, True, pad_id, device)).final
        except (
            RuntimeError,
            ValueError,
            TypeError,
        ) as error:  # an architecture without position ids, for one
            logger.warning("A packed row cannot be read by %s: %r", type(self.causal_lm).__name__, error)
            return False
        assert packed is not None
        separate = [self.forward(self.causal_lm, collate([row], True, pad_id, device)).final for row in rows]
        return close(
            packed[0], torch.cat([hidden[0] for hidden in separate if hidden is not None]), tolerance
        )

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
