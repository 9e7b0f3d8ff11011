"""The cache of keys and values is in use, by the name that the installed transformers has for it.

Counted in passes and in what they read: an answer is the same without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from unisd import testing as tiny
from unisd.backbone import Backbone
from unisd.compat import cache_argument
from unisd.rollout.decoding import COMPACT_EVERY_CPU, GrowingLayer, _empty_cache, decode

PROMPTS = [[1, 40 + i, 50, *[60] * (i * 7)] for i in range(4)]


class Reads:
    """The shapes of the token ids that a model's decoder reads, pass by pass."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, int]] = []
        model.get_decoder().register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_a_step_of_decoding_reads_one_token(family: str) -> None:
    model = tiny.model(family)
    cache = _empty_cache(model)
    assert cache is not None
    windows = family == "gemma3"  # both of its layers here, which have a cache of their own
    assert [type(layer) is GrowingLayer for layer in cache.layers] == [not windows] * 2
    reads = Reads(model)
    answers = decode(model, [PROMPTS[0]], 9, eos_ids=[], pad_id=0)
    assert reads.shapes == [(1, len(PROMPTS[0])), *[(1, 1)] * 8]
    assert len(answers[0]) == 9


def test_finished_rows_are_not_read_further_and_prompts_once() -> None:
    model = tiny.model()
    free = decode(model, PROMPTS, 3 * COMPACT_EVERY_CPU, eos_ids=[], pad_id=0)
    end = next(t for t in free[1][:COMPACT_EVERY_CPU] if t not in free[0] + free[2] + free[3])
    reads = Reads(model)
    decode(model, [*PROMPTS, PROMPTS[0]], 3 * COMPACT_EVERY_CPU, eos_ids=[end], pad_id=0)
    prompts, steps = reads.shapes[:-1], [shape for shape in reads.shapes if shape[1] == 1]
    assert max(rows for rows, tokens in prompts if tokens > 1) <= len(PROMPTS)  # one occurs twice
    assert steps[-1] == (len(PROMPTS), 1) and (len(PROMPTS) + 1, 1) in steps


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_completions_of_one_prompt_share_its_reading(family: str) -> None:
    model = tiny.model(family)
    backbone = Backbone(model)
    assert backbone.can_continue(0)
    reads = Reads(model)
    with torch.no_grad():
        backbone.continuations(PROMPTS[3], [[7, 8, 9], [10, 11]], 0, "cpu")
    assert reads.shapes == [(1, len(PROMPTS[3]) - 1), (2, 3)]


def test_a_trainer_shares_prompts(tmp_path: Path) -> None:
    assert tiny.trainer(tmp_path, num_generations=2).scorer.passes.layout.share_prompts


def test_either_name_is_found() -> None:
    def new(input_ids: Any, cache: Any = None) -> None: ...
    def old(input_ids: Any, past_key_values: Any = None) -> None: ...
    def neither(input_ids: Any, **others: Any) -> None: ...

    assert [cache_argument(f) for f in (new, old, neither)] == ["cache", "past_key_values", None]
